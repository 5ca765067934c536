"""Token files say what the shards say, are written once, and are never those of other shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from covray.chains import token_files
from covray.chains.dataset import ChainDataset
from covray.chains.loading import Chains
from covray.chains.mapped import MappedChains, Source
from covray.chains.sentences import Sentences
from covray.chains.token_files import FOLDER, token_file
from covray.config import SentencesConfig
from covray.errors import DatasetError
from tests.support.datasets import append_pairs

Writer = Callable[..., tuple[str, list[dict[str, Any]]]]


def require_equal(out: str, **chosen: Any) -> None:
    """The mapped chains are those that are read into memory, and so are the sentences of them."""
    config = SentencesConfig.model_validate({"lengths": (4,), **chosen})
    loaded = Chains.load(ChainDataset(out), config, "train")
    mapped = MappedChains([Source(ChainDataset(out))], config, "train")
    assert mapped.tasks == loaded.tasks
    assert np.array_equal(mapped.starts, loaded.starts)
    rows = np.arange(len(loaded))[::-1]
    for length in loaded.pictures:
        assert np.array_equal(mapped.take(rows, length), loaded.take(rows, length))
    streams = [Sentences(chains, config, 4096, seed=7) for chains in (loaded, mapped)]
    for index in range(2 * len(streams[0])):
        first, second = (stream.sentence(index) for stream in streams)
        assert np.array_equal(first.ids, second.ids)
        assert np.array_equal(first.loss_at, second.loss_at)


@pytest.mark.parametrize("in_memory", [False, True])
def test_mapped_chains_are_those_of_the_shards(
    write_dataset: Writer, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    out, _ = write_dataset({"pose": 7, "edges": 9, "depth": 12}, lengths=(4, 6), rejects={0: "missing: gone"})
    monkeypatch.setattr(token_files, "_TOKENS_OF_A_BATCH", 5 * 12 * 16)  # several batches of a few rows
    if in_memory:
        monkeypatch.setattr(token_files, "token_file", lambda dataset, version: None)
    require_equal(out)
    require_equal(out, method="linear", lengths=(4, 6), tasks=("depth", "pose"))
    require_equal(out, method="none", pairs=(0, 2))
    append_pairs(out, {"depth": 8, "edges": 8}, ("diffusion", "linear"), (4, 6))
    require_equal(out, pairs=(2,))
    require_equal(f"{out}@1")
    assert (Path(out) / FOLDER).exists() != in_memory


def test_a_token_file_is_written_once_and_by_each_version_of_its_own_rows(write_dataset: Writer) -> None:
    out, _ = write_dataset({"depth": 8})
    first = token_file(ChainDataset(out), 1)
    assert first is not None
    before = first.stat().st_mtime_ns
    append_pairs(out, {"depth": 4}, ("diffusion", "linear"), (4,))
    second = token_file(ChainDataset(out), 2)
    assert second is not None
    assert token_file(ChainDataset(out), 1) == first
    assert first.stat().st_mtime_ns == before
    assert [pa.ipc.open_file(str(file)).read_all().num_rows for file in (first, second)] == [8, 4]
    assert sorted(first.parent.iterdir()) == [first, second], "nothing is left aside"


def test_a_file_of_other_shards_is_not_read(write_dataset: Writer) -> None:
    out, _ = write_dataset({"depth": 8, "edges": 4})
    first = token_file(ChainDataset(out), 1)
    assert first is not None
    shard = next(Path(out).glob("shards/task=depth/*.parquet"))
    renamed = shard.rename(shard.with_name("again.parquet"))  # as when it was lost and built again
    second = token_file(ChainDataset(out), 1)
    assert second not in (None, first)
    assert not first.exists()
    renamed.unlink()
    with pytest.raises(DatasetError, match=r"holds \d rows of depth, its build wrote 8"):
        token_file(ChainDataset(out), 1)
    assert not list(Path(out, FOLDER).glob(".*")), "nothing is left aside"


def test_a_dataset_that_cannot_be_written_is_read_into_memory(
    write_dataset: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = write_dataset({"depth": 8})

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(token_files, "_write", refuse)
    assert token_file(ChainDataset(out), 1) is None
    require_equal(out)
