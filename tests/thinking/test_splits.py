"""A split is a pure function of (seed, epoch, index), and has two parts that share nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from covray.thinking.splits import SplitSeed, split_tokens, split_words


def test_a_prefix_ends_at_a_uniform_cut_of_bounded_length() -> None:
    cuts = Counter()
    for index in range(2000):
        split = split_tokens(9, "prefix", 4, SplitSeed(0, 0, index))
        assert np.array_equal(np.concatenate((split.features, split.targets)), np.arange(9))
        cuts[len(split.features)] += 1
    assert sorted(cuts) == [1, 2, 3, 4]
    assert all(abs(count - 500) < 100 for count in cuts.values())
    lengths = {len(split_tokens(3, "prefix", 128, SplitSeed(0, 0, index)).features) for index in range(50)}
    assert lengths == {1, 2}


def test_half_of_the_tokens_are_read_and_the_others_written() -> None:
    split = split_tokens(9, "tokens", 128, SplitSeed(0, 0, 0))
    assert sorted([*split.features, *split.targets]) == list(range(9))
    assert len(split.features) == 4
    assert np.array_equal(split.features, np.sort(split.features))
    reads = [split_tokens(9, "tokens", 128, SplitSeed(0, 0, index)).features.tolist() for index in range(20)]
    assert any(places != list(range(4)) for places in reads)


def test_without_a_split_everything_is_read_and_written() -> None:
    split = split_tokens(5, "none", 128, SplitSeed(0, 0, 0))
    assert split.features.tolist() == split.targets.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("mode", ["prefix", "tokens"])
def test_a_split_follows_from_seed_epoch_and_index_alone(mode: str) -> None:
    def places(seed: SplitSeed) -> list[int]:
        return split_tokens(64, mode, 128, seed).features.tolist()  # type: ignore[arg-type]

    np.random.seed(0)
    first = places(SplitSeed(1, 2, 3))
    assert places(SplitSeed(1, 2, 3)) == first
    for other in (SplitSeed(0, 2, 3), SplitSeed(1, 0, 3), SplitSeed(1, 2, 0), SplitSeed(3, 2, 1)):
        assert places(other) != first
    with pytest.raises(ValueError, match="a caption of 1 tokens has no two parts"):
        split_tokens(1, mode, 128, SplitSeed(0, 0, 0))  # type: ignore[arg-type]


def test_words_are_parted_at_any_space() -> None:
    parts = {split_words("a red ball", SplitSeed(0, 0, index)) for index in range(50)}
    assert parts == {("a", "red ball"), ("a red", "ball")}
    assert split_words("ball", SplitSeed(0, 0, 0)) == ("", "ball")
