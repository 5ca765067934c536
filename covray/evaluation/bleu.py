"""BLEU of captions: how many of their words, pairs, triples and quadruples of words the expected captions have."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

LONGEST = 4


def corpus_bleu(written: Sequence[str], expected: Sequence[str]) -> float:
    """Return BLEU-4 of a set of texts with one reference each, without smoothing (Papineni et al. 2002).

    Texts are split at blanks. The score is the geometric mean of the n-gram precisions of the whole set, times
    exp(1 - expected words / written words) where fewer words are written than expected.

    Args:
        written: The texts to score.
        expected: Their references.
    """
    common, present = [0] * LONGEST, [0] * LONGEST
    written_words = expected_words = 0
    for text, reference in zip(written, expected, strict=True):
        own, other = text.split(), reference.split()
        written_words += len(own)
        expected_words += len(other)
        for size in range(1, LONGEST + 1):
            counts = _ngrams(own, size)
            common[size - 1] += (counts & _ngrams(other, size)).total()
            present[size - 1] += counts.total()
    if not min(common):
        return 0.0
    mean_log = sum(math.log(hits / all_) for hits, all_ in zip(common, present, strict=True)) / LONGEST
    return math.exp(mean_log + min(0.0, 1 - expected_words / written_words))


def _ngrams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))
