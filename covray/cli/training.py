"""Train an adapter and export it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from covray.cli.options import ConfigFile, Json, Out, Sets, numbers, require_speed, resolve
from covray.cli.output import console, escape, print_values

if TYPE_CHECKING:
    from covray.training.memory import TrainPlan


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
        "sentences.lengths": numbers("--length", length),
        "sentences.pairs": numbers("--pairs", pairs),
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
    resolved = resolve(TrainConfig, config, options, sets)
    require_speed(tokens_per_s, plan)
    if plan:
        from covray.training.memory import plan as plan_training

        _print_plan(plan_training(resolved, tokens_per_s), json_)
        return
    from covray.distributed.train import train as run_training

    result = run_training(resolved)
    if json_:
        print(json.dumps(result))
    else:
        print_training(result, resolved.out)


def _print_plan(planned: TrainPlan, json_: bool) -> None:
    values = {key: value for key, value in asdict(planned).items() if value is not None}
    memory = values.pop("memory")
    if json_:
        totals = [part | {"total": figure.total} for part, figure in zip(memory, planned.memory, strict=True)]
        print(json.dumps(values | {"trainable_share": planned.trainable_share, "memory": totals}))
        return
    shown = {key: f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" for key, value in values.items()}
    shown["trainable"] += f" ({planned.trainable_share:.2%})"
    print_values(shown, False)
    table = Table("GiB a worker", "weights", "adapter", "activations", "working", "total", box=None, pad_edge=False)
    for part in planned.memory:
        name = f"ZeRO {part.stage}{', recompute' if part.recompute else ''}"
        figures = (part.weights, part.adapter, part.activations, part.working, part.total)
        table.add_row(name, *(f"{figure / 2**30:.2f}" for figure in figures))
    console.print(table)


def print_training(result: dict[str, Any], out: str) -> None:
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
    where = escape(out.rstrip("/"))
    console.print(f"adapter in {where}/adapter (PEFT)", highlight=False, soft_wrap=True)
    console.print(f"next: covray export {where} --merge --out {where}/merged", highlight=False, soft_wrap=True)


def export(
    run: Annotated[str, typer.Argument(help="Run folder of a covray train.")],
    out: Out,
    merge: Annotated[bool, typer.Option("--merge", help="Backbone and adapter as one Hugging Face folder.")] = False,
) -> None:
    """The adapter alone (PEFT), or merged into its backbone, as a plain Hugging Face folder."""
    from covray.models.lvm.adapter import export_run

    export_run(run, out, merge)
    console.print(escape(out), highlight=False, soft_wrap=True)
