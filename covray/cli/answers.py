"""Answer queries with a model, and score models."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from covray.cli.options import ConfigFile, Json, Sets, Tasks, given, resolve, split_commas
from covray.cli.output import console, escape
from covray.cli.results import print_evaluation
from covray.errors import ConfigError


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
    vote: Annotated[int | None, typer.Option(help="Candidates a query, which are joined into one answer.")] = None,
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
        "sampling.vote": vote,
        "seed": seed,
    }
    resolved = load_config(GenerateConfig, config, given(options), sets or ())
    from covray.generation.files import generate as run_generation

    record = run_generation(resolved)
    if json_:
        print(json.dumps(record.to_json()))
        return
    if resolved.adapter is None:
        console.print("no --adapter: these are answers of the untuned backbone", highlight=False)
    for answer in record.answers:
        for file in answer.files:
            where = escape(f"{resolved.out.rstrip('/')}/{answer.folder}/{file}")
            console.print(where, highlight=False, soft_wrap=True)


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
    vote: Annotated[int | None, typer.Option(help="Candidates a query, which are joined into one answer.")] = None,
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
        "tasks": split_commas(tasks),
        "split": split,
        "episodes": episodes,
        "pairs": pairs,
        "selection": selection,
        "baselines": split_commas(baselines),
        "manifest": manifest,
        "backbone.path": backbone,
        "backbone.scale": "custom" if backbone else None,
        "sampling.temperature": temperature,
        "sampling.best_of": best_of,
        "sampling.vote": vote,
        "tracking.uri": tracking_uri,
        "seed": seed,
    }
    resolved = resolve(EvaluateConfig, config, options, sets)
    from covray.distributed.evaluate import evaluate as run_evaluation

    results = run_evaluation(resolved)
    if json_:
        print(json.dumps(results))
    else:
        print_evaluation(results, resolved.out)
