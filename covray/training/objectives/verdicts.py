"""A verifier of answers: it learns to tell better candidates of a query from worse ones, after every picture.

    candidates of a query --frozen model--> features of every picture --Verifier--> a number each

Two candidates of a query with different scores are a comparison, once for each picture of the chain. The loss is the
mean over comparisons of w ln(1 + exp(worse - better)), in nats: w is how far the two scores lie apart among the task's
answers (the difference of their shares of worse answers), over the mean of all comparisons. A verifier that knows
nothing has ln 2 = 0.693. Scores of different tasks are never compared.

Features are a pure function of the query: they are computed once, in whatever batch a query comes, and so neither
workers nor a restart change a step.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from covray.config import TrainConfig
from covray.errors import ConfigError
from covray.io.storage import Folder
from covray.models.lvm.adapter import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter_tensors,
    read_adapter,
)
from covray.models.lvm.backbone import backbone_facts, load_backbone
from covray.models.lvm.decoding.judging import CandidateReader
from covray.models.lvm.decoding.reader import Reader
from covray.models.lvm.records import BlockDiffusionRecord, VerifierRecord
from covray.models.lvm.scales import parameters
from covray.models.lvm.verifier import LIKELIHOODS, Verifier, verifier_files
from covray.seeds import hash_number, seed_of
from covray.training.objectives.base import Loss, Rewriter, StepBatches
from covray.training.scored_answers import ScoredQuery, read_scored_answers
from covray.training.worker import WorkerContext

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SHARE_BITS = 32


@dataclass(frozen=True, eq=False)
class Comparisons:
    """Comparisons between candidates of several queries."""

    features: Tensor
    """Of all pictures of all candidates, float32 [pictures, features]."""
    better: Tensor
    """The picture of the better candidate of each comparison, int64 [C]."""
    worse: Tensor
    """Of the worse one, int64 [C]."""
    weights: Tensor
    """Float32 [C]."""
    is_answer: Tensor
    """Whether the compared pictures are answers, bool [C]."""

    def to(self, device: torch.device) -> Comparisons:
        """Return the batch with its tensors on ``device``."""
        return Comparisons(
            self.features.to(device),
            self.better.to(device),
            self.worse.to(device),
            self.weights.to(device),
            self.is_answer.to(device),
        )


class Verdicts:
    """The objective of ``covray train`` with ``objective=verifier``."""

    def __init__(self, config: TrainConfig, device: torch.device):
        """Read the answers and load the model that wrote them.

        Args:
            config: The configuration, without an ``auto``.
            device: The device of this worker.

        Raises:
            CovrayError: The answers, the backbone or the adapter cannot be used.
        """
        self.config, self._device = config, device
        assert config.lora.path is not None
        # The files of the adapter are kept, as they are exported again beside the verifier.
        folder = Folder(config.lora.path)
        self._adapter: dict[str, bytes] = {}
        for name in (CONFIG_FILE, WEIGHTS_FILE, BlockDiffusionRecord.FILE):
            if folder.exists(name):
                self._adapter[name] = folder.read_bytes(name)
        facts = backbone_facts(config.backbone)
        queries = require_answers(config)
        self.training, self.validation = split_queries(queries, config)
        self._weights = Weights(queries)
        self._mean_weight = self._weights.mean(self.training)
        lora, tensors = read_adapter(config.lora.path)
        model = load_backbone(
            facts, config.backbone, lora, dtype=_DTYPES[config.compute.dtype], device=device, seed=config.seed
        ).requires_grad_(False)
        load_adapter_tensors(model, tensors)
        self._tokens_per_image = int(queries[0].written.shape[2])
        self._reader = CandidateReader(Reader(model, facts.codes, batch=1), self._tokens_per_image)
        judged = VerifierRecord(
            width=int(facts.llama.hidden_size),
            hidden=config.verifier.hidden,
            adapter=adapter_fingerprint(config.lora.path),
            backbone=facts.fingerprint,
        )
        self.verifier = Verifier(judged, config.seed).to(device)
        # The frozen model's features of an answer are computed once, in the first epoch.
        self._features: dict[ScoredQuery, Tensor] = {}
        self.steps = count_steps(self.training, config)
        self.flops_per_token = 2.0 * parameters(facts.llama)  # the frozen model's forward pass, of the first epoch
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        rows = torch.zeros((1, judged.width + LIKELIHOODS), device=device)
        self.idle_batch = Comparisons(rows, nothing, nothing, nothing.float(), nothing.bool())

    @property
    def module(self) -> nn.Module:
        """The verifier; the model that it judges is frozen and no part of it."""
        return self.verifier

    @property
    def rewriter(self) -> Rewriter | None:
        """Nothing: the answers are written before."""
        return None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the verifier by name."""
        return dict(self.verifier.named_parameters())

    def batches(self, cursor: int, worker: WorkerContext) -> StepBatches[Comparisons]:
        """Return the share of ``worker`` in the step that begins at query ``cursor``."""
        end = step_end(self.training, cursor, self.config)
        queries = [query_at(self.training, number, self.config.seed) for number in range(cursor, end)]
        # One micro-batch: a comparison is two numbers, and features of a query are cached.
        own = queries[worker.rank :: worker.world_size]
        return StepBatches(
            next_cursor=end,
            batches=[self._comparisons(own) if own else None],
            loss_tokens=sum(count_comparisons(query) for query in queries),
            sentences=len(queries),
            tokens=sum(query.tokens for query in queries),
            epoch=end / len(self.training),
        )

    def loss(self, forward: Callable[[Any], Any], batch: Comparisons) -> Loss:
        """Return the weighed loss of all comparisons."""
        # Of each pair -log sigmoid(better - worse), which is softplus(worse - better) (Bradley and Terry, 1952).
        verdicts = forward(batch.features)
        each = batch.weights * F.softplus(verdicts[batch.worse] - verdicts[batch.better])
        return Loss(each.sum(), each.detach())

    def validate(
        self, evaluate: Callable[[Comparisons | None], Tensor], worker: WorkerContext
    ) -> dict[str, float] | None:
        """Return the loss on the queries held out for validation, and how often the better answer is found.

        ``verifier_right`` is the share of comparisons of answers that the verifier gets right, ``likelihood_right``
        that of the answers' likelihood; chance is a half.
        """
        if not self.validation:
            return None
        queries = self.validation[: self.config.validation_sentences]
        sums = torch.zeros(5, device=worker.device, dtype=torch.float64)
        for number in range(worker.rank, _rounded_up(len(queries), worker.world_size), worker.world_size):
            if number >= len(queries):  # all workers evaluate equally often
                evaluate(None)
                continue
            batch = self._comparisons([queries[number]]).to(worker.device)
            each = evaluate(batch)
            # log 2 is the loss of a verifier that has no opinion: less means that it prefers the better one.
            undecided = batch.weights * math.log(2)
            is_right = torch.where(torch.isclose(each, undecided), 0.5, (each < undecided).float())
            # How often the likelihood alone would have chosen the better one.
            log_p = batch.features[:, -LIKELIHOODS]
            is_likelier = log_p[batch.better] > log_p[batch.worse]
            answers = batch.is_answer
            figures = [each.sum(), torch.tensor(len(each)), is_right[answers].sum()]
            figures += [(is_likelier & answers).sum(), answers.sum()]
            sums += torch.stack([figure.to(sums) for figure in figures])
        loss, comparisons, right, likelier, answers_compared = worker.sum(sums)
        return {
            "validation_loss": loss / comparisons,
            "verifier_right": right / answers_compared,
            "likelihood_right": likelier / answers_compared,
        }

    def export(self, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
        """Return the adapter that is judged, as it is, with the verifier beside it."""
        weights = {name: tensors[name] for name in self.parameters()}
        return self._adapter | verifier_files(self.verifier, weights)

    @torch.no_grad()
    def features_of(self, query: ScoredQuery) -> Tensor:
        """Return the features of every picture of every candidate, float32 [candidates * images, features]."""
        if query not in self._features:
            candidates = []
            for written in query.written:
                candidates.append(self._reader.picture_features(query.before, written.reshape(-1)).cpu())
            self._features[query] = torch.cat(candidates)
        return self._features[query]

    def _comparisons(self, queries: list[ScoredQuery]) -> Comparisons:
        """Return all comparisons between candidates of ``queries``, one query's after another's."""
        features, better, worse, weights, is_answer = [], [], [], [], []
        start = 0
        for query in queries:
            # Pictures of a query's candidates stand one after another: candidate c's picture p at c * images + p.
            first, second = ordered_pairs(query)
            images = query.written.shape[1]
            pictures = np.arange(images)
            better.append(start + (first[:, None] * images + pictures).ravel())
            worse.append(start + (second[:, None] * images + pictures).ravel())
            # Over the mean weight of all comparisons, which is then 1.
            weights.append(np.repeat(self._weights.of(query) / self._mean_weight, images))
            is_answer.append(np.tile(pictures == images - 1, len(first)))
            features.append(self.features_of(query))
            start += len(query.written) * images
        return Comparisons(
            features=torch.cat(features),
            better=torch.from_numpy(np.concatenate(better)),
            worse=torch.from_numpy(np.concatenate(worse)),
            weights=torch.from_numpy(np.concatenate(weights)).float(),
            is_answer=torch.from_numpy(np.concatenate(is_answer)),
        )


class Weights:
    """How much a comparison counts: the share of the task's answers whose score lies between the two."""

    def __init__(self, queries: list[ScoredQuery]):
        """Rank the scores of every task's answers."""
        scores: dict[str, list[NDArray[np.float64]]] = {}
        for query in queries:
            scores.setdefault(query.task, []).append(query.goodness)
        self._sorted = {task: np.sort(np.concatenate(parts)) for task, parts in scores.items()}

    def of(self, query: ScoredQuery) -> NDArray[np.float64]:
        """Return the weights of a query's comparisons, in the order of ``ordered_pairs``, float64 [pairs]."""
        known = self._sorted[query.task]
        below = np.searchsorted(known, query.goodness, "left")
        upto = np.searchsorted(known, query.goodness, "right")
        share = (below + upto) / (2 * len(known))  # of the answers that are worse; of equal ones half
        better, worse = ordered_pairs(query)
        return np.asarray(share[better] - share[worse])

    def mean(self, queries: list[ScoredQuery]) -> float:
        """Return the mean weight of all comparisons of ``queries``; each is made once for each picture."""
        total, count = 0.0, 0
        for query in queries:
            weights, images = self.of(query), query.written.shape[1]
            total += float(weights.sum()) * images
            count += len(weights) * images
        return total / count


def ordered_pairs(query: ScoredQuery) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the better and the worse candidate of every two with different scores, int64 [pairs] each."""
    better, worse = np.nonzero(query.goodness[:, None] > query.goodness)
    return better.astype(np.int64), worse.astype(np.int64)


def count_comparisons(query: ScoredQuery) -> int:
    """Return the comparisons of a query: those of two candidates, for each picture."""
    return len(ordered_pairs(query)[0]) * query.written.shape[1]


def split_queries(queries: list[ScoredQuery], config: TrainConfig) -> tuple[list[ScoredQuery], list[ScoredQuery]]:
    """Return the queries to train on and those for validation; all answers to one pair are on one side.

    Raises:
        ConfigError: There is nothing to train on.
    """
    training: list[ScoredQuery] = []
    validation: list[ScoredQuery] = []
    for query in queries:
        # By the pair: all answers to one fall to one side.
        share = hash_number(f"verifier {config.seed} {query.pair_id}", _SHARE_BITS) / 2**_SHARE_BITS
        (validation if share < config.verifier.validation else training).append(query)
    if not training:
        raise ConfigError(
            f"verifier.answers: all {len(queries)} queries fall to the validation; write answers to more queries"
        )
    return training, validation


def query_at(queries: list[ScoredQuery], number: int, seed: int) -> ScoredQuery:
    """Return query ``number`` of the stream: every epoch has all queries, in an order of its own."""
    epoch, place = divmod(number, len(queries))
    return queries[_order(len(queries), seed, epoch)[place]]


@functools.lru_cache(maxsize=2)  # a step may lie across the end of an epoch
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order of the queries in an epoch, int64 [count]."""
    return np.random.default_rng(seed_of(seed, "verdicts", epoch)).permutation(count)


def step_end(queries: list[ScoredQuery], cursor: int, config: TrainConfig) -> int:
    """Return the cursor after the step that begins at ``cursor``: at least one query, and no more tokens than a step's.

    Without ``optimizer.steps`` the last step ends with the epochs.
    """
    budget = config.optimizer.batch_tokens
    last = math.inf if config.optimizer.steps is not None else _queries_of_epochs(queries, config)
    end = cursor
    while end == cursor or (end < last and query_at(queries, end, config.seed).tokens <= budget):
        budget -= query_at(queries, end, config.seed).tokens
        end += 1
    return end


def count_steps(queries: list[ScoredQuery], config: TrainConfig) -> int:
    """Return the steps of a training: as configured, or as many as its epochs take."""
    if config.optimizer.steps is not None:
        return config.optimizer.steps
    cursor, steps = 0, 0
    while cursor < _queries_of_epochs(queries, config):
        cursor = step_end(queries, cursor, config)
        steps += 1
    return steps


def _queries_of_epochs(queries: list[ScoredQuery], config: TrainConfig) -> int:
    """Return the queries of a training that is as long as its epochs; at least one."""
    return max(1, round(config.optimizer.epochs * len(queries)))


def _rounded_up(count: int, size: int) -> int:
    """Return the least multiple of ``size`` that is not below ``count``."""
    return -(-count // size) * size


def adapter_fingerprint(path: str) -> str:
    """Return the SHA-256 (hex) of the weights of the adapter in ``path``."""
    return hashlib.sha256(Folder(path).read_bytes(WEIGHTS_FILE)).hexdigest()


def require_answers(config: TrainConfig) -> list[ScoredQuery]:
    """Return the answers that a verifier of ``config`` learns from.

    Raises:
        CovrayError: The configuration does not name them, or they are not of the adapter ``lora.path``.
    """
    path, answers = config.lora.path, config.verifier.answers
    if path is None or answers is None:
        missing = "lora.path" if path is None else "verifier.answers"
        raise ConfigError(
            f"{missing}: objective verifier judges the answers of a run; set lora.path to its adapter and "
            "verifier.answers to its evaluation with score_candidates"
        )
    # The answers of block diffusion are of one size of block.
    diffusion = read_adapter(path)[0].diffusion
    if diffusion is not None and diffusion.block != config.block_diffusion.block:
        raise ConfigError(f"block_diffusion.block: {path} writes blocks of {diffusion.block} tokens; set it to that")
    return read_scored_answers(answers, adapter_fingerprint(path), config.sentences)
