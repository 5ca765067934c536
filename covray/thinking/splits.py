"""How a caption is parted for masked training: whose features the decoder reads, and which tokens it must write.

Without a split, the aligner learns a shortcut: the feature of a token gives that token by one linear map. The paper
says that tokens and features are "randomly split into two parts"; the authors' code cuts once, into a prefix and a
suffix. Everything is a pure function of (seed, epoch, index).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from covray.seeds import seed_of

SplitMode = Literal["prefix", "tokens", "none"]


@dataclass(frozen=True)
class Split:
    """The two parts of a caption of n tokens, as ascending places in 0..n-1."""

    features: NDArray[np.int64]
    """Whose features are aligned and read."""
    targets: NDArray[np.int64]
    """Which tokens are the text to write."""


@dataclass(frozen=True)
class SplitSeed:
    """What the random numbers of a split follow from."""

    seed: int
    epoch: int
    index: int
    """Of the caption in its data set."""

    def generator(self) -> np.random.Generator:
        """Return a new generator."""
        # Made anew at each call: a caption is parted alike whoever asks, and however often.
        return np.random.default_rng(seed_of("split", self.seed, self.epoch, self.index))


def split_tokens(count: int, mode: SplitMode, longest: int, seed: SplitSeed) -> Split:
    """Part a caption of generated tokens.

    Args:
        count: Its tokens, at least two.
        mode: ``prefix``: a cut s, uniform in 1..min(count - 1, longest), features before it and tokens from it on (the
            authors' code). ``tokens``: a random half of the places is read, the others are written (the paper's words).
            ``none``: everything is read and written.
        longest: The longest prefix, in tokens; of ``prefix`` only.
        seed: Where the random numbers come from.

    Raises:
        ValueError: The caption is too short to be parted.
    """
    places = np.arange(count)
    if mode == "none":
        return Split(places, places)
    if count < 2:
        raise ValueError(f"a caption of {count} tokens has no two parts")
    generator = seed.generator()
    if mode == "prefix":
        # Both sides get a token; the upper bound of ``integers`` is exclusive.
        cut = int(generator.integers(1, min(count - 1, longest) + 1))
        return Split(places[:cut], places[cut:])
    shuffled = generator.permutation(count)
    half = count // 2
    # Sorted again: both parts are read in the order of the text.
    return Split(np.sort(shuffled[:half]), np.sort(shuffled[half:]))


def split_words(caption: str, seed: SplitSeed) -> tuple[str, str]:
    """Part a caption at a random space, as ThinkDiff-CLIP does: the text that is read, and the text to write.

    A caption of one word is written whole, with nothing to read.
    """
    words = caption.split(" ")
    if len(words) < 2:
        return "", caption
    cut = int(seed.generator().integers(1, len(words)))
    return " ".join(words[:cut]), " ".join(words[cut:])
