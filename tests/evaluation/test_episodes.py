"""Episodes: whose examples a query gets depends on the query, the seed and the examples there are."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import numpy as np
import pytest

from covray.chains.loading import Chains
from covray.errors import DatasetError
from covray.evaluation.episodes import Episodes, Selection, entropy

SELECTIONS = get_args(Selection)
CODEBOOK = np.random.default_rng(0).normal(size=(64, 3))


def chains(sizes: dict[str, int], seed: int, side: int = 4) -> Chains:
    """Random tokens; ids of either sign, ascending within a task, as a dataset has them."""
    rng = np.random.default_rng(seed)
    ids = [np.sort(rng.integers(-(2**62), 2**62, size)) for size in sizes.values()]
    tokens = rng.integers(0, 64, (sum(sizes.values()), 2, side * side)).astype(np.uint16)
    return Chains(tokens, np.concatenate(ids), tuple(sizes), np.cumsum([0, *sizes.values()]), {})


def part(whole: Chains, kept: np.ndarray) -> Chains:
    """The rows ``kept`` (ascending) of a chain of one task."""
    return Chains(whole.tokens[kept], whole.pair_ids[kept], whole.tasks, np.array([0, len(kept)]), {})


QUERIES = chains({"depth": 7, "edges": 5}, 1)
EXAMPLES = chains({"depth": 9, "edges": 6, "pose": 4}, 2)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_examples_are_distinct_and_of_the_task_of_the_query(selection: Selection) -> None:
    episodes = Episodes(QUERIES, EXAMPLES, 3, selection, codebook=CODEBOOK)
    assert len(episodes) == 12
    for query in range(12):
        rows = episodes.rows(query)
        block = range(9) if query < 7 else range(9, 15)
        assert len({*rows}) == 3
        assert set(rows.tolist()) <= set(block)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_query_is_never_its_own_example(selection: Selection) -> None:
    episodes = Episodes(QUERIES, QUERIES, 4, selection, codebook=CODEBOOK)
    for query in range(len(episodes)):
        rows = episodes.rows(query)
        assert len(rows) == 4
        assert query not in rows
    assert sorted(episodes.rows(11)) == [7, 8, 9, 10]


@pytest.mark.parametrize("selection", SELECTIONS)
def test_fewer_pairs_are_the_last_of_more(selection: Selection) -> None:
    most = Episodes(QUERIES, EXAMPLES, 5, selection, seed=3, codebook=CODEBOOK)
    for pairs in range(5):
        fewer = Episodes(QUERIES, EXAMPLES, pairs, selection, seed=3, codebook=CODEBOOK)
        for query in range(12):
            assert fewer.rows(query).tolist() == most.rows(query)[5 - pairs :].tolist()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_episode_depends_on_no_other_query_and_on_no_order_of_asking(selection: Selection) -> None:
    whole = chains({"depth": 20}, 4)
    together = Episodes(whole, whole, 3, selection, seed=5, codebook=CODEBOOK)
    for query in reversed(range(20)):
        alone = Episodes(part(whole, np.array([query])), whole, 3, selection, seed=5, codebook=CODEBOOK)
        assert alone.rows(0).tolist() == together.rows(query).tolist()


def test_random_examples_differ_by_seed_and_query_and_are_all_as_likely() -> None:
    met: Counter[tuple[int, ...]] = Counter()
    for seed in range(1000):
        episodes = Episodes(QUERIES, EXAMPLES, 2, "random", seed)
        met[tuple(episodes.rows(8).tolist())] += 1  # 6 x 5 ordered pairs
    assert len(met) == 30
    assert all(abs(count - 1000 / 30) < 5 * (1000 / 30) ** 0.5 for count in met.values())
    episodes = Episodes(QUERIES, EXAMPLES, 4, "random", seed=0)
    assert len({tuple(episodes.rows(query)) for query in range(7)}) > 4


def test_similar_are_the_nearest_by_the_codebook_in_the_same_places() -> None:
    rng = np.random.default_rng(6)
    codebook = np.arange(64.0)[:, None]  # a grey scale
    pictures = rng.integers(0, 64, (30, 1, 64)).astype(np.uint16)
    query = part(chains({"depth": 1}, 7, side=8), np.array([0]))
    examples = Chains(np.repeat(pictures, 2, axis=1), np.arange(30), ("depth",), np.array([0, 30]), {})
    grey = pictures[:, 0].reshape(30, 4, 2, 4, 2).mean(axis=(2, 4))
    own = query.tokens[0, 0].reshape(4, 2, 4, 2).mean(axis=(1, 3))
    nearest = np.argsort(((grey - own) ** 2).sum(axis=(1, 2)))[:3]
    assert Episodes(query, examples, 3, "similar", codebook=codebook).rows(0).tolist() == nearest[::-1].tolist()


@pytest.mark.parametrize("side", [2, 3, 5, 21])
def test_grids_that_no_cells_divide_find_the_same_picture_too(side: int) -> None:
    examples = chains({"depth": 12}, 8, side)
    queries = Chains(examples.tokens, examples.pair_ids + 1, examples.tasks, examples.starts, {})  # the same pictures
    episodes = Episodes(queries, examples, 1, "similar", codebook=np.random.default_rng(9).random((64, 16)))
    assert [episodes.rows(query).tolist() for query in range(12)] == [[query] for query in range(12)]


def test_focus_weighs_richness_of_the_target_against_likeness() -> None:
    rng = np.random.default_rng(10)
    tokens = rng.integers(0, 64, (40, 2, 64)).astype(np.uint16)
    tokens[:, 1] %= rng.integers(2, 64, (40, 1)).astype(np.uint16)  # labels of few codes and of many
    examples = Chains(tokens, np.arange(40), ("depth",), np.array([0, 40]), {})
    queries = chains({"depth": 30}, 11, side=8)
    richness = entropy(tokens[:, 1])
    mean = {}
    for selection in SELECTIONS:
        episodes = Episodes(queries, examples, 1, selection, codebook=CODEBOOK)
        mean[selection] = np.mean([richness[episodes.rows(query)] for query in range(30)])
    assert mean["focus"] > mean["similar"] + 0.3
    tokens[:, 1] = tokens[0, 1]  # equally rich targets: nearness alone decides
    similar, focus = (Episodes(queries, examples, 5, how, codebook=CODEBOOK) for how in ("similar", "focus"))
    assert all(similar.rows(query).tolist() == focus.rows(query).tolist() for query in range(30))


def test_entropy_by_hand() -> None:
    tokens = np.array([[7, 7, 7, 7], [7, 8, 7, 8], [1, 2, 3, 65535], [0, 0, 0, 1]], np.uint16)
    expected = [0, np.log(2), np.log(4), 0.75 * np.log(4 / 3) + 0.25 * np.log(4)]
    assert entropy(tokens) == pytest.approx(expected)


def test_too_few_examples_are_one_line_before_any_work() -> None:
    with pytest.raises(DatasetError, match=r"edges: a query has 6 example pairs of its task and needs 7; lower"):
        Episodes(QUERIES, EXAMPLES, 7)
    with pytest.raises(DatasetError, match=r"edges: a query has 4 example pairs of its task and needs 5"):
        Episodes(QUERIES, QUERIES, 5)  # it is none of its own five
    with pytest.raises(DatasetError, match=r"edges: a query has 0 example pairs"):
        Episodes(QUERIES, chains({"depth": 9}, 2), 1)
    Episodes(QUERIES, chains({"depth": 9}, 2), 0)
    with pytest.raises(ValueError, match="codebook"):
        Episodes(QUERIES, EXAMPLES, 1, "similar")
