"""How much of a label can be read from a picture's tokens: compares tokenizers before an LVM is trained on one.

A bidirectional transformer of the nano LVM's size sees one query, as pixels or as the tokens of a candidate, and a
task, and predicts all tokens of the label at once. The label's tokens are those of one tokenizer, the judge, for all
candidates, so that only the query differs. The answers are decoded by the judge and scored as in an evaluation. The
scores of a query of pixels show what can be read at all; a candidate is judged by how near its tokens come to them, and
by what its tokens of a label cost to write (``writing``).

``covray nano probe nano/vqgan --out nano``: 1,500 steps of 64 pairs, 25 minutes on two cores.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from covray.errors import ConfigError
from covray.evaluation.scores import score
from covray.models.tokenizer.vqgan import Tokenizer
from covray.pairs.scenes import CLASSES
from covray.recipes.nano.data import KINDS, SIZE_PX
from covray.recipes.nano.loop import highest_rates, muon_and_adamw, set_rates
from covray.recipes.nano.lvm import ADAMW_RATE, MUON_RATE, TASK_PICTURES
from covray.recipes.nano.writing import neighbour_nats
from covray.tasks import TASKS

WIDTH, LAYERS, HEADS, INNER = 256, 6, 4, 704
BATCH = 64
CELLS = 8
"""Positions along a side of the label's grid: the judge writes 8 x 8 tokens."""
QUERY_KINDS = ("colour", "grey", "dark")
META = {"classes": ["sky", *CLASSES]}
REPORT_EVERY_STEPS = 50
COUNTED_SCENES = 2000
"""Training scenes whose labels are counted for ``label_nats``."""


@dataclass(frozen=True)
class ProbeData:
    """Queries and labels of the same scenes, for training or for scoring."""

    queries: Tensor
    """Pixels uint8 [n, 3 kinds, 64, 64, 3], or a candidate's tokens int64 [n, 3 kinds, t]."""
    labels: Tensor
    """The judge's tokens of the seven labels, int64 [n, 7 tasks, 64]."""


class _Block(nn.Module):
    """A pre-norm transformer layer without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_up = nn.Linear(WIDTH, 2 * INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[b, cells, width] -> the same shape."""
        parts = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class QueryReader(nn.Module):
    """A network from a query and its task to logits of the label's tokens."""

    def __init__(self, codes: int | None, grid: int, label_codes: int) -> None:
        """Make an untrained reader.

        Args:
            codes: Codes of the candidate, or None for a query of pixels.
            grid: Tokens along a side of the candidate's pictures; not used for pixels.
            label_codes: Codes of the judge.
        """
        super().__init__()
        self.grid = grid
        self.stem = _pixel_stem() if codes is None else None
        if codes is not None:
            # Grids that eight cells divide are folded into them; others are attended to as they are.
            self.fold = grid // CELLS if grid % CELLS == 0 else 1
            self.embed = nn.Embedding(codes, WIDTH // self.fold**2)
            self.join = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.task = nn.Embedding(len(TASKS), WIDTH)
        self.places = nn.Parameter(torch.randn(CELLS**2, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(_Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, label_codes, bias=False)
        if codes is not None and self.fold * CELLS != grid:
            self.query_places = nn.Parameter(torch.randn(grid**2, WIDTH) * 0.02)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, 0, 0.02)

    def forward(self, query: Tensor, task: Tensor) -> Tensor:
        """Pixels uint8 [b, 64, 64, 3] or tokens [b, t], and tasks [b] -> logits [b, 64, label codes]."""
        place = self.places + self.task(task)[:, None]  # [b, 64, width]
        if self.stem is not None:
            x = place + self.stem(query.permute(0, 3, 1, 2).float() / 127.5 - 1).flatten(2).transpose(1, 2)
        elif self.fold * CELLS == self.grid:
            cells = query.unflatten(-1, (CELLS, self.fold, CELLS, self.fold)).transpose(2, 3)
            x = place + self.join(self.embed(cells.reshape(len(query), CELLS**2, -1)).flatten(2))
        else:
            x = torch.cat((place, self.join(self.embed(query)) + self.query_places), 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, : CELLS**2]))


def require_probe(judge: Tokenizer, candidate: Tokenizer | None) -> None:
    """Refuse tokenizers that a probe cannot read or write.

    Args:
        judge: The tokenizer of the labels.
        candidate: The tokenizer that is judged; None for a query of pixels.

    Raises:
        ConfigError: One is of other pictures than the rendered ones, or the judge does not write 8 x 8 tokens.
    """
    for name, tokenizer in (("query", candidate), ("--judge", judge)):
        if tokenizer is not None and tokenizer.size_px != SIZE_PX:
            raise ConfigError(
                f"{name}: reads pictures of {tokenizer.size_px} px; give a tokenizer of {SIZE_PX} px, as scenes are "
                "rendered"
            )
    if judge.grid != (CELLS, CELLS):
        raise ConfigError(
            f"--judge: writes {judge.tokens_per_image} tokens a picture; give a tokenizer that writes {CELLS**2}, such "
            "as nano"
        )


def probe_data(scenes: NDArray[np.uint8], judge_labels: NDArray[np.uint16], tokenizer: Tokenizer | None) -> ProbeData:
    """Return the queries and labels of ``scenes`` for a probe.

    Args:
        scenes: Pictures of scenes, uint8 [n, 8 kinds, 64, 64, 3] in the order of ``KINDS``.
        judge_labels: ``label_tokens`` of the same scenes.
        tokenizer: The candidate; None for pixels.
    """
    pixels = scenes[:, : len(QUERY_KINDS)]
    labels = torch.from_numpy(judge_labels.astype(np.int64))
    if tokenizer is None:
        return ProbeData(torch.from_numpy(np.ascontiguousarray(pixels)), labels)
    tokens = tokenizer.encode(np.ascontiguousarray(pixels).reshape(-1, *pixels.shape[2:]))
    return ProbeData(torch.from_numpy(tokens.astype(np.int64)).reshape(len(scenes), len(QUERY_KINDS), -1), labels)


def label_tokens(scenes: NDArray[np.uint8], judge: Tokenizer) -> NDArray[np.uint16]:
    """Return the judge's tokens of every scene's seven labels, uint16 [n, 7 tasks, t]."""
    order = [KINDS.index(TASK_PICTURES[task][1]) for task in TASKS]
    pictures = np.ascontiguousarray(scenes[:, order])
    return judge.encode(pictures.reshape(-1, *pictures.shape[2:])).reshape(len(scenes), len(TASKS), -1)


def train_reader(reader: QueryReader, data: ProbeData, steps: int, seed: int) -> None:
    """Train ``reader`` in place on random pairs of ``data``: Muon for the matrices, AdamW for the rest."""
    optimizers = muon_and_adamw(reader, reader.blocks, MUON_RATE, ADAMW_RATE)
    highest = highest_rates(optimizers)
    generator = torch.Generator().manual_seed(seed)
    inputs = input_kinds()
    started, losses = time.monotonic(), []
    for step in range(steps):
        # 100 steps of warm-up, then a cosine down to 2%, as the nano models are trained.
        rate = min(1, (step + 1) / 100) * (0.02 + 0.49 * (1 + np.cos(np.pi * step / steps)))
        set_rates(optimizers, highest, rate)
        rows = torch.randint(len(data.queries), (BATCH,), generator=generator)
        tasks = torch.randint(len(TASKS), (BATCH,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            logits = reader(data.queries[rows, inputs[tasks]], tasks)
        loss = F.cross_entropy(logits.float().flatten(0, 1), data.labels[rows, tasks].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if (step + 1) % REPORT_EVERY_STEPS == 0:
            left_s = (time.monotonic() - started) / (step + 1) * (steps - step - 1)
            recent = np.mean(losses[-REPORT_EVERY_STEPS:])
            print(f"probe: step {step + 1}/{steps}  loss {recent:.3f}  {left_s / 60:.0f} min left", flush=True)


def read_answers(reader: QueryReader, data: ProbeData) -> tuple[NDArray[np.uint16], dict[str, float]]:
    """Return the likeliest label tokens of every query, uint16 [n, 7 tasks, 64], and their perplexity by task."""
    answers = np.empty(data.labels.shape, np.uint16)
    perplexities = {}
    for index, task in enumerate(TASKS):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            queries = data.queries[:, int(input_kinds()[index])]
            logits = reader(queries, torch.full((len(queries),), index)).float()
        nats = F.cross_entropy(logits.flatten(0, 1), data.labels[:, index].flatten())
        perplexities[task] = float(nats.exp())
        answers[:, index] = logits.argmax(-1).numpy()
    return answers, perplexities


def input_kinds() -> Tensor:
    """Return which of ``QUERY_KINDS`` is the query of every task, int64 [7]."""
    return torch.tensor([QUERY_KINDS.index(TASK_PICTURES[task][0]) for task in TASKS])


def _pixel_stem() -> nn.Sequential:
    """Return convolutions from pixels [b, 3, 64, 64] to a cell each of the label's grid, [b, WIDTH, 8, 8]."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, padding=1), nn.SiLU()]
    for inputs, outputs in ((64, 64), (64, 128), (128, WIDTH)):
        layers += [nn.Conv2d(inputs, outputs, 4, 2, 1), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


@dataclass(frozen=True)
class ProbeResult:
    """What a probe read from one kind of query."""

    query: str
    """``pixels`` or ``tokens``."""
    tokens_per_image: int | None
    """None for pixels."""
    scores: dict[str, dict[str, float]]
    """Mean over the test scenes, by task and metric."""
    perplexity: dict[str, float]
    """Of the label's tokens, by task."""
    ceiling: dict[str, dict[str, float]]
    """Scores of the labels themselves after the candidate has written and read them; empty for pixels."""
    label_nats: dict[str, float]
    """What the candidate's tokens of a label cost to write, in nats a picture, by task; empty for pixels."""
    seconds: float


def run_probe(
    train: NDArray[np.uint8],
    test: NDArray[np.uint8],
    judge: Tokenizer,
    candidate: Tokenizer | None,
    steps: int,
    seed: int,
) -> ProbeResult:
    """Train a reader of queries and score what it reads.

    Args:
        train: Pictures of training scenes, uint8 [n, 8 kinds, 64, 64, 3].
        test: Pictures of other scenes, uint8 [m, 8 kinds, 64, 64, 3].
        judge: The tokenizer in which labels are predicted, the same for all candidates.
        candidate: The tokenizer that is judged; None for a query of pixels.
        steps: Optimizer steps of 64 pairs.
        seed: Seed of the reader's weights and of its batches.
    """
    started = time.monotonic()
    torch.manual_seed(seed)
    grid = 1 if candidate is None else candidate.grid[0]
    reader = QueryReader(None if candidate is None else candidate.codes, grid, judge.codes)
    train_reader(reader, probe_data(train, label_tokens(train, judge), candidate), steps, seed)
    answers, perplexity = read_answers(reader, probe_data(test, label_tokens(test, judge), candidate))
    ceiling, nats = {}, {}
    if candidate is not None:
        # What the candidate itself loses of a label bounds every score.
        ceiling = _scores(test, lambda labels, _: candidate.decode(candidate.encode(labels)))
        written = [label_tokens(scenes, candidate) for scenes in (train[:COUNTED_SCENES], test)]
        for index, task in enumerate(TASKS):
            of_train, of_test = (tokens[:, index].reshape(-1, *candidate.grid) for tokens in written)
            nats[task] = neighbour_nats(of_train, of_test, candidate.codes)
    return ProbeResult(
        query="pixels" if candidate is None else "tokens",
        tokens_per_image=None if candidate is None else candidate.tokens_per_image,
        scores=_scores(test, lambda _, index: judge.decode(answers[:, index])),
        perplexity=perplexity,
        ceiling=ceiling,
        label_nats=nats,
        seconds=round(time.monotonic() - started, 1),
    )


def _scores(
    scenes: NDArray[np.uint8], answer: Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]
) -> dict[str, dict[str, float]]:
    """Return the mean of every metric by task, of ``answer(labels [n, h, w, 3], index of the task)``."""
    table: dict[str, dict[str, float]] = {}
    for index, task in enumerate(TASKS):
        labels = np.ascontiguousarray(scenes[:, KINDS.index(TASK_PICTURES[task][1])])
        results = []
        for answered, label in zip(answer(labels, index), labels, strict=True):
            results.append(score(task, answered, label, META))
        table[task] = {}
        for name in results[0].values:
            values = [result.values[name] for result in results]
            table[task][name] = float(np.mean([value for value in values if value is not None]))
    return table
