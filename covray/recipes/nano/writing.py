"""What a picture costs to write in a tokenizer's tokens: a bound that needs no network.

A model writes a label token by token. So the labels of a good tokenizer are not only exact but easy to predict: a
region of one colour should be one code again and again. Tokens that also describe their surroundings state everything
several times, and the model can err each time. The bound is the cross-entropy of a token given those at its left, above
it, and between the two, with counts interpolated as Witten and Bell do (IEEE Trans. Inf. Theory 37, 1991).
An LVM, which sees the query too, should need less.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


def neighbour_nats(train: NDArray[np.uint16], test: NDArray[np.uint16], codes: int) -> float:
    """Return the nats that a picture costs, the mean over pictures.

    Args:
        train: Tokens of the pictures that are counted, [n, side, side].
        test: Tokens of other pictures, [m, side, side].
        codes: Codes of the tokenizer.
    """
    written, expected = train.astype(np.int64).ravel(), test.astype(np.int64).ravel()
    p = np.full(expected.shape, 1 / codes)
    for counted, asked in zip(_contexts(train, codes), _contexts(test, codes), strict=True):
        p = _interpolated(counted * codes + written, asked * codes + expected, codes, p)
    return float(-np.log(p).sum() / len(test))


def _contexts(tokens: NDArray[np.uint16], codes: int) -> list[Ids]:
    """Return a number for each token's context, from none to three neighbours, int64 [pictures * side * side] each."""
    edge = codes  # what stands outside a picture
    padded = np.pad(tokens.astype(np.int64), ((0, 0), (1, 0), (1, 0)), constant_values=edge)
    left, above, between = padded[:, 1:, :-1], padded[:, :-1, 1:], padded[:, :-1, :-1]
    values = codes + 1
    contexts = [np.zeros_like(left), left, left * values + above, (left * values + above) * values + between]
    return [context.ravel() for context in contexts]


def _interpolated(counted: Ids, asked: Ids, codes: int, shorter: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability of each token in its context.

    Args:
        counted: Context and token of each training token as one number: context * codes + token.
        asked: The same of the test tokens.
        codes: Codes of the tokenizer.
        shorter: Their probabilities in the next shorter context.
    """
    pairs, times = np.unique(counted, return_counts=True)
    contexts, first = np.unique(pairs // codes, return_index=True)
    tokens = np.add.reduceat(times, first)  # of each context
    kinds = np.diff([*first, len(pairs)])
    seen = _looked_up(contexts, tokens, asked // codes)
    kinds_seen = _looked_up(contexts, kinds, asked // codes)
    together = _looked_up(pairs, times, asked)
    return np.where(seen > 0, (together + kinds_seen * shorter) / np.maximum(seen + kinds_seen, 1), shorter)


def _looked_up(keys: Ids, values: Ids, asked: Ids) -> Ids:
    """Return the value of each key of ``asked``, 0 where ``keys``, which are sorted, lack it."""
    place = np.minimum(np.searchsorted(keys, asked), len(keys) - 1)
    return np.where(keys[place] == asked, values[place], 0)
