"""Episodes: a query, and the example pairs that stand before it.

Which examples a query gets is a pure function of the seed, the query and the set of examples: not of other queries,
of the order of rows or of who asks.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from covray.chains.loading import Chains
from covray.errors import DatasetError

Selection = Literal["random", "similar", "focus"]
_CELLS = 4
"""Cells along a side of the grid that a picture's feature is averaged over."""


class Episodes:
    """One episode for each query: the query and its example pairs, of the same task.

    Queries and examples may be of one split: a pair is never its own example. There are three ways to choose examples:

    - ``random``: drawn by the seed and the query's pair id, each choice as likely as any other.
    - ``similar``: the examples whose images are nearest to the query's. The feature of an image is the mean codebook
      vector of its tokens in each of 4 x 4 cells: a thumbnail in the tokenizer's own colours, which needs neither
      decoding nor another network. Near means a small Euclidean distance.
    - ``focus``: as Chain-of-Focus chooses (Zheng et al., ICLR 2025), by similarity to the query and richness of the
      label. Richness is the entropy of the label's codes. Both count alike, in standard deviations over the examples
      of the task, as the published abstract does not weigh them. Its saliency frames are made elsewhere.
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
        """Prepare to choose examples.

        Args:
            queries: The chains that are asked for.
            examples: The chains that examples are taken from.
            pairs: Example pairs before each query.
            selection: How examples are chosen.
            seed: Seed of the choice ``random``.
            codebook: The vector of every code, float [codes, dimensions]; ``similar`` and ``focus`` need it.

        Raises:
            DatasetError: A task has too few examples.
        """
        self.queries, self.examples = queries, examples
        self.pairs, self.selection, self.seed = pairs, selection, seed

        self._blocks = _rows_by_task(examples)
        self._require_examples()
        # Only these two compare pictures; a random choice reads no tokens.
        if selection != "random":
            if codebook is None:
                raise ValueError(f"selection {selection} needs the tokenizer's codebook")
            self._codebook = codebook
            self._cells = _pooling(math.isqrt(examples.tokens_per_image))
            features = [self._feature(image) for image in examples.tokens[:, 0]]
            self._features = np.stack(features)  # [examples, cells * dimensions]
            self._richness = entropy(examples.tokens[:, -1])

    def _require_examples(self) -> None:
        """Refuse a task with fewer examples than a query needs. Raises DatasetError."""
        for task, block in _rows_by_task(self.queries).items():
            examples = self.examples.pair_ids[self._blocks.get(task, slice(0))]
            # A query that is itself among the examples has one fewer to choose from.
            own = bool(np.isin(self.queries.pair_ids[block], examples).any())
            available = len(examples) - own
            if available < self.pairs:
                raise DatasetError(
                    f"{task}: a query has {available} example pairs of its task and needs {self.pairs}; "
                    "lower --example-pairs, take examples of another split, or name the other tasks"
                )

    def __len__(self) -> int:
        """Return the number of episodes, one for each row of ``queries``."""
        return len(self.queries.pair_ids)

    def rows(self, query: int) -> NDArray[np.int64]:
        """Return the rows of ``examples`` for row ``query`` of ``queries``, int64 [pairs], in the sentence's order.

        The best stands last, next to the query, so that with fewer pairs only the first ones are missing.
        """
        task = self.queries.tasks[int(np.searchsorted(self.queries.starts, query, side="right")) - 1]
        block = self._blocks[task]
        pair_id = int(self.queries.pair_ids[query])
        if self.selection == "random":
            # Seeded by the pair, not by its row: a query has the same examples in any order of rows. A pair id may be
            # negative, a seed may not.
            generator = np.random.default_rng([self.seed, pair_id % 2**64])
            order = generator.permutation(block.stop - block.start)
        else:
            query_feature = self._feature(self.queries.tokens[query, 0])
            distance = np.linalg.norm(self._features[block] - query_feature, axis=1)
            if self.selection == "focus":
                # Both in standard deviations, so that one does not drown the other; less distance and more entropy
                # are better.
                distance = _standardized(distance) - _standardized(self._richness[block])
            order = np.argsort(distance, kind="stable")

        ranked = block.start + order
        # Queries and examples may be of one split: the query itself is left out.
        ranked = ranked[self.examples.pair_ids[ranked] != pair_id]
        # The first rank is the best; reversed, it stands next to the query.
        return ranked[: self.pairs][::-1]

    def _feature(self, tokens: NDArray[np.uint16]) -> NDArray[np.floating]:
        """Return the feature of an image of ``tokens`` [tokens], float [cells * dimensions]."""
        return (self._cells @ self._codebook[tokens]).ravel()


def _rows_by_task(chains: Chains) -> dict[str, slice]:
    """Return the rows of each task; ``chains`` are sorted by task."""
    blocks = {}
    for number, task in enumerate(chains.tasks):
        blocks[task] = slice(int(chains.starts[number]), int(chains.starts[number + 1]))
    return blocks


def entropy(tokens: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Return the entropy in nats of the codes of every row of ``tokens`` [rows, tokens]: 0 where all are one, [rows].

    The entropy of a row is the mean over its tokens of -ln(share of the token's code in the row).
    """
    # All rows are counted at once. Ids are below 2^16, so that with the row's number above them no rows share a key.
    keys = tokens + np.arange(len(tokens), dtype=np.int64)[:, None] * 2**16
    _, positions, counts = np.unique(keys, return_inverse=True, return_counts=True)
    repeats = counts[positions].reshape(tokens.shape)  # how often each token's code is in its row
    return np.asarray(np.log(tokens.shape[1] / repeats).mean(axis=1))


def _pooling(side: int) -> NDArray[np.float64]:
    """Return the matrix [cells, tokens] that averages a picture of ``side`` x ``side`` tokens over a grid of cells."""
    cells = min(_CELLS, side)
    along = np.arange(side) * cells // side  # the cell of each row, and of each column
    cell_of_token = (along[:, None] * cells + along).ravel()
    # A row a cell with 1 at its tokens; divided by their number it averages.
    members = np.eye(cells**2)[cell_of_token].T
    return np.asarray(members / members.sum(axis=1, keepdims=True))


def _standardized(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """Return ``values`` less their mean, in standard deviations."""
    # Examples that are all alike have no deviation; the floor leaves their zeros.
    return (values - values.mean()) / max(float(values.std()), 1e-12)
