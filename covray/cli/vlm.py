"""Vision-language models of transformers: train, convert, generate, evaluate, compare."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from covray.cli.options import ConfigFile, Json, OutFolder, Sets, StepOptions, words
from covray.cli.output import console, escape, print_values
from covray.cli.training import print_losses
from covray.config.reference import key_text
from covray.config.vlm import VlmEvaluateConfig, VlmGenerateConfig, VlmModelConfig, VlmTrainConfig

if TYPE_CHECKING:
    from covray.evaluation.records import VlmEvaluationResults
    from covray.evaluation.statistics import Mean

TRAIN = StepOptions(VlmTrainConfig)
GENERATE = StepOptions(VlmGenerateConfig)
EVALUATE = StepOptions(VlmEvaluateConfig)


def train(
    context: typer.Context,
    data: Annotated[str | None, TRAIN.option("--data", "data")] = None,
    model: Annotated[str | None, TRAIN.option("--model", "model")] = None,
    out: Annotated[str | None, TRAIN.option("--out", "out")] = None,
    objective: Annotated[
        str | None, TRAIN.option("--objective", "objective", metavar="autoregressive|block_diffusion")
    ] = None,
    preset: Annotated[str | None, TRAIN.option("--preset", "blocks.preset", metavar="default|diffusionvl")] = None,
    trained: Annotated[str | None, TRAIN.option("--train", "train", metavar="lora|language|full")] = None,
    workers: Annotated[int | None, TRAIN.option("--workers", "workers.count", min=1)] = None,
    epochs: Annotated[float | None, TRAIN.option("--epochs", "optimizer.epochs")] = None,
    steps: Annotated[int | None, TRAIN.option("--steps", "optimizer.steps", min=1)] = None,
    deepspeed: Annotated[str | None, TRAIN.option("--deepspeed", "compute.deepspeed")] = None,
    track: Annotated[str | None, TRAIN.option("--track", "tracking.to", read=words, metavar="NAME,...")] = None,
    tracking_uri: Annotated[str | None, TRAIN.option("--tracking-uri", "tracking.uri")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, TRAIN.option("--seed", "seed", min=0)] = None,
    json_: Json = False,
) -> None:
    """Teach a vision-language model captions and answers, token by token or in blocks.

    Run the same command again to resume after any interruption.
    """
    resolved = TRAIN.resolve(context)
    from covray.distributed.train_vlm import train_vlm

    result = train_vlm(resolved)
    if json_:
        print(json.dumps(result.to_json()))
        return
    print_losses(result, "answer tokens/s")
    where = escape(resolved.out.rstrip("/"))
    ask = f"next: covray vlm generate --run {where} --image IMAGE --prompt TEXT"
    console.print(ask, highlight=False, soft_wrap=True)


def convert(
    source: Annotated[str, typer.Argument(help="Folder of a LLaVA, Qwen2-VL or Qwen2.5-VL, or a hub id.")],
    out: OutFolder,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of a hub id.")] = None,
    mask_id: Annotated[int | None, typer.Option(min=0, help=key_text(VlmTrainConfig, "mask_id"))] = None,
    json_: Json = False,
) -> None:
    """An autoregressive checkpoint gets a mask token, to be trained for block diffusion; its answers stay the same."""
    from covray.models.vlm.convert import convert_vlm

    print_values(convert_vlm(VlmModelConfig(path=source, revision=revision, mask_id=mask_id), out), json_)


def generate(
    context: typer.Context,
    prompt: Annotated[str | None, GENERATE.option("--prompt", "prompt")] = None,
    image: Annotated[
        list[str] | None, GENERATE.option("--image", "images", text="Picture to show; repeatable.", metavar="IMAGE")
    ] = None,
    run: Annotated[str | None, GENERATE.option("--run", "run")] = None,
    model: Annotated[str | None, GENERATE.option("--model", "model", text="Checkpoint to ask.")] = None,
    decoder: Annotated[
        str | None,
        GENERATE.option("--decoder", "decoding.decoder", metavar="autoregressive|block_diffusion|speculative"),
    ] = None,
    passes: Annotated[int | None, GENERATE.option("--passes", "decoding.passes", min=1)] = None,
    max_tokens: Annotated[int | None, GENERATE.option("--max-tokens", "decoding.max_tokens", min=1)] = None,
    temperature: Annotated[float | None, GENERATE.option("--temperature", "decoding.temperature")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, GENERATE.option("--seed", "decoding.seed", min=0)] = None,
    json_: Json = False,
) -> None:
    """Pictures and text in, text out, printed as it is written."""
    resolved = GENERATE.resolve(context)
    from covray.generation.vision_text import stream_answer

    parts = []
    for part in stream_answer(resolved):
        parts.append(part)
        # JSON is one object, which waits for the end.
        if not json_:
            print(part, end="", flush=True)
    print(json.dumps({"prompt": resolved.prompt, "answer": "".join(parts)}) if json_ else "")


def evaluate(
    context: typer.Context,
    data: Annotated[str | None, EVALUATE.option("--data", "data")] = None,
    run: Annotated[str | None, EVALUATE.option("--run", "run")] = None,
    model: Annotated[str | None, EVALUATE.option("--model", "model", text="Checkpoint to score.")] = None,
    out: Annotated[str | None, EVALUATE.option("--out", "out")] = None,
    split: Annotated[str | None, EVALUATE.option("--split", "split")] = None,
    samples: Annotated[int | None, EVALUATE.option("--samples", "samples", min=1)] = None,
    decoder: Annotated[
        str | None,
        EVALUATE.option("--decoder", "decoding.decoder", metavar="autoregressive|block_diffusion|speculative"),
    ] = None,
    passes: Annotated[int | None, EVALUATE.option("--passes", "decoding.passes", min=1)] = None,
    tracking_uri: Annotated[str | None, EVALUATE.option("--tracking-uri", "tracking.uri")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, EVALUATE.option("--seed", "decoding.seed", min=0)] = None,
    json_: Json = False,
) -> None:
    """Score captions by their facts and answers by their accuracy. Run the same command again to resume."""
    resolved = EVALUATE.resolve(context)
    from covray.distributed.evaluate_vlm import evaluate_vlm

    results = evaluate_vlm(resolved)
    if json_:
        print(json.dumps(results.to_json()))
    else:
        print_scores(results)


def print_scores(results: VlmEvaluationResults) -> None:
    """Print the scores of an evaluation. Kinds of questions are texts of the data, and are printed as they are."""
    table = Table("", "mean", "95% interval", "prompts", "most frequent answer", box=None, pad_edge=False)
    _add_row(table, "questions", results.questions)
    for kind, accuracy in results.questions_by_kind.items():
        _add_row(table, f"  {escape(kind)}", accuracy, f"{accuracy.most_frequent:.3f}")
    _add_row(table, "facts of captions", results.facts)
    for theme, mean in results.facts_by_theme.items():
        _add_row(table, f"  {escape(theme)}", mean)
    _add_row(table, "captions with all facts", results.captions_with_all_facts)
    _add_row(table, "chrF++ of captions", results.chrf)
    console.print(table)
    for key in ("bleu", "answer_perplexity", "tokens_per_s", "tokens_per_pass"):
        figure = getattr(results, key)
        if figure is not None:
            console.print(f"{key.replace('_', ' ')} {figure:.3f}", highlight=False)
    for name, reason in results.absent.items():
        console.print(f"[yellow]note:[/yellow] no {name}: {escape(reason)}", highlight=False, soft_wrap=True)


def compare(
    first: Annotated[str, typer.Argument(help="Finished covray vlm evaluate.")],
    second: Annotated[str, typer.Argument(help="Another one, of the same prompts.")],
    json_: Json = False,
) -> None:
    """Differences of two evaluations over the same prompts, first less second, with 95% intervals and p values."""
    from covray.evaluation.vision_text import compare_evaluations

    differences = compare_evaluations(first, second)
    if json_:
        values = {}
        for name, difference in differences.items():
            values[name] = None if difference is None else asdict(difference)
        print(json.dumps(values))
        return
    table = Table("first less second", "mean", "95% interval", "p", "prompts", box=None, pad_edge=False)
    for name, difference in differences.items():
        if difference is not None:
            interval = _interval(difference)
            mean, p_value = f"{difference.mean:+.3f}", f"{difference.p_value:.4f}"
            table.add_row(name.replace("_", " "), mean, interval, p_value, f"{difference.episodes:,}")
    console.print(table)


def _add_row(table: Table, name: str, mean: Mean | None, frequent: str = "") -> None:
    if mean is not None:
        table.add_row(name, f"{mean.mean:.3f}", _interval(mean), f"{mean.episodes:,}", frequent)


def _interval(mean: Mean) -> str:
    return "" if mean.low is None else f"{mean.low:.3f} to {mean.high:.3f}"
