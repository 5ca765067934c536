"""Fetch, convert and train the models that the steps use."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from covray.cli.options import Json, OutFolder, Seed, require_folder_name
from covray.cli.output import console, print_values

if TYPE_CHECKING:
    from covray.fetching.fetch import FetchResult, ListedArtefact


def fetch(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Without it: list what there is.")] = None,
    out: Annotated[
        str | None,
        typer.Option("--out", help="Folder; by default models/NAME or data/NAME.", callback=require_folder_name),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the hub's repository.")] = None,
    hub_id: Annotated[str | None, typer.Option("--id", help="Another repository of the hub, such as a mirror.")] = None,
    catalogue: Annotated[
        Path | None, typer.Option("--catalogue", help="YAML file with artefacts of your own; see docs/weights.md.")
    ] = None,
    json_: Json = False,
) -> None:
    """Download weights or a dataset by name, checked by SHA-256. Run it again to resume, verify and repair."""
    # Under another name: the command's function is called fetch itself.
    from covray.fetching.fetch import fetch as fetch_artefact
    from covray.fetching.fetch import list_artefacts

    if name is None:
        _print_artefacts(list_artefacts(catalogue), json_)
        return
    result = fetch_artefact(name, out, revision, hub_id, catalogue)
    if json_:
        print(json.dumps(result.to_json()))
    else:
        _print_fetched(result)


def _print_fetched(result: FetchResult) -> None:
    """Print what is in the folder of an artefact, and what was done."""
    shown: dict[str, object] = {"folder": result.folder, "origin": result.origin}
    if result.revision is not None:
        shown["revision"] = result.revision
    shown["next"] = result.next
    # What was downloaded by hand is not counted.
    if result.files is not None:
        shown["files"] = f"{result.files:,}, {result.bytes:,} bytes, of which {len(result.fetched):,} fetched now"
    if result.damaged:
        shown["repaired"] = result.damaged
    test = result.self_test
    if test is not None:
        compared = "nothing is recorded for it"
        if test.difference is not None:
            compared = f"as recorded (differs by {test.difference:.2g})"
        shown["self_test"] = f"{compared}, fingerprint {test.fingerprint}"
    print_values(shown, False)


def _print_artefacts(artefacts: list[ListedArtefact], json_: bool) -> None:
    if json_:
        print(json.dumps([listed.to_json() for listed in artefacts]))
        return
    table = Table("name", "kind", "licence", "size", "", box=None, pad_edge=False)
    for listed in artefacts:
        table.add_row(listed.name, listed.artefact.kind, listed.artefact.licence, listed.artefact.size, listed.state)
    console.print(table, highlight=False)


def convert_a_tokenizer(
    source: Annotated[str, typer.Argument(help="Folder of muse or taming, or file of LlamaGen.")],
    out: OutFolder,
    json_: Json = False,
) -> None:
    """A VQGAN of muse, taming-transformers or LlamaGen becomes a VQModel folder, for --tokenizer."""
    from covray.models.tokenizer.convert import convert_tokenizer

    print_values(asdict(convert_tokenizer(source, out)), json_)


def convert_a_backbone(
    source: Annotated[str, typer.Argument(help="Folder of DeLVM or a LLaMA, or file of EasyLM.")],
    out: OutFolder,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads of an EasyLM file whose size is not a published one.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Tokenizer whose codes the backbone knows; chains of others are refused.")
    ] = None,
    json_: Json = False,
) -> None:
    """A backbone of DeLVM, EasyLM or transformers becomes a LlamaForCausalLM folder of safetensors, for --backbone."""
    from covray.models.lvm.convert import convert_backbone

    print_values(asdict(convert_backbone(source, out, heads, tokenizer)), json_)


def convert_a_prior(
    source: Annotated[str, typer.Argument(help="Stable Diffusion 1 or 2 in one .safetensors file.")],
    out: OutFolder,
    like: Annotated[
        str | None,
        typer.Option(help="Diffusers folder with the model's configs, if it is not a plain Stable Diffusion."),
    ] = None,
    json_: Json = False,
) -> None:
    """A single-file Stable Diffusion becomes a diffusers folder with the empty prompt in it, for --prior."""
    from covray.models.diffusion.convert import convert_prior

    print_values(asdict(convert_prior(source, out, like)), json_)


def nano_train(
    model: Annotated[
        str,
        typer.Argument(
            help="Of scenes: vae, prior (needs the vae), vqgan, lvm (needs the vqgan). Of portraits: vlm, judge, text, "
            "painter and clip (both need the text)."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="Folder of the family; the same command resumes there.", callback=require_folder_name
        ),
    ],
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps (of every stage of the lvm); by default the recipe's.")
    ] = None,
    scenes: Annotated[
        int, typer.Option(min=1, help="Rendered scenes to train on, eight pictures each, or portraits.")
    ] = 30_000,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Seed = 0,
) -> None:
    """Train a model of the nano family by the recipe that made the shipped one."""
    from covray.recipes.nano.recipe import train_model

    train_model(model, out, steps, scenes, threads, device, seed)


def nano_probe(
    query: Annotated[str, typer.Argument(help="pixels, or the tokenizer to judge: nano, a VQModel folder, a hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Folder of the family; rendered scenes are kept below it.")],
    judge: Annotated[str, typer.Option(help="Tokenizer of the labels, the same for all that is compared.")] = "nano",
    scenes: Annotated[int, typer.Option(min=1, help="Rendered scenes to train on.")] = 8000,
    steps: Annotated[int, typer.Option(min=1, help="Steps of 64 pairs.")] = 1500,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Judge a tokenizer: train a small network to read labels from its tokens, and score what it reads."""
    from covray.recipes.nano.recipe import probe

    result = probe(query, out, judge, scenes, steps, threads, seed)
    if json_:
        print(json.dumps(asdict(result)))
        return
    titles = ("", "read from the query", "label through the tokenizer", "perplexity", "nats to write a label")
    table = Table(*titles, box=None, pad_edge=False)
    for task, scores in result.scores.items():
        for number, (metric, value) in enumerate(scores.items()):
            ceiling = result.ceiling.get(task, {}).get(metric)
            cells = [f"{task} {metric}", f"{value:.3f}", "" if ceiling is None else f"{ceiling:.3f}"]
            # Perplexity and nats are of the task: they stand in the row of its first metric.
            if number == 0:
                nats = result.label_nats.get(task)
                cells += [f"{result.perplexity[task]:.1f}", "" if nats is None else f"{nats:.0f}"]
            table.add_row(*cells)
    console.print(table)


def nano_measure(
    folder: Annotated[
        Path | None, typer.Option("--weights", help="Folder of the family; by default the shipped one.")
    ] = None,
    json_: Json = False,
) -> None:
    """Measure the family on test scenes, which no training saw: the figures of its model card."""
    from covray.recipes.nano.recipe import measure

    print_values(asdict(measure(folder)), json_)
