"""Chains in the formats of other loaders, read back as those loaders read them: equal tokens."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml

from covray.chains.dataset import ChainDataset
from covray.errors import ConfigError, DatasetError
from covray.sharing import formats
from covray.sharing.formats import export_chains, sample_of

Writer = Callable[..., tuple[str, list[dict[str, Any]]]]
Samples = dict[int, tuple[str, str, list[Any], np.ndarray]]


def expected_of(out: str) -> Samples:
    """What a dataset holds: task, split, frames and tokens of its good rows, by pair."""
    dataset = ChainDataset(out)
    expected: Samples = {}
    for row in dataset.rows():
        about, tokens = sample_of(row, dataset)
        expected[row["pair_id"]] = (row["task"], row["split"], about["frames"], tokens)
    return expected


def read_datasets(folder: Path) -> Iterator[tuple[int, str, str, list[Any], np.ndarray]]:
    """As ``load_dataset(folder)``: the card says which files are which split."""
    card = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    for entry in card["configs"][0]["data_files"]:
        for file in sorted(folder.glob(entry["path"])):
            for row in pq.read_table(file).to_pylist():
                assert row["split"] == entry["split"]
                frames = [[frame["method"], frame["alpha"]] for frame in row["frames"]]
                tokens = [row["source"], *(frame["tokens"] for frame in row["frames"]), row["label"]]
                yield row["pair_id"], row["task"], row["split"], frames, np.array(tokens, np.uint16)


def read_webdataset(folder: Path) -> Iterator[tuple[int, str, str, list[Any], np.ndarray]]:
    """As WebDataset: members with one name up to the first dot are a sample, decoded by their last ending."""
    for file in sorted(folder.glob("*.tar")):
        samples: dict[str, dict[str, Any]] = {}
        with tarfile.open(file) as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                data = tar.extractfile(member)
                assert data is not None
                decoded = json.load(data) if ending == "json" else np.load(io.BytesIO(data.read()))
                samples.setdefault(key, {})[ending] = decoded
        for sample in samples.values():
            about = sample["json"]
            assert file.name.startswith(about["split"])
            yield about["pair_id"], about["task"], about["split"], about["frames"], sample["tokens.npy"]


def read_mds(folder: Path) -> Iterator[tuple[int, str, str, list[Any], np.ndarray]]:
    """As mosaicml-streaming: a sample is between two offsets, sizes of varying columns first, then the columns."""
    for index in sorted(folder.glob("*/index.json")):
        for shard in json.loads(index.read_text())["shards"]:
            data = (index.parent / shard["raw_data"]["basename"]).read_bytes()
            assert len(data) == shard["raw_data"]["bytes"]
            count = int(np.frombuffer(data, "<u4", 1)[0])
            assert count == shard["samples"]
            offsets = np.frombuffer(data, "<u4", count + 1, 4)
            for begin, end in pairwise(offsets.tolist()):
                sample, values = data[begin:end], {}
                varying = shard["column_sizes"].count(None)
                sizes = iter(np.frombuffer(sample, "<u4", varying).tolist())
                place = 4 * varying
                for name, size in zip(shard["column_names"], shard["column_sizes"], strict=True):
                    size = next(sizes) if size is None else size
                    values[name] = sample[place : place + size]
                    place += size
                assert place == len(sample)
                about = json.loads(values["about"])
                shape = shard["column_encodings"][shard["column_names"].index("tokens")].rpartition(":")[2]
                tokens = np.frombuffer(values["tokens"], "<u2").reshape([int(size) for size in shape.split(",")])
                pair_id = int(np.frombuffer(values["pair_id"], "<i8")[0])
                yield pair_id, values["task"].decode(), index.parent.name, about["frames"], tokens


def load_datasets(folder: Path) -> Iterator[tuple[int, str, str, list[Any], np.ndarray]]:
    """By Hugging Face's own ``datasets``."""
    loaded = datasets.load_dataset(str(folder), cache_dir=str(folder.parent / "cache"))
    assert set(loaded) == {"train", "val"}
    for split, rows in loaded.items():
        for row in rows:
            assert row["split"] == split
            frames = [[frame["method"], frame["alpha"]] for frame in row["frames"]]
            tokens = [row["source"], *(frame["tokens"] for frame in row["frames"]), row["label"]]
            yield row["pair_id"], row["task"], row["split"], frames, np.array(tokens, np.uint16)


def load_webdataset(folder: Path) -> Iterator[tuple[int, str, str, list[Any], np.ndarray]]:
    """By the library ``webdataset`` itself."""
    for split in ("train", "val"):
        files = sorted(str(file) for file in folder.glob(f"{split}-*.tar"))
        assert files
        for sample in webdataset.WebDataset(files, shardshuffle=False).decode():
            about = sample["json"]
            assert about["split"] == split
            yield about["pair_id"], about["task"], about["split"], about["frames"], sample["tokens.npy"]


@pytest.mark.parametrize(
    ("form", "read"),
    [
        ("datasets", read_datasets), ("datasets", load_datasets), ("webdataset", read_webdataset),
        ("webdataset", load_webdataset), ("mds", read_mds),
    ],
)  # fmt: skip
def test_every_format_gives_equal_tokens_back(
    write_dataset: Writer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    read: Callable[[Path], Iterator[tuple[int, str, str, list[Any], np.ndarray]]],
) -> None:
    out, _ = write_dataset({"depth": 9, "edges": 7}, rejects={0: "missing: gone"})
    monkeypatch.setattr(formats, "_ROWS_OF_A_FILE", 3)
    target = tmp_path / form
    counts = export_chains(out, str(target), form, "cc-by-4.0")
    expected = expected_of(out)
    read_back = {row[0]: row[1:] for row in read(target)}
    assert read_back.keys() == expected.keys()
    for pair_id, (task, split, frames, tokens) in expected.items():
        assert read_back[pair_id][:2] == (task, split)
        assert [(method, pytest.approx(alpha)) for method, alpha in frames] == [
            (method, alpha) for method, alpha in read_back[pair_id][2]
        ]
        assert np.array_equal(read_back[pair_id][3], tokens)
        assert read_back[pair_id][3].dtype == np.uint16
    assert sum(counts.values()) == len(expected)
    card = (target / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "cc-by-4.0"
    assert ChainDataset(out).fingerprints["codebook"] in card
    assert str(tmp_path) not in card, "a card names no folder of this machine"


def test_the_same_chains_make_the_same_tars(write_dataset: Writer, tmp_path: Path) -> None:
    out, _ = write_dataset({"depth": 5})
    for name in ("first", "second"):
        export_chains(out, str(tmp_path / name), "webdataset")
    files = sorted(file.name for file in (tmp_path / "first").iterdir())
    assert files == ["README.md", "strips", "train-000000.tar", "val-000000.tar"]
    for name in (*files[:1], "strips/depth.png", *files[2:]):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_what_cannot_be_exported_is_one_line(write_dataset: Writer, tmp_path: Path) -> None:
    out, _ = write_dataset({"depth": 4})
    with pytest.raises(ConfigError, match="--as tfrecord: is none of datasets, webdataset, mds"):
        export_chains(out, str(tmp_path / "new"), "tfrecord")
    with pytest.raises(ConfigError, match="already exists"):
        export_chains(out, out, "mds")
    next(Path(out).rglob("*.parquet")).unlink()
    with pytest.raises(DatasetError, match="its build wrote 4"):
        export_chains(out, str(tmp_path / "new"), "mds")
    assert not (tmp_path / "new").exists(), "nothing half-written stays"
