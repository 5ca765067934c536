"""``covray experiments diffusionvl``: a vision-language model learns to write in blocks, and is held against its twin.

    checkpoint -> tuned token by token (the twin)                    -> answers of held-out cells, tokens/s
               -> tuned as long for blocks of 8, S passes a block    -> the same prompts: paired differences
               -> tuned as long for one block, decoded without cache -> tokens/s of full-sequence diffusion
               -> tuned with one setting changed each                -> the table of ablations

All models see the same samples in the same order. Every training and every evaluation is one of ``covray vlm``, in a
folder of its own, so that the same command continues the programme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from covray.config import load_config
from covray.config.vlm import VlmEvaluateConfig, VlmTrainConfig
from covray.distributed.evaluate_vlm import evaluate_vlm
from covray.distributed.session import ray_session
from covray.distributed.train_vlm import train_vlm
from covray.errors import ConfigError, one_line
from covray.evaluation.records import VlmEvaluationResults
from covray.evaluation.statistics import Mean
from covray.evaluation.vision_text import Row, compare_rows, finished_rows
from covray.io import storage
from covray.io.storage import Folder
from covray.pairs.manifest import ManifestWriter
from covray.pairs.scenes.portraits import portrait_pairs
from covray.recipes.diffusionvl_tables import (
    BLOCK,
    SCORES,
    WITHOUT_CACHE,
    Ablation,
    Quality,
    Speed,
    Tables,
    as_markdown,
    blocks_decoder,
    check_claims,
)
from covray.recipes.nano.vlm import SAMPLES, SIZE_PX, STAGES
from covray.training.metrics_log import METRICS_FILE, read_metrics

BATCH = 16
"""Samples of a step. Blocks learn more of the same samples in many small steps: after 5% of ``nano``'s training the
perplexity by the bound is 3.8 with steps of 64, and 3.0 with steps of 16."""
PRETRAINED_SAMPLES = sum(stage.steps for stage in STAGES) * SAMPLES
"""Samples that the nano model was trained on; a share of them is a share of its training tokens."""
WHOLE = 96
"""Tokens of the one block of full-sequence diffusion: the longest caption fits."""
TABLES = "tables.md"
_LEARNING_RATE = 4e-4
_DIFFUSIONVL = {"blocks.preset": "diffusionvl"}


@dataclass(frozen=True)
class Budget:
    """How much of the programme is run."""

    seeds: tuple[int, ...]
    share: float
    """Of the checkpoint's training samples, that it is tuned on."""
    shares: tuple[float, ...]
    """Further shares of the ablation of data."""
    sizes: tuple[int, ...]
    """Further sizes of blocks."""
    passes: tuple[int, ...]
    """Passes of a block of 8, the first of which is 8."""
    portraits: int
    """Portraits to render where no data is given."""
    prompts: int
    """Prompts of an evaluation."""
    timed: int
    """Captions whose speed is measured, one at a time."""
    validated: int = 512
    """Samples of a validation."""


BUDGETS = {
    "small": Budget((0,), 0.01, (), (4,), (8, 4, 2), portraits=4000, prompts=400, timed=20),
    "medium": Budget((0, 1, 2), 0.05, (0.01,), (4, 16), (8, 4, 2, 1), portraits=16_000, prompts=1000, timed=50),
    "full": Budget(
        (0, 1, 2), 0.05, (0.01, 0.20), (4, 16, 32), (8, 6, 4, 3, 2, 1), portraits=30_000, prompts=4000, timed=200
    ),
}


@dataclass(frozen=True)
class Programme:
    """What is trained and measured, and where."""

    out: str
    model: str
    data: str
    budget: Budget

    def folder(self, kind: str, name: str) -> str:
        """Return the folder of a training (``runs``) or an evaluation (``scores``)."""
        return storage.join(self.out, kind, name)


@dataclass(frozen=True)
class Variant:
    """A way to tune the checkpoint."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    share: float | None = None
    """Of the checkpoint's training samples; None: the budget's."""

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return int(self.options.get("blocks.size", BLOCK))


TWIN = Variant("autoregressive", {"objective": "autoregressive"})
BLOCKS = Variant("blocks")
FULL_SEQUENCE = Variant("full-sequence", {"blocks.size": WHOLE, "blocks.autoregressive": 0.0})


def ablations(budget: Budget) -> list[Variant]:
    """Return the variants that differ from ``BLOCKS`` in one setting, and DiffusionVL to the letter."""
    variants = []
    for size in budget.sizes:
        variants.append(Variant(f"size {size}", {"blocks.size": size}))
    variants += [
        Variant("no autoregressive loss", {"blocks.autoregressive": 0.0}),
        Variant("clean half by blocks", {"blocks.context": "block", "blocks.autoregressive": 0.0}),
        Variant("not shifted", {"blocks.shift": False}),
        Variant("weights 1/t", {"blocks.weight": "level"}),
        Variant("annealed 2, 4, 8", {"blocks.anneal": [2, 4]}),
        Variant("diffusionvl", _DIFFUSIONVL),
    ]
    for share in budget.shares:
        variants.append(Variant(f"data {share:.0%}", share=share))
    return variants


def run_diffusionvl(
    out: str, model: str, data: str | None = None, budget: str = "full", pretrained_samples: int = PRETRAINED_SAMPLES
) -> Tables:
    """Run the programme, or continue it.

    Args:
        out: Its folder; each budget has one below it.
        model: The autoregressive checkpoint.
        data: Manifest with words and the splits train, val and test; None: portraits, whose test split is of held-out
            cells, are rendered.
        budget: A key of ``BUDGETS``.
        pretrained_samples: Samples that the checkpoint was trained on.

    Returns:
        The tables, which are also written to ``results.json`` and ``tables.md`` of the budget's folder, each as soon as
        it is made.

    Raises:
        CovrayError: As ``covray vlm train`` and ``evaluate``.
    """
    if budget not in BUDGETS:
        raise ConfigError(f"--budget {budget}: is none of {', '.join(BUDGETS)}; give one of them")
    chosen = BUDGETS[budget]
    folder = storage.join(out, budget)
    programme = Programme(folder, model, data or _render(folder, chosen.portraits), chosen)
    with ray_session():
        quality = _quality(programme, pretrained_samples)
        _write(folder, Tables(budget=budget, quality=quality))
        speed = _speed(programme, pretrained_samples)
        claims = check_claims(quality, speed)
        _write(folder, Tables(budget=budget, quality=quality, speed=speed, claims=claims))
        ablated = _ablate(programme, pretrained_samples)
        results = Tables(budget=budget, quality=quality, speed=speed, ablations=ablated, claims=claims)
        _write(folder, results)
    return results


def _write(folder: str, tables: Tables) -> None:
    Folder(folder).write_bytes(TABLES, as_markdown(tables).encode())
    tables.write(folder)


def _render(out: str, portraits: int) -> str:
    """Write the manifest of the portraits to the local folder ``out``, unless it is there; return its path."""
    manifest = Path(out, "portraits.parquet")
    if manifest.exists():
        return str(manifest)
    try:
        manifest.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({one_line(error)}); give another folder") from error
    with ManifestWriter(manifest, captions=True) as writer:
        for pair in portrait_pairs(portraits, SIZE_PX):
            writer.add(pair)
    return str(manifest)


# --- one training, one evaluation ------------------------------------------------------------------------------------


def _train(programme: Programme, variant: Variant, seed: int, pretrained_samples: int) -> str:
    """Train a variant, or read that it is done; return the folder of its run."""
    share = variant.share
    if share is None:
        share = programme.budget.share
    # A share of the checkpoint's training, in steps of one batch.
    steps = max(1, round(share * pretrained_samples / BATCH))
    run = programme.folder("runs", _folder_name(variant, seed))
    options = {
        "data": programme.data,
        "model": programme.model,
        "out": run,
        "train": "full",
        "objective": "block_diffusion",
        "optimizer.learning_rate": _LEARNING_RATE,
        "optimizer.steps": steps,
        "optimizer.batch_samples": BATCH,
        "optimizer.micro_batch_samples": BATCH,
        "compute.dtype": "float32",
        "compute.deepspeed": "none",
        "validate_every_steps": max(1, steps // 4),
        "validation_samples": programme.budget.validated,
        "tracking.uri": "none",
        "seed": seed,
    }
    train_vlm(load_config(VlmTrainConfig, None, options | dict(variant.options)))
    return run


def _evaluate(
    programme: Programme, run: str, name: str, decoding: Mapping[str, Any], timed: bool
) -> VlmEvaluationResults:
    """Evaluate a run, or read that it is done; return the results.

    Args:
        programme: The programme.
        run: The run.
        name: Name of the evaluation.
        decoding: How answers are written.
        timed: Whether the speed is asked for: of captions, one at a time, by one actor.
    """
    options = {
        "run": run,
        "data": programme.data,
        "out": programme.folder("scores", name),
        "samples": programme.budget.prompts,
        "decoding": {"max_tokens": WHOLE, **decoding},
        "tracking.uri": "none",
    }
    # One at a time on one actor: neither a batch nor a neighbour shares the time.
    if timed:
        options |= {"samples": programme.budget.timed, "batch": 1, "actors.max": 1, "texts": {"questions": False}}
    return evaluate_vlm(load_config(VlmEvaluateConfig, None, options))


def _folder_name(variant: Variant, seed: int) -> str:
    # Folders that have begun are found by these names: they must stay as they are.
    name = variant.name.replace("1/t", "one over t").replace("%", " percent").replace(",", "").replace(" ", "-")
    return f"{name}-{seed}"


def _rows(programme: Programme, names: Sequence[str]) -> list[list[Row]]:
    return [finished_rows(programme.folder("scores", name)) for name in names]


# --- the three tables ------------------------------------------------------------------------------------------------


def _quality(programme: Programme, pretrained_samples: int) -> list[Quality]:
    """Return the twin's scores, and the paired differences of blocks from it by passes, over all seeds."""
    # Names of evaluations, one a seed: of the twin, and of the blocks by passes.
    of_twin = []
    by_passes: dict[int, list[str]] = {passes: [] for passes in programme.budget.passes}
    for seed in programme.budget.seeds:
        twin = _train(programme, TWIN, seed, pretrained_samples)
        of_twin.append(_folder_name(TWIN, seed))
        _evaluate(programme, twin, of_twin[-1], {}, timed=False)
        blocks = _train(programme, BLOCKS, seed, pretrained_samples)
        for passes, names in by_passes.items():
            names.append(f"{_folder_name(BLOCKS, seed)}-of-{passes}")
            _evaluate(programme, blocks, names[-1], {"passes": passes}, timed=False)

    twin_rows = _rows(programme, of_twin)
    table = []
    for passes, names in by_passes.items():
        rows = _rows(programme, names)
        compared = compare_rows(rows, twin_rows)
        differences = {score: compared[score] for score in SCORES}
        table.append(Quality(passes=passes, tokens_per_pass=_tokens_per_pass(rows), differences=differences))
    return table


def _tokens_per_pass(rows_by_seed: Sequence[Sequence[Row]]) -> float:
    tokens, passes = 0, 0
    for rows in rows_by_seed:
        for row in rows:
            tokens += row.tokens
            passes += row.passes
    return tokens / passes


def _speed(programme: Programme, pretrained_samples: int) -> list[Speed]:
    """Return the speed at batch 1 of the first seed's models: the twin, blocks by passes, and without blocks."""
    seed = programme.budget.seeds[0]
    runs = {}
    for variant in (TWIN, BLOCKS, FULL_SEQUENCE):
        runs[variant.name] = _train(programme, variant, seed, pretrained_samples)
    asked: list[tuple[str, str, dict[str, Any]]] = [("autoregressive", TWIN.name, {})]
    for passes in programme.budget.passes:
        asked.append((blocks_decoder(passes), BLOCKS.name, {"passes": passes}))
    # As many passes as the model is unsure: DiffusionVL's dynamic rule.
    asked.append((f"blocks of {BLOCK} by confidence", BLOCKS.name, {"unmask": "confidence"}))
    asked.append(("speculative", BLOCKS.name, {"decoder": "speculative"}))
    asked.append((WITHOUT_CACHE, FULL_SEQUENCE.name, {"cache": False}))
    asked.append(("full sequence in half the passes, no cache", FULL_SEQUENCE.name, {"cache": False, "passes": 48}))
    table: list[Speed] = []
    for title, name, decoding in asked:
        file_name = "timed-" + title.replace(",", "").replace(" ", "-")
        result = _evaluate(programme, runs[name], file_name, decoding, timed=True)
        rate = result.tokens_per_s or 0.0
        # The twin comes first: all rates are over its own.
        first_rate = table[0].tokens_per_s if table else rate
        table.append(
            Speed(
                decoder=title,
                tokens_per_s=rate,
                over_autoregressive=rate / first_rate if first_rate else 0.0,
                tokens_per_pass=result.tokens_per_pass or 0.0,
                facts=_mean_of(result.facts),
                chrf=_mean_of(result.chrf),
            )
        )
    return table


def _ablate(programme: Programme, pretrained_samples: int) -> list[Ablation]:
    """Return what each variant scores with as many passes as tokens, and with a quarter of them."""
    seed = programme.budget.seeds[0]
    table = []
    for variant in (BLOCKS, *ablations(programme.budget)):
        run = _train(programme, variant, seed, pretrained_samples)
        scores = []
        for passes in (variant.block, max(1, variant.block // 4)):
            name = f"{_folder_name(variant, seed)}-of-{passes}"
            if variant is BLOCKS and passes not in programme.budget.passes:
                name += "-ablation"
            result = _evaluate(programme, run, name, {"passes": passes}, timed=False)
            scores.append({score: _mean_of(getattr(result, score)) for score in SCORES})
        table.append(
            Ablation(
                variant=variant.name,
                nelbo_perplexity=_nelbo_perplexity(run),
                all_passes=scores[0],
                quarter=scores[1],
            )
        )
    return table


def _nelbo_perplexity(run: str) -> float | None:
    """Return the last validation's perplexity by the bound of the blocks."""
    # Only records of a validation have it.
    last = None
    for record in read_metrics(storage.join(run, METRICS_FILE)):
        last = record.get("answer_nelbo_perplexity", last)
    return last


def _mean_of(score: Mean | None) -> float | None:
    return None if score is None else score.mean
