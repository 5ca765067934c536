"""ThinkDiff: features of a vision-language model, an aligner, and pictures of what the model thought."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from covray.cli.options import ConfigFile, Json, OutFolder, Plan, Sets, StepOptions, numbers, words
from covray.cli.output import console, escape, print_values
from covray.cli.training import print_losses
from covray.config.think import ThinkEvaluateConfig, ThinkFeaturesConfig, ThinkGenerateConfig, ThinkTrainConfig
from covray.errors import ConfigError

if TYPE_CHECKING:
    from covray.thinking.records import ReasoningResults

FEATURES = StepOptions(ThinkFeaturesConfig)
TRAIN = StepOptions(ThinkTrainConfig)
GENERATE = StepOptions(ThinkGenerateConfig)
EVALUATE = StepOptions(ThinkEvaluateConfig)


def features(
    context: typer.Context,
    data: Annotated[str | None, FEATURES.option("--data", "data")] = None,
    vlm: Annotated[str | None, FEATURES.option("--vlm", "vlm.path")] = None,
    out: Annotated[str | None, FEATURES.option("--out", "out")] = None,
    variant: Annotated[str | None, FEATURES.option("--variant", "variant", metavar="lvlm|clip")] = None,
    places: Annotated[str | None, FEATURES.option("--places", "places", metavar="text|prompt")] = None,
    of: Annotated[str | None, FEATURES.option("--of", "of", metavar="pictures|episodes")] = None,
    cobsat: Annotated[str | None, FEATURES.option("--cobsat", "cobsat")] = None,
    shots: Annotated[str | None, FEATURES.option("--shots", "episodes.shots", read=numbers, metavar="2,4")] = None,
    episodes: Annotated[int | None, FEATURES.option("--episodes", "episodes.count", min=1)] = None,
    max_tokens: Annotated[int | None, FEATURES.option("--max-tokens", "thought.max_tokens", min=1)] = None,
    samples: Annotated[int | None, FEATURES.option("--samples", "samples", min=1)] = None,
    actors: Annotated[
        int | None,
        FEATURES.option("--actors", "actors.min", "actors.max", min=1, text="Size of the pool; by default what fits."),
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    plan: Plan = False,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, help="With --plan: pictures, in place of those of the data.")
    ] = None,
    per_s: Annotated[
        float | None, typer.Option("--per-s", help="With --plan: pictures a second of all actors, for the hours.")
    ] = None,
    json_: Json = False,
) -> None:
    """Take the features that an aligner reads. Run the same command again to resume after any interruption."""
    resolved = FEATURES.resolve(context)
    if not plan and (rows is not None or per_s is not None):
        raise ConfigError("--rows, --per-s: are for --plan; give it too")
    if per_s is not None and not 1e-6 <= per_s <= 1e12:  # false for NaN too
        raise ConfigError(f"--per-s {per_s:g}: must be a number above 0; covray think features prints it")
    if plan:
        from covray.thinking.plan import plan_features

        print_values(_rounded(asdict(plan_features(resolved, rows, per_s))), json_)
        return
    from covray.distributed.features import take_features

    result = take_features(resolved).to_json()
    if json_:
        print(json.dumps(result))
        return
    # The version is of the file, and says nothing of the features.
    shown = {key: value for key, value in result.items() if key != "version"}
    print_values(shown, False)
    where = escape(resolved.out.rstrip("/"))
    following = f"train --data {where} --language-model T5 --out RUN"
    if resolved.of == "episodes":
        following = f"evaluate --features {where} --aligner RUN --painter PAINTER --out EVAL"
    console.print(f"next: covray think {following}", highlight=False, soft_wrap=True)


def train(
    context: typer.Context,
    data: Annotated[str | None, TRAIN.option("--data", "data")] = None,
    language_model: Annotated[str | None, TRAIN.option("--language-model", "language_model.path")] = None,
    out: Annotated[str | None, TRAIN.option("--out", "out")] = None,
    norm: Annotated[str | None, TRAIN.option("--norm", "aligner.norm", metavar="encoder|ones|none")] = None,
    split: Annotated[str | None, TRAIN.option("--split", "split.mode", metavar="prefix|tokens|none")] = None,
    steps: Annotated[int | None, TRAIN.option("--steps", "optimizer.steps", min=1)] = None,
    workers: Annotated[int | None, TRAIN.option("--workers", "workers.count", min=1)] = None,
    tracking_uri: Annotated[str | None, TRAIN.option("--tracking-uri", "tracking.uri")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, TRAIN.option("--seed", "optimizer.seed", min=0)] = None,
    plan: Plan = False,
    json_: Json = False,
) -> None:
    """Train an aligner through a frozen language decoder, on captions only.

    Run the same command again to resume after any interruption.
    """
    resolved = TRAIN.resolve(context)
    if plan:
        from covray.distributed.train_aligner import plan_train

        print_values(_rounded(asdict(plan_train(resolved))), json_)
        return
    from covray.distributed.train_aligner import train_aligner

    result = train_aligner(resolved)
    if json_:
        print(json.dumps(result.to_json()))
        return
    print_losses(result, "tokens/s")
    where = escape(resolved.out.rstrip("/"))
    console.print(f"aligner in {where}/adapter", highlight=False, soft_wrap=True)
    options = "--kind unet --painter PRIOR --image IMAGE --prompt TEXT --out ANSWER"
    console.print(f"next: covray think generate --run {where} {options}", highlight=False, soft_wrap=True)


def generate(
    context: typer.Context,
    run: Annotated[str | None, GENERATE.option("--run", "run")] = None,
    painter: Annotated[
        str | None, GENERATE.option("--painter", "painter.path", text="Model that draws: a folder, or a hub id.")
    ] = None,
    kind: Annotated[
        str | None, GENERATE.option("--kind", "painter.kind", metavar="unet|flux|sd3|pixart|cogvideox")
    ] = None,
    image: Annotated[
        list[str] | None, GENERATE.option("--image", "images", text="Picture to show; repeatable.", metavar="IMAGE")
    ] = None,
    word: Annotated[
        list[str] | None,
        GENERATE.option("--word", "words", text="Word of a picture, and one more to ask for; repeatable."),
    ] = None,
    prompt: Annotated[str | None, GENERATE.option("--prompt", "prompt")] = None,
    route: Annotated[str | None, GENERATE.option("--route", "route", metavar="aligned|text")] = None,
    out: Annotated[str | None, GENERATE.option("--out", "out")] = None,
    vlm: Annotated[str | None, GENERATE.option("--vlm", "vlm.path")] = None,
    language_model: Annotated[str | None, GENERATE.option("--language-model", "language_model.path")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, GENERATE.option("--seed", "painter.seed", min=0)] = None,
    json_: Json = False,
) -> None:
    """Pictures and words in; the model's text, and a picture of what it thought, out."""
    resolved = GENERATE.resolve(context)
    from covray.thinking.answering import generate as run_generate

    answer = run_generate(resolved).to_json()
    if json_:
        print(json.dumps(answer))
        return
    if answer["text"] is not None:
        console.print(escape(answer["text"]), highlight=False, soft_wrap=True)
    for name in answer["files"]:
        console.print(escape(f"{resolved.out.rstrip('/')}/{name}"), highlight=False, soft_wrap=True)


def evaluate(
    context: typer.Context,
    aligner: Annotated[
        list[str] | None,
        EVALUATE.option(
            "--aligner", "aligners", text="Finished run or folder of an aligner, NAME=RUN; repeatable.", metavar="RUN"
        ),
    ] = None,
    painter: Annotated[
        str | None, EVALUATE.option("--painter", "painter.path", text="Model that draws: a folder, or a hub id.")
    ] = None,
    kind: Annotated[
        str | None, EVALUATE.option("--kind", "painter.kind", metavar="unet|flux|sd3|pixart|cogvideox")
    ] = None,
    rows: Annotated[
        str | None,
        EVALUATE.option("--rows", "rows", read=words, metavar="truth,caption,text,bridge,untrained,copy"),
    ] = None,
    cobsat: Annotated[str | None, EVALUATE.option("--cobsat", "cobsat")] = None,
    shots: Annotated[str | None, EVALUATE.option("--shots", "episodes.shots", read=numbers, metavar="2,4")] = None,
    episodes: Annotated[int | None, EVALUATE.option("--episodes", "episodes.count", min=1)] = None,
    features: Annotated[str | None, EVALUATE.option("--features", "features")] = None,
    judge: Annotated[str | None, EVALUATE.option("--judge", "judge.path")] = None,
    out: Annotated[str | None, EVALUATE.option("--out", "out")] = None,
    vlm: Annotated[str | None, EVALUATE.option("--vlm", "vlm.path")] = None,
    language_model: Annotated[str | None, EVALUATE.option("--language-model", "language_model.path")] = None,
    actors: Annotated[
        int | None,
        EVALUATE.option("--actors", "actors.min", "actors.max", min=1, text="Size of the pool; by default what fits."),
    ] = None,
    tracking_uri: Annotated[str | None, EVALUATE.option("--tracking-uri", "tracking.uri")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    seed: Annotated[int | None, EVALUATE.option("--seed", "seed", min=0)] = None,
    plan: Plan = False,
    json_: Json = False,
) -> None:
    """Answer reasoning episodes by every row of a table, and judge them. Run it again to resume."""
    resolved = EVALUATE.resolve(context)
    from covray.distributed.reason import evaluate_reasoning, plan_reasoning

    if plan:
        print_values(asdict(plan_reasoning(resolved)), json_)
        return
    results = evaluate_reasoning(resolved)
    if json_:
        print(json.dumps(results.to_json()))
        return
    for number in resolved.episodes.shots:
        _print_table(results, number)
    where = escape(resolved.out.rstrip("/"))
    console.print(f"{results.benchmark}; page: {where}/index.html", highlight=False, soft_wrap=True)


def _rounded(values: dict[str, object]) -> dict[str, object]:
    """Return the values of a plan, numbers with decimals to three digits."""
    rounded: dict[str, object] = {}
    for key, value in values.items():
        rounded[key] = float(f"{value:.3g}") if isinstance(value, float) else value
    return rounded


def _print_table(results: ReasoningResults, shots: int) -> None:
    """Print the mean over all tasks of each row of the table."""
    table = Table(f"{shots}-shot", "both right", "95% interval", "named", "hidden", box=None, pad_edge=False)
    means = {}
    for score in results.scores:
        if score.shots == shots and score.task == "mean":
            means[score.row, score.side] = score
    for name in results.rows:
        both = means[name, "both"]
        interval = "" if both.low is None else f"{both.low:.3f} to {both.high:.3f}"
        sides = [f"{means[name, side].mean:.3f}" for side in ("named", "hidden")]
        table.add_row(escape(name), f"{both.mean:.3f}", interval, *sides)
    table.add_row("chance", f"{results.chance:.3f}")
    console.print(table)


def convert_an_aligner(
    source: Annotated[Path, typer.Argument(help="One of the authors' checkpoints, thinkdiff_lvlm.pth.")],
    out: OutFolder,
    variant: Annotated[str, typer.Option(metavar="lvlm|clip", help="Whose features it reads.")] = "lvlm",
    vlm: Annotated[str | None, typer.Option(help="Folder or hub id of the model whose features it reads.")] = None,
    language_model: Annotated[
        str | None, typer.Option(help="Folder or hub id of the language model that it was trained through.")
    ] = None,
    json_: Json = False,
) -> None:
    """A pickled aligner of ThinkDiff's authors becomes a folder of safetensors, for think generate and evaluate."""
    from covray.models.aligner.convert import convert_aligner

    print_values(convert_aligner(source, Path(out), variant, vlm, language_model), json_)
