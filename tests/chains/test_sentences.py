from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from covray.chains.dataset import ChainDataset
from covray.chains.loading import Chains, count_pairs
from covray.chains.mapped import MappedChains, Source, count_queries
from covray.chains.quality import chain_quality, kept_count
from covray.chains.sentences import Sentences, loss_tokens, micro_batches, require_context, step_bounds
from covray.chains.shard_rows import alphas_of, union_alphas
from covray.config import SentencesConfig
from covray.errors import ConfigError, CovrayError, DatasetError

Writer = Callable[..., tuple[str, list[dict[str, Any]]]]
TOKENS = 3  # of a picture
CONTEXT = 4096


def numbered(sizes: list[int], lengths: tuple[int, ...]) -> Chains:
    """Chains of tasks of ``sizes`` pairs, in which every token of every picture is its own number."""
    alphas = union_alphas(lengths)
    shape = (sum(sizes), len(alphas) + 2, TOKENS)
    places = {alpha: place for place, alpha in enumerate(alphas, 1)}
    pictures = {n: np.array([0, *(places[alpha] for alpha in alphas_of(n)), shape[1] - 1]) for n in {2, *lengths}}
    return Chains(
        np.arange(np.prod(shape), dtype=np.uint16).reshape(shape),
        np.arange(shape[0]),
        tuple(f"task {number}" for number in range(len(sizes))),
        np.cumsum([0, *sizes]),
        pictures,
    )


@st.composite
def streams(draw: st.DrawFn) -> Sentences:
    pairs = tuple(draw(st.sets(st.integers(0, 3), min_size=1)))
    lengths = tuple(draw(st.sets(st.sampled_from([2, 3, 4, 7]), min_size=1)))
    sizes = draw(st.lists(st.integers(max(pairs) + 1, max(pairs) + 6), min_size=1, max_size=3))
    config = SentencesConfig(
        method=draw(st.sampled_from(["none", "linear"])),
        lengths=lengths,
        pairs=pairs,
        loss=draw(st.sampled_from(["all", "chains", "chain", "answer"])),
    )
    return Sentences(numbered(sizes, config.lengths), config, CONTEXT, draw(st.integers(0, 2**40)))


def again(sentences: Sentences, **changes: Any) -> Sentences:
    """The same stream, made anew, of a configuration that differs by ``changes``."""
    config = sentences.config.model_copy(update=changes)
    return Sentences(sentences.chains, config, CONTEXT, sentences.seed)


# --- which sentences there are -------------------------------------------------------------------------------------


@given(streams())
@settings(max_examples=25, deadline=None)
def test_a_sentence_is_the_same_whenever_and_by_whomever_it_is_asked_for(sentences: Sentences) -> None:
    indices = range(4 * len(sentences))
    ids = [sentences.sentence(index).ids for index in indices]
    other = again(sentences)
    for index in reversed(indices):
        assert np.array_equal(other.sentence(index).ids, ids[index])


@given(streams())
@settings(max_examples=25, deadline=None)
def test_every_pair_is_the_query_once_an_epoch(sentences: Sentences) -> None:
    for epoch in range(3):
        indices = range(epoch * len(sentences), (epoch + 1) * len(sentences))
        assert sorted(sentences.rows(index)[-1] for index in indices) == list(range(len(sentences)))


@given(streams())
@settings(max_examples=25, deadline=None)
def test_examples_are_of_the_querys_task_and_distinct(sentences: Sentences) -> None:
    starts = sentences.chains.starts
    for index in range(2 * len(sentences)):
        length, pairs = sentences.shape(index)
        assert pairs in sentences.config.pairs
        assert length in sentences.config.lengths or (length, sentences.config.method) == (2, "none")
        rows = sentences.rows(index)
        assert len(set(rows)) == len(rows) == pairs + 1
        assert len(set(np.searchsorted(starts, rows, side="right"))) == 1


@given(streams())
@settings(max_examples=25, deadline=None)
def test_a_sentence_is_its_chains_end_to_end(sentences: Sentences) -> None:
    chains = sentences.chains
    alphas = union_alphas(sentences.config.lengths)
    for index in range(len(sentences)):
        length, _ = sentences.shape(index)
        expected: list[int] = []
        for row in sentences.rows(index):
            frames = [alphas.index(alpha) + 1 for alpha in alphas_of(length)]
            for picture in (0, *frames, len(alphas) + 1):
                expected += chains.tokens[row, picture].tolist()
        sentence = sentences.sentence(index)
        assert sentence.ids.dtype == np.uint16
        assert sentence.ids.tolist() == expected
        assert sentences.tokens(index) == len(expected)


def test_every_choice_of_examples_is_as_likely_as_any_other() -> None:
    sentences = Sentences(numbered([5, 3], (2,)), SentencesConfig(lengths=(2,), pairs=(2,)), CONTEXT, seed=1)
    met = Counter(tuple(sentences.rows(index)) for index in range(600 * len(sentences)))
    first = {rows: count for rows, count in met.items() if rows[-1] < 5}
    assert len(first) == 5 * 4 * 3
    assert all(abs(count - 600 / 12) < 5 * 50**0.5 for count in first.values())
    assert len(met) == len(first) + 3 * 2


def test_lengths_and_pairs_are_drawn_from_all_of_their_sets() -> None:
    config = SentencesConfig(lengths=(2, 3, 4), pairs=(0, 1, 3))
    sentences = Sentences(numbered([450], config.lengths), config, CONTEXT, seed=0)
    drawn = Counter(sentences.shape(index) for index in range(2 * len(sentences)))
    assert set(drawn) == {(length, pairs) for length in config.lengths for pairs in config.pairs}
    assert min(drawn.values()) > 50  # of 100


def test_epochs_and_seeds_differ() -> None:
    config = SentencesConfig(lengths=(2,))
    chains = numbered([40], (2,))
    orders = {
        tuple(int(sentences.rows(index)[-1]) for index in range(epoch * 40, (epoch + 1) * 40))
        for sentences in (Sentences(chains, config, CONTEXT, seed) for seed in range(3))
        for epoch in range(3)
    }
    assert len(orders) == 9


@given(streams())
@settings(max_examples=25, deadline=None)
def test_runs_that_differ_in_frames_or_loss_see_the_same_pairs(sentences: Sentences) -> None:
    for index in range(len(sentences)):
        for changes in ({"lengths": (2,)}, {"method": "none"}, {"loss": "answer"}):
            assert np.array_equal(again(sentences, **changes).rows(index), sentences.rows(index))


@given(streams())
@settings(max_examples=25, deadline=None)
def test_no_method_and_length_2_are_the_same_sentence_without_frames(sentences: Sentences) -> None:
    none, two = again(sentences, method="none"), again(sentences, lengths=(2,))
    for index in range(len(sentences)):
        length, pairs = sentences.shape(index)
        whole = sentences.sentence(index).ids.reshape(pairs + 1, length, TOKENS)
        assert np.array_equal(none.sentence(index).ids, whole[:, [0, -1]].reshape(-1))
        assert np.array_equal(two.sentence(index).ids, none.sentence(index).ids)


def test_fewer_examples_are_the_same_sentence_without_its_beginning() -> None:
    config = SentencesConfig(lengths=(4,), pairs=(3,))
    sentences = Sentences(numbered([9, 5], (4,)), config, CONTEXT, seed=3)
    for pairs in (0, 1, 2):
        fewer = again(sentences, pairs=(pairs,))
        for index in range(2 * len(sentences)):
            ids = fewer.sentence(index).ids
            assert len(ids) == (pairs + 1) * 4 * TOKENS
            assert np.array_equal(sentences.sentence(index).ids[-len(ids) :], ids)


# --- loss ----------------------------------------------------------------------------------------------------------


@given(streams())
@settings(max_examples=25, deadline=None)
def test_loss_is_taken_where_the_configuration_says(sentences: Sentences) -> None:
    for index in range(len(sentences)):
        ids = sentences.sentence(index).ids
        length, pairs = sentences.shape(index)
        chains = ids.reshape(pairs + 1, length, TOKENS)
        expected = {
            "all": ids[1:],
            "chains": np.concatenate([chain[1:].reshape(-1) for chain in chains]),
            "chain": ids[-(length - 1) * TOKENS :],  # all of the query's chain but its image
            "answer": sentences.chains.tokens[sentences.rows(index)[-1], -1],
        }[sentences.config.loss]
        assert np.array_equal(ids[sentences.sentence(index).loss_at], expected)
        (batch,) = micro_batches(sentences, index, index + 1, rank=0, world=1, micro_tokens=1)
        assert batch is not None
        assert batch.targets.tolist() == expected.tolist()


# --- steps and shares ----------------------------------------------------------------------------------------------


@given(streams(), st.integers(0, 40), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_a_step_has_as_many_sentences_as_fit(sentences: Sentences, first: int, batch_tokens: int) -> None:
    last = step_bounds(sentences, first, batch_tokens)
    tokens = sum(sentences.tokens(index) for index in range(first, last))
    assert last > first
    assert tokens <= batch_tokens or last == first + 1
    assert tokens + sentences.tokens(last) > batch_tokens


@given(streams(), st.integers(0, 20), st.integers(1, 25), st.integers(1, 200))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("world", range(1, 6))
def test_workers_share_every_sentence_of_a_step_once(
    world: int, sentences: Sentences, first: int, count: int, micro_tokens: int
) -> None:
    last = first + count
    shares = [micro_batches(sentences, first, last, rank, world, micro_tokens) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # collectives pair up
    assert any(share[-1] is not None for share in shares)  # and no worker waits for nothing
    carried = 0
    for rank, share in enumerate(shares):
        batches = [batch for batch in share if batch is not None]
        assert share[: len(batches)] == batches
        shared = []
        for batch in batches:
            assert sum(batch.lengths) == len(batch.ids)
            assert len(batch.ids) <= micro_tokens or len(batch.lengths) == 1
            shared += [tuple(part.tolist()) for part in batch.ids.split(list(batch.lengths))]
            ends = np.cumsum(batch.lengths) - 1
            assert not set(ends) & set(batch.positions.tolist())
            carried += len(batch.positions)
        assert all(len(sentence) >= len(following) for sentence, following in pairwise(shared))
        own = [tuple(sentences.sentence(index).ids.tolist()) for index in range(first + rank, last, world)]
        assert sorted(shared) == sorted(own)
    assert carried == loss_tokens(sentences, first, last)


def test_small_sentences_fill_a_batch_and_equal_lengths_lie_together() -> None:
    config = SentencesConfig(lengths=(2, 4), pairs=(0, 1), loss="answer")
    sentences = Sentences(numbered([64], config.lengths), config, CONTEXT, seed=0)
    batches = micro_batches(sentences, 0, 64, 0, 1, 60)
    for batch, following in pairwise(batches):
        assert batch is not None
        assert following is not None
        runs = [length for length, _ in groupby(batch.lengths)]
        assert len(runs) == len(set(runs))
        assert len(batch.ids) + following.lengths[0] > 60


# --- from the dataset ----------------------------------------------------------------------------------------------


def config_of(**values: Any) -> SentencesConfig:
    return SentencesConfig.model_validate(values)


@pytest.mark.parametrize("task_in_files", [True, False])
@pytest.mark.parametrize("method", ["none", "linear", "diffusion"])
def test_chains_are_the_rows_of_the_split_in_order(write_dataset: Writer, method: str, task_in_files: bool) -> None:
    rejects = {0: "missing: gone"}
    sizes = {"edges": 7, "depth": 6, "pose": 4, "normals": 4}
    out, _ = write_dataset(sizes, lengths=(4, 6), rejects=rejects, task_in_files=task_in_files)
    dataset = ChainDataset(out)
    config = config_of(method=method, lengths=[2, 4, 6])
    chains = Chains.load(dataset, config, "train")
    rows = sorted(dataset.rows(split="train"), key=lambda row: (row["task"], row["pair_id"]))
    assert chains.tokens.dtype == np.uint16
    assert chains.tokens.shape == (len(rows), 2 if method == "none" else 8, 16)
    assert chains.pair_ids.tolist() == [row["pair_id"] for row in rows]
    assert chains.tasks == ("depth", "edges", "normals", "pose")
    for task, first, last in zip(chains.tasks, chains.starts, chains.starts[1:], strict=False):
        assert [row["task"] for row in rows[first:last]] == [task] * (last - first)
    assert set(chains.pictures) == ({2} if method == "none" else {2, 4, 6})
    for length, pictures in chains.pictures.items():
        expected = [dataset.chain(row, length, method) for row in rows]
        assert np.array_equal(chains.tokens[:, pictures], expected)
    counts = count_pairs(dataset, config, "train")
    assert (*counts,) == chains.tasks
    assert [*counts.values()] == np.diff(chains.starts).tolist()


def test_only_the_tasks_asked_for_are_read(write_dataset: Writer) -> None:
    out, written = write_dataset({"edges": 9, "depth": 7, "pose": 8})
    config = config_of(tasks=["edges", "pose"])
    chains = Chains.load(ChainDataset(out), config, "train")
    train = [row for row in written if row["split"] == "train" and row["task"] != "depth"]
    assert sorted(chains.pair_ids) == sorted(row["pair_id"] for row in train)
    assert chains.tasks == tuple(count_pairs(ChainDataset(out), config, "train")) == ("edges", "pose")


def test_other_files_and_another_order_of_rows_give_the_same_sentences(write_dataset: Writer) -> None:
    out, _ = write_dataset({"depth": 23, "edges": 18})
    config = config_of(method="linear", pairs=[0, 2])

    def sentences() -> Sentences:
        return Sentences(Chains.load(ChainDataset(out), config, "train"), config, CONTEXT, seed=5)

    before = sentences()
    generator = np.random.default_rng(0)
    for folder in Path(out, "shards").iterdir():
        table = pq.ParquetDataset(sorted(folder.glob("*.parquet")), partitioning=None).read()
        for file in folder.glob("*.parquet"):
            file.unlink()
        for number, part in enumerate(np.array_split(generator.permutation(len(table)), 5)):
            pq.write_table(table.take(part), folder / f"{generator.integers(10**9)}-{number}.parquet")
    after = sentences()
    for index in range(3 * len(before)):
        assert np.array_equal(before.sentence(index).ids, after.sentence(index).ids)


def test_without_frames_a_dataset_of_ends_is_enough(write_dataset: Writer) -> None:
    out, _ = write_dataset({"depth": 8}, methods=())
    for config in (config_of(method="none", lengths=[4]), config_of(lengths=[2])):
        chains = Chains.load(ChainDataset(out), config, "train")
        assert chains.tokens.shape == (6, 2, 16)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "split", "line"),
    [
        ({"method": "diffusion"}, "train", r"no frames by diffusion, only by linear; build with --method"),
        ({"lengths": [4, 5]}, "train", r"a chain of 5 needs alpha 0\.25, 0\.5, 0\.75, .*build with --length 4,5"),
        ({"pairs": [1, 4]}, "train", r"edges has 3 good pairs in split train, a sentence of 4 \+ 1 chains needs 5"),
        ({"pairs": [1]}, "val", r"edges has 1 good pairs in split val, .* needs 2; lower --example-pairs"),
        ({"tasks": ["depth", "pose"]}, "train", r"pose has 0 good pairs in split train"),
        ({}, "test", r"no good pairs in split test, only in train, val; set sentences\.split"),
        ({"tasks": ["pose"]}, "train", r"no good pairs in split train, only in none"),
    ],
)
def test_what_the_dataset_cannot_give_is_one_line_before_and_while_loading(
    write_dataset: Writer, values: dict[str, Any], split: str, line: str
) -> None:
    out, _ = write_dataset({"depth": 12, "edges": 4}, methods=("linear",))
    dataset = ChainDataset(out)
    config = config_of(**{"method": "linear"} | values)
    for refuses in (count_pairs, Chains.load):
        with pytest.raises(DatasetError, match=line) as caught:
            refuses(dataset, config, split)
        assert "\n" not in str(caught.value)


def test_a_rejected_pair_does_not_count(write_dataset: Writer) -> None:
    out, _ = write_dataset({"depth": 4}, rejects={0: "missing: gone", 1: "missing: gone"})
    with pytest.raises(DatasetError, match="depth has 1 good pairs"):
        Chains.load(ChainDataset(out), config_of(), "train")


@pytest.mark.parametrize("name", ["source", "frames"])
def test_a_shard_of_other_pictures_is_one_line(write_dataset: Writer, name: str) -> None:
    out, _ = write_dataset({"depth": 8})
    shard = next(Path(out).rglob("*.parquet"))
    table = pq.read_table(shard, partitioning=None)
    rows = table.to_pylist()
    rows[0][name] = rows[0][name][:-1]
    pq.write_table(table.from_pylist(rows, table.schema), shard)
    with pytest.raises(DatasetError, match="are expected; build the dataset again"):
        Chains.load(ChainDataset(out), config_of(), "train")


def test_sentences_beyond_the_context_are_refused_with_the_arithmetic() -> None:
    line = (
        "sentences: 8 pictures x (2 + 1) chains x 64 tokens = 1536 tokens exceed the context of 1024 (16 pictures); "
        "lower --length or --example-pairs"
    )
    with pytest.raises(ConfigError) as caught:
        require_context(config_of(lengths=[2, 8], pairs=[0, 2]), 64, 1024)
    assert str(caught.value) == line
    require_context(config_of(lengths=[8], pairs=[1]), 64, 1024)  # fills it exactly
    require_context(config_of(method="none", lengths=[64], pairs=[7]), 64, 1024)
    chains = numbered([9], (4,))
    config = config_of(lengths=[4], pairs=[1])
    Sentences(chains, config, 8 * TOKENS, seed=0)
    with pytest.raises(CovrayError, match=r"4 pictures x \(1 \+ 1\) chains x 3 tokens = 24 tokens"):
        Sentences(chains, config, 8 * TOKENS - 1, seed=0)


# --- the worst chains left out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["diffusion", "none"])
def test_the_worst_chains_of_each_task_are_left_out_of_the_training_split_alone(
    write_dataset: Writer, method: str
) -> None:
    path, rows = write_dataset({"depth": 12, "edges": 8})
    dataset = ChainDataset(path)
    whole, some = config_of(method=method), config_of(method=method, drop_worst=0.5)
    all_chains, chains = (Chains.load(dataset, config, "train") for config in (whole, some))
    assert count_pairs(dataset, some, "train") == dict(zip(chains.tasks, np.diff(chains.starts).tolist(), strict=True))
    assert len(chains.pair_ids) < len(all_chains.pair_ids)
    quality = {row["pair_id"]: chain_quality(row["quality"]) for row in rows}
    for task, first, last in zip(chains.tasks, chains.starts, chains.starts[1:], strict=False):
        kept = chains.pair_ids[first:last].tolist()
        others = {row["pair_id"] for row in rows if (row["task"], row["split"]) == (task, "train")} - set(kept)
        assert len(kept) == kept_count(len(kept) + len(others), 0.5)
        assert max(quality[pair] for pair in others) <= min(quality[pair] for pair in kept)
    places = np.searchsorted(all_chains.pair_ids[: all_chains.starts[1]], chains.pair_ids[: chains.starts[1]])
    assert (all_chains.tokens[places] == chains.tokens[: chains.starts[1]]).all()
    assert (Chains.load(dataset, some, "val").pair_ids == Chains.load(dataset, whole, "val").pair_ids).all()
    for split in ("train", "val"):
        mapped, loaded = MappedChains([Source(dataset)], some, split), Chains.load(dataset, some, split)
        assert mapped.starts.tolist() == loaded.starts.tolist()
        rows, length = np.arange(len(loaded)), 2 if method == "none" else 4
        assert (mapped.take(rows, length) == loaded.take(rows, length)).all(), "as a training maps them"
    assert count_queries([Source(dataset, 2.0)], some, "train") == 2 * len(chains)


def test_without_diffused_frames_no_quality_is_known(write_dataset: Writer) -> None:
    path, _ = write_dataset({"depth": 12}, methods=("linear",))
    with pytest.raises(DatasetError, match="drop_worst"):
        count_pairs(ChainDataset(path), config_of(method="linear", drop_worst=0.2), "train")
