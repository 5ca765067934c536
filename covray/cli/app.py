"""The commands. Each parses, calls one function, and prints what it returned.

Rooms are imported inside the commands: ``covray --help`` should not wait for torch.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from covray import __version__
from covray.errors import ConfigError, CovrayError

if TYPE_CHECKING:
    from covray.config import Section
    from covray.pairs.manifest import Pair
    from covray.training.memory import TrainPlan

C = TypeVar("C", bound="Section")

STEPS, MODELS, SCALE = "Step by step", "Models and data", "Before it starts, and at scale"

app = typer.Typer(
    name="covray",
    help="Chains of vision: a diffusion model interpolates from an image to its label, a VQGAN writes every frame as "
    "tokens, vision models learn to think in them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
pairs_app = typer.Typer(help="Make a manifest of (image, label) pairs.", no_args_is_help=True)
nano_app = typer.Typer(help="The nano family: train it again, measure it.", no_args_is_help=True)
app.add_typer(pairs_app, name="pairs", rich_help_panel=STEPS)
experiments_app = typer.Typer(help="Fixed experiments on the nano family.", no_args_is_help=True)
convert_app = typer.Typer(help="Weights of other programs, written as covray reads them.", no_args_is_help=True)
app.add_typer(nano_app, name="nano", rich_help_panel=MODELS)
app.add_typer(experiments_app, name="experiments", rich_help_panel=SCALE)
app.add_typer(convert_app, name="convert", rich_help_panel=MODELS)

Out = Annotated[str, typer.Option("--out", help="What the command writes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object last.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Everything random follows from it.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file; see configs/.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="key=value, for any key of the configuration.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Comma-separated; all that apply by default.")]

Splits = Annotated[str | None, typer.Option(help="Shares, such as train=8,val=1,test=1.")]
Root = Annotated[str, typer.Argument(help="The dataset's folder; docs/datasets.md says what lies in it.")]
Base = Annotated[
    str | None, typer.Option("--root", help="Folder that holds it: paths are below that, so that several build as one.")
]
Count = Annotated[int | None, typer.Option("--count", min=1, help="Draw so many, by the seed; all by default.")]

console = Console(emoji=False)  # a path may hold ":car:"


def main() -> None:
    """The console script: a user's mistake is one line and exit code 2."""
    try:
        app()
    except CovrayError as error:
        _fail(str(error), 2)
    except SystemExit as end:
        if end.code == 130:  # what typer makes of Ctrl-C
            _fail("stopped; the same command continues", 130)
        raise


def _fail(message: str, code: int) -> None:
    Console(stderr=True, emoji=False).print(f"[red]covray:[/red] {_escape(message)}", highlight=False, soft_wrap=True)
    sys.exit(code)


def _escape(text: str) -> str:
    """One printable line, without rich's markup: messages may quote hostile file names."""
    line = " ".join(text.split())
    return escape("".join(c if c.isprintable() else "?" for c in line))


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _shares(text: str | None) -> dict[str, float] | None:
    try:
        shares = (
            None if text is None else {name: float(share) for name, share in (s.split("=") for s in text.split(","))}
        )
    except ValueError as error:
        raise ConfigError(f"--splits {text}: write name=share, for example train=8,val=1,test=1") from error
    if shares and (min(shares.values()) < 0 or not 0 < sum(shares.values()) < float("inf")):
        raise ConfigError(f"--splits {text}: shares must be at least 0, and not all 0")
    return shares


def _numbers(option: str, text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(part) for part in _split(text) or []]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: write whole numbers separated by commas, for example 4,8") from error


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def _require_speed(tokens_per_s: float | None, plan: bool) -> None:
    if tokens_per_s is not None and not plan:
        raise ConfigError("--tokens-per-s: is for --plan, which computes hours from it; give both")
    if tokens_per_s is not None and not 1e-6 <= tokens_per_s <= 1e12:  # not a number is neither
        raise ConfigError(f"--tokens-per-s {tokens_per_s:g}: must be a number above 0; covray train prints it")


_checking: ContextVar[bool] = ContextVar("checking", default=False)


class _Resolved(Exception):
    """The configuration of a command that is only being checked."""


def _resolve(model: type[C], file: Path | None, options: dict[str, Any], sets: list[str] | None) -> C:
    """``load_config``; while ``covray submit`` checks a command, the command ends with it."""
    from covray.config import load_config

    config = load_config(model, file, _given(options), sets or ())
    if _checking.get():
        raise _Resolved(config)
    return config


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        console.print(f"covray {__version__}")
        raise typer.Exit


# --- pairs ---------------------------------------------------------------------------------------------------------


@pairs_app.command()
def photos(
    folder: Annotated[str, typer.Argument(help="Any folder of photographs.")],
    out: Out,
    tasks: Tasks = None,
    size: Annotated[int, typer.Option(min=16, max=4096, help="Shorter side is shrunk to this many pixels.")] = 512,
    splits: Splits = None,
    count: Count = None,
    seed: Seed = 0,
    base: Base = None,
    json_: Json = False,
) -> None:
    """Photographs label themselves: colorization, edges, low light."""
    from covray.pairs.photos import PHOTO_TASKS, photo_pairs

    chosen = _split(tasks) or list(PHOTO_TASKS)
    pairs = photo_pairs(folder, chosen, size, _shares(splits), seed, count)
    _write_drawn(out, folder, base, pairs, count and count * len(set(chosen)), json_)


@pairs_app.command()
def scenes(
    out: Out,
    count: Annotated[int, typer.Option(min=1, help="Scenes; each gives a pair for every task.")] = 100,
    tasks: Tasks = None,
    size: Annotated[int, typer.Option(min=16, max=2048, help="Side of the pictures in pixels.")] = 64,
    splits: Splits = None,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Rendered scenes with exact labels for all seven tasks."""
    from covray.pairs.scenes import scene_pairs
    from covray.tasks import TASKS

    chosen = _split(tasks) or list(TASKS)
    unknown = [task for task in chosen if task not in TASKS]
    if unknown:
        raise ConfigError(f"--tasks {unknown[0]}: no such task; the tasks are {', '.join(TASKS)}")
    _write_manifest(out, None, scene_pairs(count, chosen, size, seed, _shares(splits)), json_, count * len(chosen))


@pairs_app.command()
def manifest(
    file: Annotated[str, typer.Argument(help="Your own list: Parquet, CSV, JSONL, or Painter's JSON.")],
    out: Out,
    task: Annotated[str | None, typer.Option(help="The task, where the list has no such column.")] = None,
    split: Annotated[str, typer.Option(help="The split, where the list has no such column.")] = "train",
    root: Annotated[
        str | None, typer.Option(help="Folder the list's paths are relative to; by default its own.")
    ] = None,
    json_: Json = False,
) -> None:
    """Your own pairs, from a list of files."""
    from covray.pairs.manifest import list_root, read_user_list

    _write_manifest(out, list_root(file, root), read_user_list(file, task, split, root), json_)


@pairs_app.command()
def coco(
    root: Root,
    out: Out,
    task: Annotated[str, typer.Option(help="segmentation or pose.")] = "segmentation",
    labels: Annotated[str, typer.Option(help="Of segmentation: panoptic (133 classes) or stuff (182).")] = "panoptic",
    split: Annotated[str, typer.Option(help="train or val.")] = "train",
    count: Count = None,
    seed: Seed = 0,
    base: Base = None,
    json_: Json = False,
) -> None:
    """COCO 2017: classes of the panoptic or stuff labels, or people's skeletons."""
    from covray.pairs.coco import coco_pairs

    _write_drawn(out, root, base, coco_pairs(root, task, labels, split, count, seed), count, json_)


@pairs_app.command()
def nyuv2(
    root: Root,
    out: Out,
    task: Annotated[str, typer.Option(help="depth or normals.")],
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    count: Count = None,
    seed: Seed = 0,
    base: Base = None,
    json_: Json = False,
) -> None:
    """NYU Depth v2: depth in metres, or surface normals."""
    from covray.pairs.nyuv2 import nyuv2_pairs

    _write_drawn(out, root, base, nyuv2_pairs(root, task, split, count, seed), count, json_)


@pairs_app.command()
def bsds(
    root: Root,
    out: Out,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    share: Annotated[float, typer.Option(help="Share of the annotators who must have drawn an edge.")] = 0.5,
    listing: Annotated[
        str | None, typer.Option("--list", help="File below ROOT of lines 'image label', as HED-BSDS has.")
    ] = None,
    count: Count = None,
    seed: Seed = 0,
    base: Base = None,
    json_: Json = False,
) -> None:
    """BSDS500, or HED-BSDS: the edges that people drew."""
    from covray.pairs.bsds import bsds_pairs

    _write_drawn(out, root, base, bsds_pairs(root, split, share, listing, count, seed), count, json_)


@pairs_app.command()
def lol(
    root: Root,
    out: Out,
    split: Annotated[str, typer.Option(help="train (our485) or test (eval15).")] = "train",
    count: Count = None,
    seed: Seed = 0,
    base: Base = None,
    json_: Json = False,
) -> None:
    """LOL: photographs in the dark and in good light."""
    from covray.pairs.lol import lol_pairs

    _write_drawn(out, root, base, lol_pairs(root, split, count, seed), count, json_)


def _write_drawn(out: str, root: str, base: str | None, pairs: Iterator[Pair], count: int | None, json_: bool) -> None:
    from covray.pairs.sources import rebased

    placed = pairs if base is None else rebased(pairs, root, base)
    _write_manifest(out, base or root, _told(placed, count), json_, count)


def _told(pairs: Iterator[Pair], count: int | None) -> Iterator[Pair]:
    """``pairs``; says at their end where they are fewer than ``count``, and which cannot be used."""
    found, reasons = 0, Counter[str]()
    for pair in pairs:
        found += 1
        if "error" in pair.meta:
            reasons[pair.meta["error"].partition(":")[0]] += 1
        yield pair
    stderr = Console(stderr=True, emoji=False)
    if count is not None and found < count:
        stderr.print(f"{count} pairs asked for, {found} there are: all were taken", soft_wrap=True)
    if reasons:
        named = ", ".join(f"{reason} {number}" for reason, number in reasons.most_common())
        stderr.print(f"cannot be used, and will be rejected: {_escape(named)}", soft_wrap=True)


def _write_manifest(out: str, root: str | None, pairs: Iterator[Pair], json_: bool, total: int | None = None) -> None:
    from rich.progress import track

    from covray.pairs.manifest import ManifestWriter, check_manifest

    with ManifestWriter(out, root) as writer:
        shown = track(pairs, "pairs", total=total, console=Console(stderr=True), disable=not sys.stderr.isatty())
        for pair in shown:
            writer.add(pair)
    info = check_manifest(out)
    result = {"out": out, "pairs": info.rows, "per_task": info.per_task, "splits": info.splits}
    result["duplicates"] = writer.duplicates
    if json_:
        print(json.dumps(result))
        return
    table = Table("task", "pairs", box=None, pad_edge=False)
    for name, rows in info.per_task.items():
        table.add_row(name, str(rows))
    console.print(table)
    note = f", {writer.duplicates} duplicates left out" if writer.duplicates else ""
    console.print(f"{info.rows} pairs in {_escape(out)}{note}", soft_wrap=True)


# --- build, view, inspect ------------------------------------------------------------------------------------------


@app.command(rich_help_panel=STEPS)
def build(
    pairs: Annotated[str | None, typer.Option(help="Manifest, or a folder of manifests.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Dataset folder to write.")] = None,
    lengths: Annotated[str | None, typer.Option(help="Chain lengths to serve, for example 4,8.")] = None,
    methods: Annotated[str | None, typer.Option(help="diffusion, linear, or both (the default).")] = None,
    prior: Annotated[str | None, typer.Option(help="nano, a diffusers folder, or a hub id.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="nano, a VQModel folder, or a hub id.")] = None,
    actors: Annotated[int | None, typer.Option(min=1, help="Size of the pool; by default what fits.")] = None,
    keep_noise: Annotated[bool | None, typer.Option("--keep-noise", help="Keep the inverted noise.")] = None,
    noise_from: Annotated[str | None, typer.Option(help="Dataset whose kept noise is used.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would happen, and stop.")] = False,
    json_: Json = False,
) -> None:
    """Turn pairs into chains of tokens. Killed anywhere, the same command continues."""
    from covray.config import BuildConfig

    options: dict[str, Any] = {
        "pairs": pairs,
        "out": out,
        "lengths": _numbers("--lengths", lengths),
        "methods": _split(methods),
        "prior.path": prior,
        "tokenizer.path": tokenizer,
        "actors.min": actors,
        "actors.max": actors,
        "keep_noise": keep_noise,
        "noise_from": noise_from,
    }
    resolved = _resolve(BuildConfig, config, options, sets)
    with _quiet_libraries():
        from covray.distributed import build as building

        if plan:
            planned = building.plan_build(resolved)
            _print(planned.__dict__, json_)
            return
        audit = building.build(resolved)
    if json_:
        print(json.dumps(audit.to_json()))
    else:
        _print_audit(audit.to_json(), resolved.out)


def _print_audit(audit: dict[str, Any], out: str) -> None:
    table = Table("task", "written", "rejected", "reasons", box=None, pad_edge=False)
    for task, counts in audit["per_task"].items():
        reasons = ", ".join(f"{reason} {number}" for reason, number in counts["reasons"].items())
        table.add_row(task, str(counts["written"]), str(counts["rejected"]), _escape(reasons))
    console.print(table)
    on = f"{audit['actors']} actor{'s' if audit['actors'] != 1 else ''}"
    speed = f"{audit['chains_per_s']:.2f} chains/s on {on}" if audit.get("chains_per_s") else ""
    busy = f", busy {audit['busy_share']:.0%} of their time" if audit.get("busy_share") else ""
    console.print(f"{audit['written']} chains in {_escape(out)}  {speed}{busy}", highlight=False, soft_wrap=True)
    console.print(f"next: covray view {_escape(out)}", soft_wrap=True)


@app.command(rich_help_panel=STEPS)
def view(
    dataset: Annotated[str, typer.Argument(help="Dataset folder, finished or not.")],
    out: Annotated[str | None, typer.Option("--out", help="Folder to write; by default DATASET/view.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Chains shown of every task.")] = 12,
    json_: Json = False,
) -> None:
    """Contact sheets and a page: every frame of a chain, decoded from its tokens."""
    from covray.report.dataset import view as write_view

    with _quiet_libraries():
        paths = write_view(dataset, out or f"{dataset.rstrip('/')}/view", limit_per_task=limit)
    if json_:
        print(json.dumps({"written": paths}))
        return
    for path in paths:
        console.print(_escape(path), highlight=False, soft_wrap=True)


@app.command(rich_help_panel=STEPS)
def inspect(dataset: Annotated[str, typer.Argument(help="Dataset folder.")], json_: Json = False) -> None:
    """Schema, counts, fingerprints and configuration of a dataset."""
    from covray.report.summary import describe, print_description

    description = describe(dataset)
    if json_:
        print(json.dumps(description))
    else:
        print_description(description, console)


@app.command(rich_help_panel=STEPS)
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder to write.")] = Path("covray-demo"),
    json_: Json = False,
) -> None:
    """The whole story on the nano family, offline, in minutes: pictures in, chains of vision to look at."""
    with _quiet_libraries():
        from covray.recipes.demo import run_demo

        result = run_demo(out, console)
    if json_:
        print(json.dumps(result))


# --- train, export --------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=STEPS)
def train(
    scale: Annotated[str | None, typer.Option(help="nano, 300m, 600m, 1b, 3b, 7b, or custom (a folder's own).")] = None,
    data: Annotated[str | None, typer.Option(help="Dataset of chains: the --out of a covray build.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Run folder to write.")] = None,
    length: Annotated[str | None, typer.Option(help="Chain length, for example 4; of 4,6 each sentence draws.")] = None,
    pairs: Annotated[str | None, typer.Option(help="Example pairs before the query, 1 or 1,2.")] = None,
    method: Annotated[str | None, typer.Option(help="How frames were made: diffusion, linear or none.")] = None,
    backbone: Annotated[str | None, typer.Option(help="nano, a LlamaForCausalLM folder, or a hub id.")] = None,
    init: Annotated[str | None, typer.Option(help="random: to measure speed, without weights.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Ray Train's workers, one a GPU.")] = None,
    epochs: Annotated[float | None, typer.Option(help="How often each pair is the query.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps, in place of epochs.")] = None,
    deepspeed: Annotated[str | None, typer.Option(help="auto, none, zero1, zero2, zero3, or a JSON file.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow; by default a file beside RUN; none: no MLflow.")
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Everything random follows from it.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would happen, and stop.")] = False,
    tokens_per_s: Annotated[float | None, typer.Option(help="With --plan: of one worker, for the hours.")] = None,
    json_: Json = False,
) -> None:
    """Teach an adapter to think in chains. Killed anywhere, the same command continues."""
    from covray.config import TrainConfig

    options: dict[str, Any] = {
        "data": data,
        "out": out,
        "sentences.lengths": _numbers("--length", length),
        "sentences.pairs": _numbers("--pairs", pairs),
        "sentences.method": method,
        "backbone.scale": scale,
        "backbone.path": backbone,
        "backbone.init": init,
        "workers.count": workers,
        "optimizer.epochs": epochs,
        "optimizer.steps": steps,
        "compute.deepspeed": deepspeed,
        "tracking.uri": tracking_uri,
        "seed": seed,
    }
    resolved = _resolve(TrainConfig, config, options, sets)
    _require_speed(tokens_per_s, plan)
    with _quiet_libraries():
        if plan:
            from covray.training.memory import plan as plan_training

            _print_plan(plan_training(resolved, tokens_per_s), json_)
            return
        from covray.distributed.train import train as run_training

        result = run_training(resolved)
    if json_:
        print(json.dumps(result))
    else:
        _print_training(result, resolved.out)


def _print_plan(planned: TrainPlan, json_: bool) -> None:
    values = {key: value for key, value in asdict(planned).items() if value is not None}
    memory = values.pop("memory")
    if json_:
        totals = [part | {"total": figure.total} for part, figure in zip(memory, planned.memory, strict=True)]
        print(json.dumps(values | {"trainable_share": planned.trainable_share, "memory": totals}))
        return
    shown = {key: f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for key, value in values.items()}
    shown["trainable"] += f" ({planned.trainable_share:.2%})"
    _print(shown, False)
    table = Table("GiB a worker", "weights", "adapter", "activations", "working", "total", box=None, pad_edge=False)
    for part in planned.memory:
        name = f"ZeRO {part.stage}{', recompute' if part.recompute else ''}"
        figures = (part.weights, part.adapter, part.activations, part.working, part.total)
        table.add_row(name, *(f"{figure / 2**30:.2f}" for figure in figures))
    console.print(table)


def _print_training(result: dict[str, Any], out: str) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("steps", f"{result['steps']:,}")
    table.add_row("loss", f"{result['loss']:.4f}")
    for key in ("validation_loss", "answer_perplexity"):
        if key in result:
            table.add_row(key.replace("_", " "), f"{result[f'{key}_before']:.4f} -> {result[key]:.4f}")
    table.add_row("tokens/s", f"{result['tokens_per_s']:,.0f}")
    console.print(table)
    if result.get("validation_loss", 0.0) > result.get("validation_loss_before", 0.0):
        console.print(
            "[yellow]no step was better on the validation split than what training began with[/yellow]: lower "
            "optimizer.learning_rate, or train on more pairs",
            soft_wrap=True,
        )
    where = _escape(out.rstrip("/"))
    console.print(f"adapter in {where}/adapter (PEFT)", highlight=False, soft_wrap=True)
    console.print(f"next: covray export {where} --merge --out {where}/merged", highlight=False, soft_wrap=True)


@app.command(rich_help_panel=STEPS)
def export(
    run: Annotated[str, typer.Argument(help="Run folder of a covray train.")],
    out: Out,
    merge: Annotated[bool, typer.Option("--merge", help="Backbone and adapter as one Hugging Face folder.")] = False,
) -> None:
    """The adapter alone (PEFT), or merged into its backbone, as a plain Hugging Face folder."""
    with _quiet_libraries():
        from covray.models.lvm.adapter import export_run

        export_run(run, out, merge)
    console.print(_escape(out), highlight=False, soft_wrap=True)


# --- convert -------------------------------------------------------------------------------------------------------


@convert_app.command("tokenizer")
def convert_a_tokenizer(
    source: Annotated[str, typer.Argument(help="Folder of muse or taming, or file of LlamaGen.")],
    out: Out,
    json_: Json = False,
) -> None:
    """A VQGAN of muse, taming-transformers or LlamaGen becomes a VQModel folder, for --tokenizer."""
    with _quiet_libraries():
        from covray.models.tokenizer.convert import convert_tokenizer

        _print(convert_tokenizer(source, out), json_)


@convert_app.command("backbone")
def convert_a_backbone(
    source: Annotated[str, typer.Argument(help="Folder of DeLVM or a LLaMA, or file of EasyLM.")],
    out: Out,
    heads: Annotated[int | None, typer.Option(min=1, help="Of EasyLM's, if its size is no published one.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Whose codes it knows: chains of others are refused.")] = None,
    json_: Json = False,
) -> None:
    """A backbone of DeLVM, EasyLM or transformers becomes a LlamaForCausalLM folder of safetensors, for --backbone."""
    with _quiet_libraries():
        from covray.models.lvm.convert import convert_backbone

        _print(convert_backbone(source, out, heads, tokenizer), json_)


@convert_app.command("prior")
def convert_a_prior(
    source: Annotated[str, typer.Argument(help="Stable Diffusion 1 or 2 in one .safetensors file.")],
    out: Out,
    like: Annotated[str | None, typer.Option(help="Diffusers folder with its configs, if it is another.")] = None,
    json_: Json = False,
) -> None:
    """A single-file Stable Diffusion becomes a diffusers folder with the empty prompt in it, for --prior."""
    with _quiet_libraries():
        from covray.models.diffusion.convert import convert_prior

        _print(convert_prior(source, out, like), json_)


# --- fetch ---------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=MODELS)
def fetch(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Without it: list what there is.")] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder; by default models/NAME or data/NAME.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the hub's repository.")] = None,
    hub_id: Annotated[str | None, typer.Option("--id", help="Another repository of the hub, such as a mirror.")] = None,
    json_: Json = False,
) -> None:
    """Download weights or a dataset by name, checked by SHA-256. The same command continues, verifies and mends."""
    with _quiet_libraries():
        from covray.fetching.fetch import fetch as fetch_artefact
        from covray.fetching.fetch import list_artefacts

        if name is None:
            _print_artefacts(list_artefacts(), json_)
            return
        result = fetch_artefact(name, out, revision, hub_id)
    if json_:
        print(json.dumps(result))
        return
    shown = {key: result[key] for key in ("folder", "origin", "revision", "next") if result[key] is not None}
    if "files" in result:
        shown["files"] = (
            f"{result['files']:,}, {result['bytes']:,} bytes, of which {len(result['fetched']):,} fetched now"
        )
    if result["damaged"]:
        shown["mended"] = result["damaged"]
    if "self_test" in result:
        difference = result["self_test"]["difference"]
        compared = "nothing is recorded for it" if difference is None else f"as recorded (differs by {difference:.2g})"
        shown["self_test"] = f"{compared}, fingerprint {result['self_test']['fingerprint']}"
    _print(shown, False)


def _print_artefacts(artefacts: list[dict[str, Any]], json_: bool) -> None:
    if json_:
        print(json.dumps(artefacts))
        return
    table = Table("name", "kind", "licence", "size", "", box=None, pad_edge=False)
    for artefact in artefacts:
        table.add_row(*(artefact[key] for key in ("name", "kind", "licence", "size", "state")))
    console.print(table, highlight=False)


# --- generate ------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=STEPS)
def generate(
    query: Annotated[list[str] | None, typer.Option(metavar="IMAGE", help="Picture to answer; repeatable.")] = None,
    example: Annotated[
        list[str] | None, typer.Option(metavar="IMAGE LABEL", help="Image and its label; repeatable.")
    ] = None,
    labels: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder to write: one folder a query.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Run of a covray train; by default the untuned backbone.")] = None,
    task: Annotated[str | None, typer.Option(help="To write answers as data: classes, metres, keypoints, ...")] = None,
    backbone: Annotated[str | None, typer.Option(help="nano, a LlamaForCausalLM folder, or a hub id.")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="nano, a VQModel folder, or a hub id.")] = None,
    prior: Annotated[str | None, typer.Option(help="nano, a diffusers folder, or a hub id.")] = None,
    length: Annotated[int | None, typer.Option(help="Chain length; by default the run's.")] = None,
    method: Annotated[str | None, typer.Option(help="How the examples' frames are made; by default the run's.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 (the default): greedy; 1: the model's own.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample of so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample of the likeliest tokens of this probability.")] = None,
    best_of: Annotated[int | None, typer.Option(help="Candidates a query, of which the likeliest is given.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Everything random follows from it.")] = None,
    json_: Json = False,
) -> None:
    """Example chains and query pictures in; frames, then the answer, out."""
    from covray.config import GenerateConfig, load_config

    # An option takes one value: the labels, which follow their images, arrive as arguments.
    if len(example or ()) != len(labels or ()):
        raise ConfigError(
            f"--example: {len(example or ())} images and {len(labels or ())} labels; write --example IMAGE LABEL, once "
            "for each pair, and --query IMAGE, once for each query"
        )
    options: dict[str, Any] = {
        "queries": query,
        "out": out,
        "examples": list(zip(example, labels, strict=True)) if example and labels else None,
        "adapter": adapter,
        "task": task,
        "backbone.path": backbone,
        "backbone.scale": "custom" if backbone else None,
        "tokenizer.path": tokenizer,
        "prior.path": prior,
        "length": length,
        "method": method,
        "sampling.temperature": temperature,
        "sampling.top_k": top_k,
        "sampling.top_p": top_p,
        "sampling.best_of": best_of,
        "seed": seed,
    }
    resolved = load_config(GenerateConfig, config, _given(options), sets or ())
    with _quiet_libraries():
        from covray.generation.generator import generate as run_generation

        result = run_generation(resolved)
    if json_:
        print(json.dumps(result))
        return
    if resolved.adapter is None:
        console.print("no --adapter: these are answers of the untuned backbone", highlight=False)
    for answer in result["answers"]:
        for file in answer["files"]:
            where = _escape(f"{resolved.out.rstrip('/')}/{answer['folder']}/{file}")
            console.print(where, highlight=False, soft_wrap=True)


# --- evaluate ------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=STEPS)
def evaluate(
    data: Annotated[str | None, typer.Option(help="Dataset of chains.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="RUN", help="Run of a covray train, or NAME=RUN; repeatable.")
    ] = None,
    out: Annotated[str | None, typer.Option("--out", help="Folder to write.")] = None,
    tasks: Tasks = None,
    split: Annotated[str | None, typer.Option(help="Whose pairs are the queries; test by default.")] = None,
    episodes: Annotated[int | None, typer.Option(help="At most so many queries of a task.")] = None,
    pairs: Annotated[int | None, typer.Option(help="Example pairs before the query; by default a run's.")] = None,
    selection: Annotated[str | None, typer.Option(help="Examples at random, similar, or focus.")] = None,
    baselines: Annotated[str | None, typer.Option(help="Of copy, mean, nearest, focus, ceiling.")] = None,
    manifest: Annotated[str | None, typer.Option(help="Where labels are; by default what DATA was built from.")] = None,
    backbone: Annotated[
        str | None, typer.Option(help="Of the runs, where it has moved; or the one to look at.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 (the default): greedy; 1: the model's own.")] = None,
    best_of: Annotated[int | None, typer.Option(help="Candidates a query, of which the likeliest is scored.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow; by default a file beside OUT; none: no MLflow.")
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Everything random follows from it.")] = None,
    json_: Json = False,
) -> None:
    """Score adapters, their backbone and baselines on the same queries. Killed anywhere, the same command continues."""
    from covray.config import EvaluateConfig

    options: dict[str, Any] = {
        "data": data,
        "adapters": adapter,
        "out": out,
        "tasks": _split(tasks),
        "split": split,
        "episodes": episodes,
        "pairs": pairs,
        "selection": selection,
        "baselines": _split(baselines),
        "manifest": manifest,
        "backbone.path": backbone,
        "backbone.scale": "custom" if backbone else None,
        "sampling.temperature": temperature,
        "sampling.best_of": best_of,
        "tracking.uri": tracking_uri,
        "seed": seed,
    }
    resolved = _resolve(EvaluateConfig, config, options, sets)
    with _quiet_libraries():
        from covray.distributed.evaluate import evaluate as run_evaluation

        results = run_evaluation(resolved)
    if json_:
        print(json.dumps(results))
    else:
        _print_evaluation(results, resolved.out)


def _print_evaluation(results: dict[str, Any], out: str) -> None:
    """The primary metric of every task, a row a subject; all else is on the page."""
    from covray.evaluation.metrics import short_metric, short_task

    tasks = results["tasks"]
    means = {(entry["subject"], entry["task"], entry["metric"]): entry["mean"] for entry in results["scores"]}
    lower = set(results["lower_is_better"])
    table = Table("", box=None, pad_edge=False)
    for task, about in tasks.items():
        arrow = "↓" if about["primary"] in lower else "↑"
        title = f"{short_task(task)}\n{short_metric(about['primary'])} {arrow}"
        table.add_column(title, justify="right", no_wrap=True)
    for subject in results["subjects"]:
        found = [means.get((subject["name"], task, about["primary"])) for task, about in tasks.items()]
        cells = ["–" if mean is None else f"{mean:.3g}" for mean in found]
        table.add_row(_escape(subject["name"]), *cells, style="bold" if subject["kind"] == "adapter" else None)
    console.print(table)
    if results["failed"]:
        console.print(f"[yellow]{len(results['failed'])} episodes failed[/yellow]: they are named on the page")
    console.print(f"{_escape(out.rstrip('/'))}/index.html", highlight=False, soft_wrap=True)


# --- sweep ---------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=STEPS)
def sweep(
    out: Annotated[str | None, typer.Option("--out", help="Folder of the sweep.")] = None,
    data: Annotated[str | None, typer.Option(help="Dataset of chains.")] = None,
    manifest: Annotated[str | None, typer.Option(help="Or pairs, to build the dataset from.")] = None,
    concurrency: Annotated[int | None, typer.Option(help="Trials at a time; by default as many as fit.")] = None,
    tracking_uri: Annotated[
        str | None, typer.Option(help="MLflow; by default a file beside OUT; none: no MLflow.")
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the sweep in OUT, as it was configured.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would happen, and stop.")] = False,
    tokens_per_s: Annotated[float | None, typer.Option(help="With --plan: of one worker, for the hours.")] = None,
    json_: Json = False,
) -> None:
    """Train and score a grid of chain lengths, pairs and methods. Killed anywhere, the same command continues."""
    from covray.config import SweepConfig

    _require_speed(tokens_per_s, plan)
    options: dict[str, Any] = {
        "out": out,
        "data": data,
        "manifest": manifest,
        "concurrency": concurrency,
        "tracking.uri": tracking_uri,
    }
    with _quiet_libraries():
        if resume:
            given = [key for key, value in options.items() if value is not None and key != "out"]
            if out is None or config is not None or sets or given:
                raise ConfigError("--resume: takes --out SWEEP alone; what else holds is in its folder")
            from covray.distributed.sweep import resumed

            resolved = resumed(out)
        else:
            resolved = _resolve(SweepConfig, config, options, sets)
        if plan:
            from covray.sweeps.grid import plan_sweep

            _print_sweep_plan(plan_sweep(resolved, tokens_per_s), json_)
            return
        from covray.distributed.sweep import sweep as run_sweep

        results = run_sweep(resolved)
    _print_sweep(results, resolved.out, json_)


@app.command(rich_help_panel=STEPS)
def report(
    folder: Annotated[str, typer.Argument(metavar="EVAL|SWEEP", help="An evaluation, or a sweep, finished or not.")],
    json_: Json = False,
) -> None:
    """Page and table of an evaluation, or of a sweep from the trials that are done so far."""
    with _quiet_libraries():
        from covray.distributed import evaluate as evaluations
        from covray.distributed import sweep as sweeps
        from covray.io import storage

        if storage.exists(storage.join(folder, evaluations.DESCRIPTION)):
            results = evaluations.report(folder)
            if json_:
                print(json.dumps(results))
            else:
                _print_evaluation(results, folder)
            return
        results = sweeps.report(folder)
    _print_sweep(results, folder, json_)


@experiments_app.command("claims")
def experiments_claims(
    out: Out,
    data: Annotated[str | None, typer.Option(help="Chains of 4 by both methods; by default scenes, built.")] = None,
    json_: Json = False,
) -> None:
    """None, linear and diffusion on seven tasks, three seeds: an hour on two cores. The same command continues."""
    with _quiet_libraries():
        from covray.recipes.claims import run_claims

        results = run_claims(out, data)
    _print_sweep(results, f"{out}/claims", json_)


def _print_sweep_plan(planned: dict[str, Any], json_: bool) -> None:
    if json_:
        print(json.dumps(planned))
        return
    trials, total = planned["trials"], planned["total"]
    shown: dict[str, Any] = {"trials": f"{len(trials):,}", "left out": f"{len(planned['left_out']):,}"}
    shown |= {key: f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for key, value in total.items()}
    if planned["builds"] is not None:
        lengths = ", ".join(map(str, planned["builds"]["lengths"]))
        shown["builds first"] = f"chains of {lengths} by {', '.join(planned['builds']['methods']) or 'no method'}"
    _print(shown, False)
    if "gpu_hours" not in total:
        console.print("hours: give --tokens-per-s, which covray train prints", highlight=False)


def _print_sweep(results: dict[str, Any], out: str, json_: bool) -> None:
    """What the claims came to, and how the trials ended; all else is on the page."""
    if json_:
        print(json.dumps(results))
        return
    table = Table("claim", "gain", "95%", "verdict", box=None, pad_edge=False)
    for claim in results["claims"]:
        overall = claim["overall"]
        if overall is None or overall["gain_percent"] is None:
            continue
        low, high = overall["low"], overall["high"]
        interval = "–" if low is None else f"{low:+.1f} to {high:+.1f}"
        table.add_row(_escape(claim["claim"]), f"{overall['gain_percent']:+.1f}%", interval, overall["verdict"])
    if table.row_count:
        console.print(table)
    ended = [trial["status"] for trial in results["trials"]]
    counts = [f"{ended.count(status)} {status}" for status in ("finished", "stopped", "failed", "waiting")]
    console.print(", ".join(count for count in counts if not count.startswith("0 ")), highlight=False)
    for trial in results["trials"]:
        if trial["status"] == "failed":
            why = f"[yellow]{_escape(trial['name'])} failed[/yellow]: {_escape(str(trial['error']))}"
            console.print(why, highlight=False, soft_wrap=True)
    console.print(f"{_escape(out.rstrip('/'))}/index.html", highlight=False, soft_wrap=True)


# --- submit --------------------------------------------------------------------------------------------------------


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False},
    rich_help_panel=SCALE,
)
def submit(
    context: typer.Context,
    step: Annotated[str, typer.Argument(metavar="build|train|evaluate|sweep", help="Its options follow it.")],
    address: Annotated[
        str | None, typer.Option(help="Of the dashboard; by default RAY_API_SERVER_ADDRESS, or this machine's.")
    ] = None,
    submission_id: Annotated[str | None, typer.Option(help="Name of the job; by default Ray gives one.")] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Show the job's output, and end as it does.")] = True,
) -> None:
    """Run a step on a Ray cluster: checked here first, then sent with this very covray. Its paths are the cluster's."""
    from covray.distributed.submit import STEPS
    from covray.distributed.submit import submit as submit_job

    if step not in STEPS:
        raise ConfigError(f"{step}: cannot be submitted; give one of {', '.join(STEPS)}")
    arguments = list(context.args)
    if "--plan" in arguments:
        raise ConfigError("--plan: needs no cluster; run it here, without submit")
    config: Section | None = None
    # A sweep that is resumed has its configuration on the cluster.
    if "--resume" not in arguments:
        checking = _checking.set(True)
        try:
            typer.main.get_command(app).main(args=[step, *arguments], prog_name="covray submit")
        except _Resolved as resolved:
            config = resolved.args[0]
        finally:
            _checking.reset(checking)
    flags = ["--json"] if "--json" in arguments and config is not None else []
    raise typer.Exit(
        submit_job(
            step,
            config,
            flags if config is not None else arguments,
            address=address,
            submission_id=submission_id,
            wait=wait,
            console=console,
        )
    )


# --- doctor --------------------------------------------------------------------------------------------------------


@app.command(rich_help_panel=SCALE)
def doctor(
    path: Annotated[str, typer.Option("--path", help="Storage where datasets and runs are to go.")] = ".",
    prior: Annotated[str, typer.Option(help="nano, a diffusers folder, or a hub id.")] = "nano",
    tokenizer: Annotated[str, typer.Option(help="nano, a VQModel folder, or a hub id.")] = "nano",
    backbone: Annotated[str, typer.Option(help="nano, a LlamaForCausalLM folder, or a hub id.")] = "nano",
    json_: Json = False,
) -> None:
    """Check this machine, or the cluster of RAY_ADDRESS, and say what to do. Exit code 1: there are problems."""
    with _quiet_libraries():
        from covray.doctor.checks import examine

        findings = list(examine(path, prior, tokenizer, backbone))
    counts = {status: sum(finding.status == status for finding in findings) for status in ("problem", "note", "ok")}
    if json_:
        print(json.dumps([asdict(finding) for finding in findings]))
    else:
        styles = {"problem": "red", "note": "yellow", "ok": "dim"}
        table = Table(show_header=False, box=None, pad_edge=False)
        for finding in sorted(findings, key=lambda finding: list(counts).index(finding.status)):
            advice = f"\n[default]{_escape(finding.advice)}[/default]" if finding.advice else ""
            table.add_row(_escape(finding.name), _escape(finding.found) + advice, style=styles[finding.status])
        console.print(table, highlight=False)
        console.print(f"{counts['problem']} problems, {counts['note']} notes, {counts['ok']} ok", highlight=False)
    if counts["problem"]:
        raise typer.Exit(1)


# --- plan, benchmark -----------------------------------------------------------------------------------------------


@app.command(rich_help_panel=SCALE)
def plan(
    steps: Annotated[list[str] | None, typer.Argument(metavar="[build] [train]", help="build by default.")] = None,
    pairs: Annotated[int | None, typer.Option(help="Pairs of the build.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of the build; of the training: train_on.gpus.")] = None,
    calibration: Annotated[str | None, typer.Option(help="What covray benchmark wrote.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Everything random follows from it.")] = None,
    json_: Json = False,
) -> None:
    """What a build or a training will take in time, GPU hours, money and storage."""
    from covray.config import PlanConfig, load_config

    options: dict[str, Any] = {
        "steps": steps or None,
        "pairs": pairs,
        "build_on.gpus": gpus,
        "calibration": calibration,
        "seed": seed,
    }
    resolved = load_config(PlanConfig, config, _given(options), sets or ())
    with _quiet_libraries():
        from covray.planning.plan import plan as make_plan

        planned = make_plan(resolved)
    if json_:
        print(json.dumps(planned))
        return
    for step in resolved.steps:
        console.print(f"[bold]{step}[/bold]")
        values = planned[step]
        notes = values.pop("notes")
        _print({key: _figure(value) for key, value in values.items()}, False)
        for note in notes:
            console.print(f"[yellow]note:[/yellow] {_escape(note)}", highlight=False, soft_wrap=True)
    console.print(f"rates: {_escape(planned['rates'])}", highlight=False, soft_wrap=True)


def _figure(value: Any) -> str:
    """A number, or the mean of several with their range."""
    if isinstance(value, dict):
        mean, low, high = (_figure(value[key]) for key in ("mean", "low", "high"))
        return mean if low == high else f"{mean}  ({low} to {high})"
    if isinstance(value, float) and abs(value) < 100:
        return f"{value:.3g}"
    return f"{value:,.0f}"


@app.command(rich_help_panel=SCALE)
def benchmark(
    out: Annotated[str, typer.Option("--out", help="Calibration to write, .yaml or .json.")],
    pairs: Annotated[str | None, typer.Option(help="Pairs of the two builds, by default 4 and 12 blocks.")] = None,
    train_steps: Annotated[int, typer.Option(min=8, help="Steps of the training.")] = 24,
    config: ConfigFile = None,
    sets: Sets = None,
    json_: Json = False,
) -> None:
    """Measure small real builds and a training on this hardware, for covray plan. Takes a PLAN's configuration."""
    from covray.config import PlanConfig, load_config

    resolved = load_config(PlanConfig, config, {}, sets or ())
    with _quiet_libraries():
        from covray.distributed.benchmark import calibrate

        calibration = calibrate(resolved, out, _numbers("--pairs", pairs), train_steps)
    values = calibration.model_dump(mode="json")
    if json_:
        print(json.dumps(values))
        return
    for section in ("build", "train"):
        if values[section] is not None:
            console.print(f"[bold]{section}[/bold]")
            rates = {key: value for key, value in values[section].items() if key != "identity"}
            _print({key: _figure(value) for key, value in rates.items()}, False)
    console.print(_escape(out), highlight=False, soft_wrap=True)


# --- nano ----------------------------------------------------------------------------------------------------------


@nano_app.command("train")
def nano_train(
    model: Annotated[str, typer.Argument(help="vae, prior (needs the vae), vqgan, or lvm (needs the vqgan).")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the family; a killed training continues there.")],
    steps: Annotated[int | None, typer.Option(min=1, help="By default the recipe's.")] = None,
    scenes: Annotated[int, typer.Option(min=1, help="Rendered scenes to train on, eight pictures each.")] = 8000,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Seed = 0,
) -> None:
    """Train a model of the nano family by the recipe that made the shipped one."""
    with _quiet_libraries():
        from covray.recipes.nano.recipe import train_model

        train_model(model, out, steps, scenes, threads, device, seed)


@nano_app.command("measure")
def nano_measure(
    folder: Annotated[
        Path | None, typer.Option("--weights", help="Folder of the family; by default the shipped.")
    ] = None,
    json_: Json = False,
) -> None:
    """Measure the family on held-out scenes: the figures of its model card."""
    with _quiet_libraries():
        from covray.recipes.nano.recipe import measure

        _print(measure(folder), json_)


def _print(values: dict[str, Any], json_: bool) -> None:
    if json_:
        print(json.dumps(values))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for key, value in values.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        table.add_row(key.replace("_", " "), _escape(shown))
    console.print(table)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Libraries announce deprecations of each other; a user of covray can mend none of them."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
