"""Episodes: a query, and the example pairs that stand before it.

Which examples a query gets is a pure function of the seed, the query and the set of examples: not of other queries,
of the order of rows or of who asks.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from covray.chains.sentences import Chains
from covray.errors import DatasetError

Selection = Literal["random", "similar", "focus"]
_CELLS = 4  # a side of the feature's grid


class Episodes:
    """One episode for every chain of ``queries``, with ``pairs`` chains of the same task out of ``examples``.

    The two may be of one split: a pair is never its own example. ``selection``:

    - ``random``: drawn by ``seed`` and the query's pair id, each choice as likely as any other;
    - ``similar``: those whose source pictures are nearest to the query's. A picture's feature is the mean codebook
      vector of its tokens in each of 4 x 4 cells, that is, a thumbnail in the tokenizer's own colours: it needs neither
      decoding nor another network. Near is a small Euclidean distance;
    - ``focus``: as Chain-of-Focus chooses (Zheng et al., ICLR 2025), by similarity to the query and richness of the
      target. Richness is the entropy of the label's codes. Both count alike, in standard deviations over the examples
      of the task, as the published abstract does not weigh them. Its saliency frames are not made here.

    ``codebook``: float [codes, dimensions], for the last two. Raises DatasetError when a task has too few examples.
    """

    def __init__(
        self,
        queries: Chains,
        examples: Chains,
        pairs: int,
        selection: Selection = "random",
        seed: int = 0,
        codebook: NDArray[np.floating] | None = None,
    ):
        self.queries, self.examples = queries, examples
        self.pairs, self.selection, self.seed = pairs, selection, seed
        bounds = zip(examples.starts, examples.starts[1:], strict=False)
        self._blocks = {task: slice(*block) for task, block in zip(examples.tasks, bounds, strict=True)}
        for task, first, last in zip(queries.tasks, queries.starts, queries.starts[1:], strict=False):
            there = examples.pair_ids[self._blocks.get(task, slice(0))]
            left = len(there) - bool(np.isin(queries.pair_ids[first:last], there).any())
            if left < pairs:
                raise DatasetError(
                    f"{task}: a query has {left} example pairs of its task and needs {pairs}; lower --example-pairs, "
                    "take examples of another split, or name the other tasks"
                )
        if selection != "random":
            if codebook is None:
                raise ValueError(f"selection {selection} needs the tokenizer's codebook")
            self._codebook = codebook
            self._cells = _pooling(math.isqrt(examples.tokens_per_image))
            self._features = np.stack([self._feature(tokens) for tokens in examples.tokens[:, 0]])
            self._richness = entropy(examples.tokens[:, -1])

    def __len__(self) -> int:
        """Episodes: the rows of ``queries``."""
        return len(self.queries.pair_ids)

    def rows(self, query: int) -> NDArray[np.int64]:
        """Rows of ``examples`` for row ``query`` of ``queries``, int64 [pairs], in the order of the visual sentence.

        The best stands last, next to the query, so that with fewer pairs only the first ones are missing.
        """
        task = self.queries.tasks[int(np.searchsorted(self.queries.starts, query, side="right")) - 1]
        block = self._blocks[task]
        pair_id = int(self.queries.pair_ids[query])
        if self.selection == "random":
            generator = np.random.default_rng([self.seed, pair_id % 2**64])
            order = generator.permutation(block.stop - block.start)
        else:
            away = np.linalg.norm(self._features[block] - self._feature(self.queries.tokens[query, 0]), axis=1)
            if self.selection == "focus":
                away = _standard(away) - _standard(self._richness[block])
            order = np.argsort(away, kind="stable")
        ranked = block.start + order
        ranked = ranked[self.examples.pair_ids[ranked] != pair_id]
        return ranked[: self.pairs][::-1]

    def _feature(self, tokens: NDArray[np.uint16]) -> NDArray[np.floating]:
        """The feature of a picture of ``tokens``, flat."""
        return (self._cells @ self._codebook[tokens]).ravel()


def entropy(tokens: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Entropy in nats of the codes of every row of ``tokens`` [rows, tokens]: 0 where all are one, [rows]."""
    keyed = tokens + np.arange(len(tokens), dtype=np.int64)[:, None] * 2**16  # a code of another row is another code
    _, place, counts = np.unique(keyed, return_inverse=True, return_counts=True)
    repeats = counts[place].reshape(tokens.shape)  # of each token's code in its row
    return np.asarray(np.log(tokens.shape[1] / repeats).mean(axis=1))


def _pooling(side: int) -> NDArray[np.float64]:
    """The means over a grid of cells as a matrix [cells, tokens], for pictures of ``side`` x ``side`` tokens."""
    cells = min(_CELLS, side)
    of_row = np.arange(side) * cells // side
    belongs = np.eye(cells**2)[(of_row[:, None] * cells + of_row).ravel()].T
    return np.asarray(belongs / belongs.sum(axis=1, keepdims=True))


def _standard(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """``values`` less their mean, in standard deviations."""
    return (values - values.mean()) / max(float(values.std()), 1e-12)
