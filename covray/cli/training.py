"""Train an adapter and export it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from covray.cli.options import (
    ConfigFile,
    Json,
    OutFolder,
    Plan,
    Sets,
    StepOptions,
    TokensPerS,
    numbers,
    require_speed,
    words,
)
from covray.cli.output import console, escape, print_values
from covray.config import TrainConfig
from covray.config.train import weighted_path
from covray.errors import ConfigError

if TYPE_CHECKING:
    from covray.training.memory import TrainPlan
    from covray.training.records import TrainResult


TRAIN = StepOptions(TrainConfig)


def _weighted(entry: str) -> tuple[str, float]:
    """Return the path and the weight of a dataset; a folder here of that very name is itself."""
    path, weight = weighted_path(entry)
    is_folder = path != entry and Path(entry).exists()  # an address is not asked for: a command is only parsed here
    return (entry, 1.0) if is_folder else (path, weight)


def _first_path(option: str, entries: list[str]) -> str:
    """Read the path of the first dataset."""
    return _weighted(entries[0])[0]


def _mixture(entries: list[str] | None) -> dict[str, Any]:
    """Return the keys beside ``data`` that ``--data`` sets."""
    if not entries:
        return {}
    mix = [f"{path}={weight!r}" for path, weight in map(_weighted, entries[1:])]
    return {"data_weight": _weighted(entries[0])[1], "mix": mix}


def train(
    context: typer.Context,
    scale: Annotated[str | None, TRAIN.option("--scale", "backbone.scale", metavar="nano|...|7b")] = None,
    data: Annotated[
        list[str] | None,
        TRAIN.option(
            "--data",
            "data",
            read=_first_path,
            metavar="CHAINS[=WEIGHT]",
            text="Dataset of chains: the --out of a covray build. Give several to train on all, each with a weight: "
            "how often its pairs are queries in an epoch, by default 1.",
        ),
    ] = None,
    out: Annotated[str | None, TRAIN.option("--out", "out")] = None,
    length: Annotated[
        str | None, TRAIN.option("--length", "sentences.lengths", read=numbers, metavar="4,6,...")
    ] = None,
    example_pairs: Annotated[
        str | None, TRAIN.option("--example-pairs", "sentences.pairs", read=numbers, metavar="1,2,...")
    ] = None,
    method: Annotated[str | None, TRAIN.option("--method", "sentences.method", metavar="diffusion|linear|none")] = None,
    backbone: Annotated[str | None, TRAIN.option("--backbone", "backbone.path")] = None,
    init: Annotated[str | None, TRAIN.option("--init", "backbone.init", metavar="pretrained|random")] = None,
    workers: Annotated[int | None, TRAIN.option("--workers", "workers.count", min=1)] = None,
    epochs: Annotated[float | None, TRAIN.option("--epochs", "optimizer.epochs")] = None,
    steps: Annotated[int | None, TRAIN.option("--steps", "optimizer.steps", min=1)] = None,
    deepspeed: Annotated[str | None, TRAIN.option("--deepspeed", "compute.deepspeed")] = None,
    track: Annotated[str | None, TRAIN.option("--track", "tracking.to", read=words, metavar="NAME,...")] = None,
    tracking_uri: Annotated[str | None, TRAIN.option("--tracking-uri", "tracking.uri")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, TRAIN.option("--seed", "seed", min=0)] = None,
    plan: Plan = False,
    tokens_per_s: TokensPerS = None,
    json_: Json = False,
) -> None:
    """Teach an adapter to think in chains. Run the same command again to resume after any interruption."""
    resolved = TRAIN.resolve(context, **_mixture(data)).with_defaults_of_scale()
    require_speed(tokens_per_s, plan)
    if plan:
        from covray.distributed.train_checks import plan_train

        _print_plan(plan_train(resolved, tokens_per_s), json_)
        return
    from covray.distributed.train import train as run_training

    result = run_training(resolved)
    if json_:
        print(json.dumps(result.to_json()))
    else:
        print_training(result, resolved.out)


def _print_plan(planned: TrainPlan, json_: bool) -> None:
    """Print the figures of a plan, and the memory of a worker by ZeRO stage."""
    values = {key: value for key, value in asdict(planned).items() if value is not None}
    memory = values.pop("memory")
    if json_:
        # asdict leaves out the total, which is a property.
        totals = [part | {"total": figure.total} for part, figure in zip(memory, planned.memory, strict=True)]
        print(json.dumps(values | {"trainable_share": planned.trainable_share, "memory": totals}))
        return
    shown = {}
    for key, value in values.items():
        shown[key] = f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"
    shown["trainable"] += f" ({planned.trainable_share:.2%})"
    print_values(shown, False)
    table = Table("GiB a worker", "weights", "adapter", "activations", "working", "total", box=None, pad_edge=False)
    for part in planned.memory:
        name = f"ZeRO {part.stage}"
        if part.recompute:
            name += ", recompute"
        figures = (part.weights, part.adapter, part.activations, part.working, part.total)
        table.add_row(name, *(f"{figure / 2**30:.2f}" for figure in figures))
    console.print(table)


def print_training(result: TrainResult, out: str) -> None:
    """Print what a training reached, and warn if no step was better than its start."""
    print_losses(result, "tokens/s")
    # A run without a validation split has neither figure, and no warning.
    if (result.validation_loss or 0.0) > (result.validation_loss_before or 0.0):
        console.print(
            "[yellow]no step was better on the validation split than what training began with[/yellow]: lower "
            "optimizer.learning_rate, or train on more pairs",
            soft_wrap=True,
        )
    where = escape(out.rstrip("/"))
    console.print(f"adapter in {where}/adapter (PEFT)", highlight=False, soft_wrap=True)
    console.print(f"next: covray export {where} --merge --out {where}/merged", highlight=False, soft_wrap=True)


def print_losses(result: TrainResult, rate: str) -> None:
    """Print steps, losses and speed of a training; ``rate`` is what its tokens a second are called."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("steps", f"{result.steps:,}")
    table.add_row("loss", f"{result.loss:.4f}")
    # Absent without a validation split.
    if result.validation_loss is not None:
        table.add_row("validation loss", f"{result.validation_loss_before:.4f} -> {result.validation_loss:.4f}")
    if result.answer_perplexity is not None:
        table.add_row("answer perplexity", f"{result.answer_perplexity_before:.4f} -> {result.answer_perplexity:.4f}")
    table.add_row(rate, f"{result.tokens_per_s:,.0f}")
    console.print(table)


def export(
    source: Annotated[str, typer.Argument(help="Run folder of a covray train, or dataset folder of a covray build.")],
    out: OutFolder,
    merge: Annotated[bool, typer.Option("--merge", help="Backbone and adapter as one Hugging Face folder.")] = False,
    form: Annotated[
        str | None, typer.Option("--as", metavar="datasets|webdataset|mds", help="Format that chains are written in.")
    ] = None,
    licence: Annotated[str | None, typer.Option("--licence", help="Licence that the card names.")] = None,
    scores: Annotated[
        str | None, typer.Option("--scores", help="Evaluation of the run, whose table and pictures the card shows.")
    ] = None,
) -> None:
    """A run's adapter (PEFT), alone or merged into its backbone; or chains in the format of another loader."""
    if form is None:
        from covray.sharing.runs import export_run_with_card

        export_run_with_card(source, out, merge, licence, scores)
    else:
        from covray.sharing.formats import export_chains

        if merge or scores is not None:
            option = "--merge" if merge else "--scores"
            raise ConfigError(f"{option}: is for a run; leave out --as, or {option}")
        export_chains(source, out, form, licence)
    console.print(escape(out), highlight=False, soft_wrap=True)
