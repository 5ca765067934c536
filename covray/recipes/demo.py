"""``covray demo``: the whole story on the nano family, offline, on a laptop. Every step names its command."""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from covray.config import BuildConfig, EvaluateConfig, OptimizerConfig, PriorConfig, SentencesConfig, TrainConfig
from covray.distributed.build import build
from covray.distributed.evaluate import PAGE, evaluate
from covray.distributed.train import train
from covray.errors import ConfigError, one_line
from covray.pairs.manifest import ManifestWriter, Pair
from covray.pairs.photos import photo_pairs
from covray.pairs.scenes import scene_pairs
from covray.recipes.nano.data import photograph_path
from covray.report.dataset import view

PHOTOGRAPHS = (
    "skimage/chelsea.png", "skimage/astronaut.png", "skimage/coffee.png", "skimage/rocket.jpg",
    "sklearn/china.jpg", "sklearn/flower.jpg",
)  # fmt: skip
SCENES = {"train": 5, "val": 2, "test": 2}
"""Two to validate on: a sentence needs an example beside the query. Two to be evaluated on, which no training sees."""
LENGTH = 6
STEPS = 25
"""Half of the paper's: at this size it shows little, and a newcomer waits half as long."""
TRAINING = {"epochs": 4.0, "batch_tokens": 6144, "learning_rate": 1e-3}
"""Some twenty short steps: enough to see the model take to chains, on so few pairs."""

EVALUATION: dict[str, Any] = {"batch": 4, "rows_per_block": 14}
"""Small batches: here are few queries."""


def run_demo(out: Path, console: Console) -> dict[str, Any]:
    """Make pairs of photographs and scenes, build chains of them, look at them, train a small adapter, evaluate it.

    ``out``: a folder that does not exist yet, or that an earlier demo was stopped in. Raises CovrayError.
    """
    started = time.monotonic()
    photographs, pairs, chains, run, scores = (
        out / name for name in ("photographs", "pairs", "chains", "run", "evaluation")
    )
    if out.exists() and not photographs.is_dir():
        raise ConfigError(f"--out {out}: exists and holds no demo; give a folder that does not exist yet")

    def say(step: str, command: str) -> None:
        console.print(f"\n[bold]{step}[/bold]\n  [dim]$ covray {command}[/dim]", highlight=False, soft_wrap=True)

    try:
        photographs.mkdir(parents=True, exist_ok=True)
        pairs.mkdir(exist_ok=True)
        for name in PHOTOGRAPHS:
            shutil.copy(photograph_path(name), photographs)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({one_line(error)}); give another folder") from error
    say(
        f"{len(PHOTOGRAPHS)} photographs label themselves",
        f"pairs photos {photographs} --size 128 --splits train=1 --out {pairs}/photos.parquet",
    )
    _write(pairs / "photos.parquet", photo_pairs(str(photographs), size_px=128, splits={"train": 1}), str(photographs))
    scenes = sum(SCENES.values())
    shares = ",".join(f"{name}={count}" for name, count in SCENES.items())
    say(
        f"{scenes} rendered scenes, labelled for all seven tasks",
        f"pairs scenes --count {scenes} --splits {shares} --out {pairs}/scenes.parquet",
    )
    _write(pairs / "scenes.parquet", scene_pairs(scenes, splits=dict(SCENES)))

    settings = {"lengths": [LENGTH], "fit": "crop", "rows_per_block": 8}
    config = BuildConfig(pairs=str(pairs), out=str(chains), prior=PriorConfig(steps=STEPS), **settings)
    sets = " ".join(f"--set {shlex.quote(f'{key}={value}')}" for key, value in list(settings.items())[1:])
    say(
        f"Chains of {LENGTH}: inversion, slerp, denoising; and linear mixing beside them",
        f"build --pairs {pairs} --out {chains} --lengths {LENGTH} --set prior.steps={STEPS} {sets}",
    )
    audit = build(config).to_json()
    console.print(
        f"  {audit['written']} chains, {audit['rejected']} rejected"
        + (f", {audit['chains_per_s']:.2f} chains/s on {audit['actors']} actors" if audit.get("chains_per_s") else ""),
        highlight=False,
    )
    say("Every frame, read back from its tokens", f"view {chains}")
    paths = view(str(chains), str(chains / "view"), limit_per_task=6)
    page = next(path for path in paths if path.endswith(".html"))
    console.print(f"  [bold]{page}[/bold]", soft_wrap=True)
    sets = " ".join(f"--set optimizer.{key}={value}" for key, value in list(TRAINING.items())[1:])
    say(
        "A small adapter learns to think in chains: LoRA on the nano LVM",
        f"train --scale nano --data {chains} --out {run} --length {LENGTH} --epochs {TRAINING['epochs']} {sets}",
    )
    result = train(
        TrainConfig(
            data=str(chains), out=str(run), sentences=SentencesConfig(lengths=(LENGTH,)),
            optimizer=OptimizerConfig.model_validate(TRAINING),
        )
    )  # fmt: skip
    console.print(
        f"  {result['steps']} steps, {result['tokens_per_s']:,.0f} tokens/s; perplexity of the answers on scenes it "
        f"has not seen: {result['answer_perplexity_before']:.1f} before, {result['answer_perplexity']:.1f} after",
        highlight=False,
        soft_wrap=True,
    )
    sets = " ".join(f"--set {key}={value}" for key, value in EVALUATION.items())
    say(
        "What it answers on scenes it has not seen, beside the untuned backbone and answers without a model",
        f"evaluate --data {chains} --adapter {run} --out {scores} {sets}",
    )
    evaluation = evaluate(EvaluateConfig(data=str(chains), out=str(scores), adapters=(str(run),), **EVALUATION))
    seconds = round(time.monotonic() - started, 1)
    console.print(f"\nDone in {seconds:.0f} s. Open [bold]{page}[/bold]", soft_wrap=True)
    console.print(f"and at last [bold]{scores / PAGE}[/bold]", soft_wrap=True)
    return {
        "page": page, "evaluation": str(scores / PAGE), "dataset": str(chains), "run": str(run), "seconds": seconds,
        "audit": audit, "training": result, "scores": evaluation["scores"],
    }  # fmt: skip


def _write(path: Path, pairs: Iterable[Pair], root: str | None = None) -> None:
    """Write a manifest, unless an earlier, stopped demo has."""
    if not path.exists():
        with ManifestWriter(str(path), root) as writer:
            for pair in pairs:
                writer.add(pair)
