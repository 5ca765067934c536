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
            # Clipped: an n-gram counts at most as often as the reference has it.
            common[size - 1] += (counts & _ngrams(other, size)).total()
            present[size - 1] += counts.total()
    # Without smoothing one size without a match makes the whole score 0.
    if not min(common):
        return 0.0
    # Logarithms of the precisions, one for each size of n-gram; their mean is that of the geometric mean.
    logarithms = []
    for matches, ngrams in zip(common, present, strict=True):
        logarithms.append(math.log(matches / ngrams))
    mean_log = sum(logarithms) / LONGEST
    return math.exp(mean_log + min(0.0, 1 - expected_words / written_words))


def _ngrams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))
