"""Build chains of tokens, look at them, and describe their dataset."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from covray.cli.options import ConfigFile, Json, Plan, Sets, StepOptions, numbers, require_folder_name, words
from covray.cli.output import console, escape, print_values
from covray.config import BuildConfig
from covray.errors import ConfigError

if TYPE_CHECKING:
    from covray.chains.records import Audit

BUILD = StepOptions(BuildConfig)


def build(
    context: typer.Context,
    manifest: Annotated[str | None, BUILD.option("--manifest", "pairs")] = None,
    out: Annotated[str | None, BUILD.option("--out", "out")] = None,
    length: Annotated[str | None, BUILD.option("--length", "lengths", read=numbers, metavar="4,8,...")] = None,
    method: Annotated[str | None, BUILD.option("--method", "methods", read=words, metavar="diffusion,linear")] = None,
    prior: Annotated[str | None, BUILD.option("--prior", "prior.path")] = None,
    tokenizer: Annotated[str | None, BUILD.option("--tokenizer", "tokenizer.path")] = None,
    actors: Annotated[
        int | None,
        BUILD.option("--actors", "actors.min", "actors.max", min=1, text="Size of the pool; by default what fits."),
    ] = None,
    keep_noise: Annotated[bool | None, BUILD.option("--keep-noise", "keep_noise")] = None,
    noise_from: Annotated[str | None, BUILD.option("--noise-from", "noise_from")] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add the pairs of a larger manifest to a finished dataset.")
    ] = False,
    track: Annotated[str | None, BUILD.option("--track", "tracking.to", read=words, metavar="NAME,...")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    plan: Plan = False,
    json_: Json = False,
) -> None:
    """Turn pairs into chains of tokens. Run the same command again to resume after any interruption."""
    resolved = BUILD.resolve(context)
    from covray.distributed import build as building

    if plan:
        planned = building.plan_build(resolved, append)
        print_values(planned.__dict__, json_)
        return
    audit = building.build(resolved, append=append)
    if json_:
        print(json.dumps(audit.to_json()))
    else:
        _print_audit(audit, resolved.out)


def _print_audit(audit: Audit, out: str) -> None:
    """Print what a build wrote and rejected of each task, and how fast it was."""
    table = Table("task", "written", "rejected", "reasons", box=None, pad_edge=False)
    for task, counts in audit.per_task.items():
        reasons = ", ".join(f"{reason} {number}" for reason, number in counts.reasons.items())
        table.add_row(task, str(counts.written), str(counts.rejected), escape(reasons))
    console.print(table)
    # A build that found nothing left to do measured no speed.
    facts = [f"{audit.written} chains in {escape(out)}"]
    if audit.chains_per_s:
        facts.append(f"{audit.chains_per_s:.2f} chains/s by {audit.actors} actors")
    if audit.busy_share:
        facts.append(f"busy {audit.busy_share:.0%} of their time")
    console.print(", ".join(facts), highlight=False, soft_wrap=True)
    console.print(f"next: covray view {escape(out)}", soft_wrap=True)


def view(
    dataset: Annotated[str, typer.Argument(help="Dataset folder, finished or not; or a manifest of pairs.")],
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            help="Folder to write; by default DATASET/view, of a manifest MANIFEST-view.",
            callback=require_folder_name,
        ),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Chains or pairs shown of every task.")] = 12,
    pair: Annotated[
        list[int] | None,
        typer.Option("--pair", help="Show this pair of a dataset; repeatable.", metavar="ID"),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Write nothing, and serve the page until Ctrl-C, live while a build runs.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of --serve; 0 takes a free one.")] = 8033,
    json_: Json = False,
) -> None:
    """Look at a dataset: a page that lists its pairs, with sheets of chains; or at a manifest, before a build."""
    from covray.report.pairs_sheet import is_manifest, view_pairs

    if serve:
        _serve_view(dataset, out, port, pair or [], json_)
        return
    # Told by what is there, not by the name: both can be folders.
    if is_manifest(dataset):
        if pair:
            raise ConfigError(f"--pair: {dataset} is a manifest; give a dataset of covray build, or leave it out")
        paths = view_pairs(dataset, out or f"{dataset.rstrip('/').removesuffix('.parquet')}-view", limit)
    else:
        from covray.report.dataset import view as write_view

        paths = write_view(dataset, out or f"{dataset.rstrip('/')}/view", limit_per_task=limit, pair_ids=pair or [])
    if json_:
        print(json.dumps({"written": paths}))
        return
    for path in paths:
        console.print(escape(path), highlight=False, soft_wrap=True)


def _serve_view(dataset: str, out: str | None, port: int, pair_ids: list[int], json_: bool) -> None:
    """Serve the page of a dataset until Ctrl-C; the address that is printed selects the pair of ``pair_ids``."""
    from covray.report.dataset_server import serve_dataset

    if out is not None:
        raise ConfigError("--out and --serve: --serve writes nothing; leave one out")
    if len(pair_ids) > 1:
        raise ConfigError("--pair and --serve: the served page shows every pair; give one --pair to begin with")

    def ready(address: str) -> None:
        address += f"#id={pair_ids[0]}" if pair_ids else ""
        if json_:
            # Flushed: the program that reads this waits for it, and the server goes on for ever.
            print(json.dumps({"address": address}), flush=True)
        else:
            console.print(f"{address}  (Ctrl-C ends it)", highlight=False, soft_wrap=True)

    serve_dataset(dataset, port, ready)


def inspect(dataset: Annotated[str, typer.Argument(help="Dataset folder.")], json_: Json = False) -> None:
    """Schema, counts, fingerprints and configuration of a dataset."""
    from covray.report.summary import describe, print_description

    description = describe(dataset)
    if json_:
        print(json.dumps(description.to_json()))
    else:
        print_description(description, console)
