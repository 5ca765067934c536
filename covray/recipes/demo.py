"""``covray demo``: every station on the nano models, offline, on a laptop. Each step prints its command."""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from covray.chains.records import Audit, WholeAudit
from covray.config import (
    BuildConfig,
    EngineConfig,
    EvaluateConfig,
    FormConfig,
    OptimizerConfig,
    PriorConfig,
    SentencesConfig,
    TrackingConfig,
    TrainConfig,
)
from covray.config.serve import ThinkServeConfig
from covray.config.think import ThinkGenerateConfig
from covray.distributed.build import build
from covray.distributed.evaluate import PAGE, evaluate
from covray.distributed.train import train
from covray.errors import ConfigError, one_line
from covray.evaluation.records import EvaluationResults, SubjectScore
from covray.io.images import encode_png
from covray.io.records import RecordPart
from covray.pairs.manifest import ManifestWriter, Pair
from covray.pairs.photos import photo_pairs
from covray.pairs.scenes import scene_pairs
from covray.progress import stage
from covray.recipes.first_answers import SAMPLING, SHEET, Question, write_first_answers
from covray.recipes.nano.data import photograph_path
from covray.report.dataset import view
from covray.serve.thinking import ThinkParts, open_parts
from covray.thinking.answering import generate
from covray.thinking.cells import demonstration_pictures
from covray.thinking.episodes import PORTRAITS, make_episode, sample_orders, tasks_of
from covray.training.records import TrainResult

PHOTOGRAPHS = (
    "skimage/chelsea.png", "skimage/astronaut.png", "skimage/coffee.png", "skimage/rocket.jpg",
    "sklearn/china.jpg", "sklearn/flower.jpg",
)  # fmt: skip
SCENES = {"train": 5, "val": 2, "test": 2}
"""Scenes by split. Two to validate on: a sentence needs an example beside the query. Two that no training sees."""
FAMILY = "nano-2"
"""Tokenizer and backbone of the first answers. Chains are learned by the first edition: it has a quarter of the tokens
a picture, and some twenty steps are enough."""
LENGTH = 6
SOLVER = "dpm"
"""A quarter of the paper's evaluations, and more accurate: a newcomer waits less."""
BUILD = {"fit": "crop", "rows_per_block": 8}
TRAINING = {"epochs": 4.0, "batch_tokens": 6144, "learning_rate": 1e-3}
"""Some twenty short steps: enough to see the model learn chains, on so few pairs."""
EVALUATION = {"batch": 4, "rows_per_block": 14}
"""Small batches, for few queries."""
BASELINES = ("mean", "ceiling")
PLAIN = {"method": "none", "length": 2}
"""The untuned backbone answers without frames, too."""
SHOTS = 2
"""Pictures that ThinkDiff is shown before it draws the next one."""


class DemoResult(RecordPart):
    """What the demo wrote; the keys of ``covray demo --json``."""

    answers: str
    """The sheet of the first answers."""
    page: str
    """The page of the dataset."""
    evaluation: str
    """The page of the evaluation."""
    dataset: str
    run: str
    seconds: float
    audit: WholeAudit
    training: TrainResult
    scores: tuple[SubjectScore, ...]
    thought: str | None
    """The picture that ThinkDiff drew; null without ``--think``."""


@dataclass(frozen=True)
class _Demo:
    """The demo in one folder."""

    out: Path
    console: Console

    @property
    def first(self) -> Path:
        return self.out / "first"

    @property
    def photographs(self) -> Path:
        return self.out / "photographs"

    @property
    def pairs(self) -> Path:
        return self.out / "pairs"

    @property
    def chains(self) -> Path:
        return self.out / "chains"

    @property
    def run(self) -> Path:
        return self.out / "run"

    @property
    def scores(self) -> Path:
        return self.out / "evaluation"

    @property
    def thought(self) -> Path:
        return self.out / "thought"

    def announce(self, step: str, command: str) -> None:
        """Print what comes next, and the command that does it."""
        self.console.print(f"\n[bold]{step}[/bold]\n  [dim]$ covray {command}[/dim]", highlight=False, soft_wrap=True)

    def report(self, text: str) -> None:
        """Print what came of a step."""
        self.console.print(f"  {text}", highlight=False, soft_wrap=True)

    def make_pairs(self) -> list[Pair]:
        """Copy the photographs, and write a manifest of them and one of rendered scenes; returns the scenes' pairs."""
        try:
            self.photographs.mkdir(parents=True, exist_ok=True)
            self.pairs.mkdir(exist_ok=True)
            for name in PHOTOGRAPHS:
                shutil.copy(photograph_path(name), self.photographs)
        except OSError as error:
            raise ConfigError(
                f"--out {self.out}: cannot be written ({one_line(error)}); give another folder"
            ) from error
        # Written where they are absent, so that a demo that was stopped goes on.
        photo_manifest, scene_manifest = self.pairs / "photos.parquet", self.pairs / "scenes.parquet"
        self.announce(
            f"{len(PHOTOGRAPHS)} photographs label themselves",
            f"pairs photos {self.photographs} --size 128 --splits train=1 --out {photo_manifest}",
        )
        root = str(self.photographs)
        _write_manifest(photo_manifest, photo_pairs(root, size_px=128, splits={"train": 1}), root)
        count = sum(SCENES.values())
        shares = ",".join(f"{name}={number}" for name, number in SCENES.items())
        self.announce(
            f"{count} rendered scenes, labelled for all seven tasks",
            f"pairs scenes --count {count} --splits {shares} --out {scene_manifest}",
        )
        pairs = list(scene_pairs(count, splits=dict(SCENES)))
        _write_manifest(scene_manifest, pairs)
        return pairs

    def answer_first(self, pairs: Sequence[Pair]) -> None:
        """Answer a scene of the last split in all tasks, after an example of the first, with the untuned model."""
        splits = list(SCENES)
        examples = _first_of_tasks(pairs, splits[0])
        queries = _first_of_tasks(pairs, splits[-1])
        questions = {task: Question(examples[task], query) for task, query in queries.items()}
        task, folder = next(iter(questions)), self.first
        self.announce(
            "One model, seven tasks: it sees an example and answers, before anything is trained",
            f"generate --backbone {FAMILY} --tokenizer {FAMILY} --length 2 --method none --task {task} --example "
            f"{folder}/{task}_example.png {folder}/{task}_example_label.png --query {folder}/{task}_query.png "
            f"--out {folder}/{task} {_set_options({'sampling.expected': SAMPLING.expected})}",
        )
        sheet = folder / SHEET
        if not sheet.exists():
            with stage("answering with the small model"):
                write_first_answers(questions, folder, FAMILY)
        self.report(f"the first picture: [bold]{sheet}[/bold]")

    def make_chains(self) -> Audit:
        """Build the chains; returns the audit."""
        self.announce(
            f"Chains of {LENGTH}: inversion, slerp, denoising; and linear mixing beside them",
            f"build --manifest {self.pairs} --out {self.chains} --length {LENGTH} --set prior.solver={SOLVER} "
            f"{_set_options(BUILD)}",
        )
        config = BuildConfig.model_validate(
            {
                "pairs": str(self.pairs), "out": str(self.chains), "prior": PriorConfig(solver=SOLVER),
                "lengths": [LENGTH], **BUILD,
            }
        )  # fmt: skip
        audit = build(config)
        # A demo that is continued may have computed nothing in its last run.
        text = f"{audit.written} chains, {audit.rejected} rejected"
        if audit.chains_per_s:
            text += f", {audit.chains_per_s:.2f} chains/s on {audit.actors} actors"
        self.report(text)
        return audit

    def write_page(self) -> str:
        """Write the page of the dataset; returns its path."""
        self.announce("Every frame, decoded from its tokens", f"view {self.chains}")
        paths = view(str(self.chains), str(self.chains / "view"), limit_per_task=6)
        page = next(path for path in paths if path.endswith(".html"))
        self.report(f"[bold]{page}[/bold]")
        return page

    def tune(self) -> TrainResult:
        """Train an adapter; returns the result of the training."""
        options = {}
        for key, value in TRAINING.items():
            if key != "epochs":  # has an option of its own
                options[f"optimizer.{key}"] = value
        self.announce(
            "A small adapter learns to think in chains: LoRA on the nano LVM",
            f"train --scale nano --data {self.chains} --out {self.run} --length {LENGTH} "
            f"--epochs {TRAINING['epochs']} {_set_options(options)}{_untracked()}",
        )
        result = train(
            TrainConfig(
                data=str(self.chains),
                out=str(self.run),
                sentences=SentencesConfig(lengths=(LENGTH,)),
                optimizer=OptimizerConfig.model_validate(TRAINING),
                tracking=_tracking(),
            )
        )
        self.report(
            f"{result.steps} steps, {result.tokens_per_s:,.0f} tokens/s; perplexity of the answers on scenes it "
            f"has not seen: {result.answer_perplexity_before:.1f} before, {result.answer_perplexity:.1f} after"
        )
        return result

    def score(self) -> EvaluationResults:
        """Evaluate the adapter; returns the table."""
        self.announce(
            "Its answers on scenes it has not seen, beside the untuned backbone and answers without a model",
            f"evaluate --data {self.chains} --adapter {self.run} --out {self.scores} --baselines {','.join(BASELINES)} "
            f"{_set_options(EVALUATION | {'forms': json.dumps([PLAIN])})}{_untracked()}",
        )
        return evaluate(
            EvaluateConfig(
                data=str(self.chains),
                out=str(self.scores),
                adapters=(str(self.run),),
                baselines=BASELINES,
                forms=(FormConfig.model_validate(PLAIN),),
                tracking=_tracking(),
                **EVALUATION,
            )
        )

    def think(self, parts: ThinkParts) -> str:
        """Let ThinkDiff draw the picture that a rule of words and pictures asks for; returns its file."""
        task = tasks_of(PORTRAITS)[0]
        (order,) = sample_orders(1, seed=0)
        episode = make_episode(task, 0, order, SHOTS)
        images = []
        self.thought.mkdir(exist_ok=True)
        for number, picture in enumerate(demonstration_pictures(episode, seed=0), 1):
            file = self.thought / f"shown-{number}.png"
            file.write_bytes(encode_png(picture))
            images.append(str(file))
        models = parts.models.model_dump(exclude_none=True)
        # The parts of a folder, and what is asked of them.
        config = ThinkGenerateConfig.model_validate(
            models
            | {"run": str(parts.aligner.path), "out": str(self.thought / "answer"), "instruction": parts.instruction}
            | {"images": images, "words": episode.words}
        )
        self.announce(
            f"A vision-language model reads {SHOTS} pictures with words, and a diffusion model draws what comes next",
            _generate_command(config),
        )
        answer = generate(config)
        picture_file = f"{config.out}/{answer.files[0]}"
        self.report(
            f'asked: {" ".join(episode.words)}; it thought "{answer.text}" and drew [bold]{picture_file}[/bold]'
        )
        return picture_file


def run_demo(out: Path, console: Console, think: str | None = None) -> DemoResult:
    """Make pairs of photographs and scenes, build chains of them, show them, train a small adapter, evaluate it.

    Args:
        out: A folder that does not exist yet, or that an earlier demo was stopped in.
        console: Where to print the steps.
        think: Folder with ThinkDiff's parts, of which a picture is drawn at the end; None: none.

    Raises:
        CovrayError: ``out`` holds something else, a part of ``think`` cannot be used, or a step failed.
    """
    started = time.monotonic()
    demo = _Demo(out, console)
    # Checked before anything is built: what ThinkDiff lacks is said at once, not after minutes.
    parts = None if think is None else _thinking_parts(think)
    if out.exists() and not demo.photographs.is_dir():
        raise ConfigError(f"--out {out}: exists and holds no demo; give a folder that does not exist yet")
    demo.answer_first(demo.make_pairs())
    audit = demo.make_chains()
    page = demo.write_page()
    training = demo.tune()
    evaluation = demo.score()
    thought = None if parts is None else demo.think(parts)
    seconds = round(time.monotonic() - started, 1)
    return DemoResult(
        answers=str(demo.first / SHEET),
        page=page,
        evaluation=str(demo.scores / PAGE),
        dataset=str(demo.chains),
        run=str(demo.run),
        seconds=seconds,
        audit=audit,
        training=training,
        scores=evaluation.scores,
        thought=thought,
    )


def _thinking_parts(folder: str) -> ThinkParts:
    """Return ThinkDiff's parts, checked. Raises CovrayError for parts that cannot be used, or that read no words."""
    parts = open_parts(ThinkServeConfig(folder=folder), EngineConfig())
    if parts.aligner.variant == "clip":
        raise ConfigError(f"--think {folder}: has a vision tower, which reads no words; give parts with a vlm")
    return parts


def _generate_command(config: ThinkGenerateConfig) -> str:
    """Return the command of an answer, without ``covray``."""
    options = ["--run", config.run, "--kind", config.painter.kind, "--painter", config.painter.path]
    if config.vlm is not None:
        options += ["--vlm", config.vlm.path]
    for image in config.images:
        options += ["--image", image]
    for word in config.words:
        options += ["--word", word]
    settings = {
        "painter.steps": config.painter.steps,
        "painter.guidance": config.painter.guidance,
        "instruction": config.instruction,
    }
    return f"think generate {shlex.join([*options, '--out', config.out])} {_set_options(settings)}"


def _tracking() -> TrackingConfig:
    """Return the default tracking, which is MLflow, or none where MLflow is not installed."""
    return TrackingConfig(uri=None if importlib.util.find_spec("mlflow") else "none")


def _untracked() -> str:
    """Return the option of a command that MLflow does not track; empty where it does."""
    return " --tracking-uri none" if _tracking().uri == "none" else ""


def _set_options(values: Mapping[str, object]) -> str:
    """Return configuration values as options of a command."""
    return " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in values.items())


def _first_of_tasks(pairs: Iterable[Pair], split: str) -> dict[str, Pair]:
    """Return the first pair of each task in a split."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        if pair.split == split:
            first.setdefault(pair.task, pair)
    return first


def _write_manifest(path: Path, pairs: Iterable[Pair], root: str | None = None) -> None:
    """Write a manifest, unless an earlier demo, which was stopped, has written it."""
    if not path.exists():
        with ManifestWriter(str(path), root) as writer:
            for pair in pairs:
                writer.add(pair)
