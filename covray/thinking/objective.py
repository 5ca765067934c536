"""The objective of ``covray think train``: an aligner learns captions, of features in files.

    captions of a step: a pure function of (seed, place)  ->  their splits: of (seed, epoch, index)  ->  micro-batches

So neither the number of workers nor a restart changes a step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn

from covray.config.section import JsonObject
from covray.config.think import SplitConfig, ThinkTrainConfig
from covray.errors import DatasetError
from covray.models.aligner.aligner import WEIGHTS, new_aligner
from covray.models.aligner.language import load_language_model
from covray.models.aligner.records import AlignerRecord
from covray.seeds import seed_of
from covray.thinking.alignment import Alignment, AlignmentBatch, collate
from covray.thinking.dataset import FeatureDataset, FeatureRows
from covray.thinking.splits import SplitSeed, split_tokens, split_words
from covray.thinking.training import captions_at
from covray.training.metrics_log import Metrics
from covray.training.objectives.base import Loss, StepBatches, perplexity
from covray.training.optimizers import PlainUpdate
from covray.training.records import TrainResult
from covray.training.trainer import Trainer
from covray.training.worker import WorkerContext

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Parts:
    """A caption that is parted for the training."""

    features: NDArray[np.int64] | None
    """Which features are read, by their places; None: all."""
    words: str | None
    """The text that the encoder reads after them; None: no encoder is used."""
    target: str
    """The text to write."""


class Captions:
    """The captions of a split of features, as they are parted."""

    def __init__(self, rows: FeatureRows, dataset: FeatureDataset, split: SplitConfig, tokenizer: Any):
        """Take rows that are long enough for ``split``.

        Args:
            rows: The rows.
            dataset: Where they are from.
            split: How texts of a vision-language model are parted.
            tokenizer: Of that model; None with a vision tower.
        """
        self._rows, self._variant, self._places = rows, dataset.variant, dataset.places
        self._split, self._tokenizer = split, tokenizer

    def __len__(self) -> int:
        """Return the number of captions."""
        return len(self._rows)

    def parts(self, seed: SplitSeed) -> Parts:
        """Return the parts of the caption ``seed.index``."""
        if self._variant == "clip":
            words, target = split_words(self._rows.text(seed.index), seed)
            return Parts(None, words, target)
        ids = self._rows.ids(seed.index)
        if self._places == "prompt":  # nothing of the text is among the features
            return Parts(None, None, self._text(ids))
        split = split_tokens(len(ids), self._split.mode, self._split.longest, seed)
        return Parts(split.features, None, self._text(ids[split.targets]))

    def features(self, numbers: Sequence[int], parts: Sequence[Parts]) -> list[Tensor]:
        """Return what is read of the features of captions, float32 [n, width] each."""
        chosen = []
        for features, part in zip(self._rows.features(numbers), parts, strict=True):
            chosen.append(features if part.features is None else features[part.features])
        return chosen

    def _text(self, ids: NDArray[np.int64]) -> str:
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text.strip()


def open_captions(config: ThinkTrainConfig, dataset: FeatureDataset, split: str, most: int | None = None) -> Captions:
    """Return the captions of a split that can be parted.

    Args:
        config: The training.
        dataset: Its features.
        split: Name of the split.
        most: Captions at most.

    Raises:
        DatasetError: There are none, or they are of episodes.
    """
    if dataset.of == "episodes":
        raise DatasetError(
            f"{dataset.path}: holds features of episodes, which evaluations read; ThinkDiff trains on captions only: "
            "give features of pictures"
        )
    # A text of one token cannot be parted in two.
    parted = dataset.places == "text" and config.split.mode != "none"
    rows = dataset.of_split(split, 2 if parted else 1, most)
    return Captions(rows, dataset, config.split, dataset.tokenizer())


class AlignerObjective:
    """The objective of ``covray think train``."""

    rewriter = None

    def __init__(self, config: ThinkTrainConfig, device: torch.device):
        """Open the features and load the language model.

        Args:
            config: The configuration, without an ``auto``.
            device: The device of this worker.

        Raises:
            CovrayError: Features or language model cannot be used.
        """
        self.config, self.steps = config, config.optimizer.steps
        dataset = FeatureDataset(config.data)
        self._training = open_captions(config, dataset, config.train_split)
        self._validation: Captions | None = None
        if config.validation_split is not None:
            most = config.validation_samples
            self._validation = open_captions(config, dataset, config.validation_split, most)
        language = load_language_model(config.language_model, _DTYPES[config.compute.dtype], device)
        aligner = new_aligner(
            dataset.record.width,
            language.model,
            config.aligner.norm,
            config.aligner.seed,
            vlm_fingerprint=dataset.record.fingerprints["vlm"],
            language_fingerprint=language.fingerprint,
        )
        if dataset.variant == "lvlm":
            language.model.encoder = nn.Identity()  # its norm is copied; two fifths of the memory, and never called
        models = {"features": dataset.about(), "trained_through": config.language_model.model_dump(mode="json")}
        self._record = aligner.record.model_copy(update=models)
        self._tokenizer = language.tokenizer
        self._alignment = Alignment(aligner.network.to(device), language.model)
        # Two operations a parameter forward, two backward; the frozen decoder needs no gradients of its weights.
        self.flops_per_token = 4.0 * sum(parameter.numel() for parameter in language.model.parameters())
        # One caption, which a worker without a share computes for the collectives.
        self.idle_batch = self._batch([SplitSeed(config.optimizer.seed, 0, 0)], self._training).to(device)

    @property
    def module(self) -> nn.Module:
        """The aligner before its language model."""
        return self._alignment

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the aligner by name."""
        return dict(self._alignment.aligner.named_parameters())

    def batches(self, cursor: int, worker: WorkerContext) -> StepBatches[AlignmentBatch]:
        """Return the share of ``worker`` in the step that begins at caption ``cursor``."""
        chosen, count = self.config.optimizer, len(self._training)
        end = cursor + chosen.batch
        # The cursor counts captions through all epochs.
        seeds = captions_at(count, chosen.seed, range(cursor, end))
        tokens = self._target_tokens(seeds, self._training)
        return StepBatches(
            next_cursor=end,
            batches=self._share(seeds, self._training, worker),
            loss_tokens=tokens,
            sentences=len(seeds),
            tokens=tokens,
            epoch=end / count,
        )

    def loss(self, forward: Callable[[AlignmentBatch], Any], batch: AlignmentBatch) -> Loss:
        """Return the loss of a batch."""
        each = forward(batch)
        return Loss(each.sum(), each)

    def validate(
        self, evaluate: Callable[[AlignmentBatch | None], Tensor], worker: WorkerContext
    ) -> dict[str, float] | None:
        """Return the mean loss of the validation captions, whose splits are always the same."""
        if self._validation is None:
            return None
        # The same splits at every validation, so that its losses can be compared.
        seed = seed_of("validation", self.config.optimizer.seed)
        seeds = [SplitSeed(seed, 0, number) for number in range(len(self._validation))]
        total = torch.zeros(1, device=worker.device, dtype=torch.float64)
        for batch in self._share(seeds, self._validation, worker):
            # No batch is left for this worker, but it takes part in the collectives.
            on_device = None if batch is None else batch.to(worker.device)
            total += evaluate(on_device).double().sum()
        (loss,) = worker.sum(total)
        mean = loss / self._target_tokens(seeds, self._validation)
        return {"validation_loss": mean, "answer_perplexity": perplexity(mean)}

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        """Return the files of the aligner's folder."""
        weights = {name: tensors[name].contiguous() for name in self.parameters()}
        about = json.dumps(self._record.to_json(), indent=2) + "\n"
        return {WEIGHTS: save(weights), AlignerRecord.FILE: about.encode()}

    def _target_tokens(self, seeds: Sequence[SplitSeed], captions: Captions) -> int:
        """Return the tokens to write of captions, over all workers."""
        # From the texts alone: every worker counts all captions of a step, but reads features of its own only.
        targets = [captions.parts(seed).target for seed in seeds]
        longest = self.config.language_model.max_tokens
        text = self._tokenizer(targets, truncation=True, max_length=longest)
        return sum(map(len, text["input_ids"]))

    def _share(
        self, seeds: Sequence[SplitSeed], captions: Captions, worker: WorkerContext
    ) -> list[AlignmentBatch | None]:
        """Return the micro-batches of ``worker``, as many as every other worker has; None: nothing to compute."""
        size = self.config.optimizer.micro_batch
        most = math.ceil(math.ceil(len(seeds) / worker.world_size) / size)
        own = list(seeds[worker.rank :: worker.world_size])
        batches: list[AlignmentBatch | None] = []
        for first in range(0, most * size, size):
            part = own[first : first + size]
            batches.append(self._batch(part, captions) if part else None)
        return batches

    def _batch(self, seeds: Sequence[SplitSeed], captions: Captions) -> AlignmentBatch:
        parts = [captions.parts(seed) for seed in seeds]
        features = captions.features([seed.index for seed in seeds], parts)
        words = None
        if parts[0].words is not None:
            words = [part.words or "" for part in parts]
        targets = [part.target for part in parts]
        return collate(features, targets, self._tokenizer, self.config.language_model.max_tokens, words)


def train_aligner(
    config: ThinkTrainConfig,
    worker: WorkerContext | None = None,
    report: Callable[[Metrics], None] = lambda metrics: None,
) -> TrainResult | None:
    """Train as one of ``worker.world_size`` workers, from the last checkpoint of the run to its end.

    Args:
        config: The configuration, without an ``auto``. Worker 0 writes the run folder ``config.out``.
        worker: This worker; by default the only one.
        report: Called with the metrics of every validation, on every worker.

    Returns:
        The figures of the finished run. None after the signal to stop, and on workers other than 0.

    Raises:
        CovrayError: Features, language model or checkpoint cannot be used, or the loss is not finite.
    """
    worker = worker or WorkerContext()
    objective = AlignerObjective(config, worker.device)
    update = PlainUpdate(objective, config.optimizer)
    numerics: JsonObject = {
        "workers": worker.world_size,
        "micro_batch": config.optimizer.micro_batch,
        **config.compute.model_dump(include={"device", "threads"}),
    }
    return Trainer(config, objective, update, worker, numerics=numerics, report=report).run()
