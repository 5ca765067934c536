"""Answer queries with a model, and score models."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from covray.cli.options import ConfigFile, Json, Sets, StepOptions, words
from covray.cli.output import console, escape
from covray.cli.results import print_evaluation
from covray.config import EvaluateConfig, GenerateConfig
from covray.config.reference import key_text
from covray.errors import ConfigError

GENERATE = StepOptions(GenerateConfig)
EVALUATE = StepOptions(EvaluateConfig)

_OWN_SCALE = {"backbone.scale": "custom"}
"""A backbone given by its folder has the sizes that the folder says."""


def generate(
    context: typer.Context,
    query: Annotated[
        list[str] | None, GENERATE.option("--query", "queries", text="Picture to answer; repeatable.", metavar="IMAGE")
    ] = None,
    example: Annotated[
        list[str] | None,
        typer.Option(metavar="IMAGE LABEL", help="Image and its label, an example chain; repeatable."),
    ] = None,
    labels: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    out: Annotated[str | None, GENERATE.option("--out", "out")] = None,
    adapter: Annotated[str | None, GENERATE.option("--adapter", "adapter", metavar="RUN")] = None,
    task: Annotated[str | None, GENERATE.option("--task", "task")] = None,
    backbone: Annotated[str | None, GENERATE.option("--backbone", "backbone.path", also=_OWN_SCALE)] = None,
    tokenizer: Annotated[str | None, GENERATE.option("--tokenizer", "tokenizer.path")] = None,
    prior: Annotated[str | None, GENERATE.option("--prior", "prior.path")] = None,
    length: Annotated[int | None, GENERATE.option("--length", "length")] = None,
    method: Annotated[str | None, GENERATE.option("--method", "method", metavar="diffusion|linear|none")] = None,
    temperature: Annotated[float | None, GENERATE.option("--temperature", "sampling.temperature")] = None,
    top_k: Annotated[int | None, GENERATE.option("--top-k", "sampling.top_k")] = None,
    top_p: Annotated[float | None, GENERATE.option("--top-p", "sampling.top_p")] = None,
    best_of: Annotated[int | None, GENERATE.option("--best-of", "sampling.best_of")] = None,
    vote: Annotated[int | None, GENERATE.option("--vote", "sampling.vote")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, GENERATE.option("--seed", "seed", min=0)] = None,
    json_: Json = False,
) -> None:
    """Example chains and query pictures in; frames, then the answer, out."""
    # An option takes one value: the labels, which follow their images, arrive as arguments.
    examples, answers = example or [], labels or []
    if len(examples) != len(answers):
        raise ConfigError(
            f"--example: {len(examples)} images and {len(answers)} labels; write --example IMAGE LABEL, once for each "
            "pair, and --query IMAGE, once for each query"
        )
    resolved = GENERATE.resolve(context, examples=list(zip(examples, answers, strict=True)) or None)
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
    context: typer.Context,
    data: Annotated[str | None, EVALUATE.option("--data", "data")] = None,
    adapter: Annotated[
        list[str] | None,
        EVALUATE.option(
            "--adapter", "adapters", text="Finished run of covray train, or NAME=RUN; repeatable.", metavar="RUN"
        ),
    ] = None,
    out: Annotated[str | None, EVALUATE.option("--out", "out")] = None,
    task: Annotated[str | None, EVALUATE.option("--task", "tasks", read=words, metavar="TASK,...")] = None,
    split: Annotated[str | None, EVALUATE.option("--split", "split")] = None,
    episodes: Annotated[int | None, EVALUATE.option("--episodes", "episodes")] = None,
    example_pairs: Annotated[int | None, EVALUATE.option("--example-pairs", "pairs")] = None,
    selection: Annotated[
        str | None, EVALUATE.option("--selection", "selection", metavar="random|similar|focus")
    ] = None,
    baselines: Annotated[str | None, EVALUATE.option("--baselines", "baselines", read=words)] = None,
    manifest: Annotated[str | None, EVALUATE.option("--manifest", "manifest")] = None,
    backbone: Annotated[
        str | None,
        EVALUATE.option("--backbone", "backbone.path", also=_OWN_SCALE, text=key_text(EvaluateConfig, "backbone")),
    ] = None,
    metrics: Annotated[str | None, EVALUATE.option("--metrics", "metrics", read=words, metavar="TASK/NAME,...")] = None,
    temperature: Annotated[float | None, EVALUATE.option("--temperature", "sampling.temperature")] = None,
    best_of: Annotated[int | None, EVALUATE.option("--best-of", "sampling.best_of")] = None,
    vote: Annotated[int | None, EVALUATE.option("--vote", "sampling.vote")] = None,
    track: Annotated[str | None, EVALUATE.option("--track", "tracking.to", read=words, metavar="NAME,...")] = None,
    tracking_uri: Annotated[str | None, EVALUATE.option("--tracking-uri", "tracking.uri")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, EVALUATE.option("--seed", "seed", min=0)] = None,
    json_: Json = False,
) -> None:
    """Score adapters, their backbone and baselines on the same queries.

    Run the same command again to resume after any interruption.
    """
    resolved = EVALUATE.resolve(context)
    from covray.distributed.evaluate import evaluate as run_evaluation

    results = run_evaluation(resolved)
    if json_:
        print(json.dumps(results.to_json()))
    else:
        print_evaluation(results, resolved.out)
