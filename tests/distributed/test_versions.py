"""Versions of a dataset: which one a build writes, what readers see meanwhile, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covray.chains.audit import audit_dataset
from covray.chains.dataset import ChainDataset, shard_folder
from covray.chains.prepare import BuildModels
from covray.chains.records import AppendedPairs, Audit, DatasetRecord
from covray.chains.shard_rows import shard_schema
from covray.config import BuildConfig
from covray.distributed import build as building
from covray.distributed.build import plan_build
from covray.distributed.pool import CHECKPOINT, parquet_bytes
from covray.distributed.resumable import Output
from covray.distributed.versions import choose_version, earlier_counts, grows, pair_set, with_version
from covray.errors import DatasetError
from covray.io.storage import Folder
from covray.pairs.manifest import ManifestWriter, Pair, Picture
from covray.pairs.manifest_reading import ManifestInfo, check_manifest
from tests.support.datasets import chain_rows

Writer = Callable[..., tuple[str, list[dict[str, Any]]]]
ALPHAS = (float(np.float32(1 / 3)), float(np.float32(2 / 3)))


def info_of(ids: list[int]) -> ManifestInfo:
    return ManifestInfo(len(ids), {"depth": len(ids)}, {"train": len(ids)}, None, np.array(ids, np.int64), ())


def more_rows(count: int) -> list[dict[str, Any]]:
    """Rows of depth with other ids than those of ``write_dataset``."""
    rows = chain_rows({"depth": count}, ("diffusion", "linear"), ALPHAS, {})
    for row in rows:
        row["pair_id"] += 1
    return rows


def write_version(out: str, rows: list[dict[str, Any]], version: int) -> None:
    folder = Path(out, shard_folder(version), "task=depth")
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, shard_schema(False)).drop_columns("task"), folder / "part.parquet")


def begin_version(out: str, ids: list[int]) -> None:
    """Write the description of a dataset that an append has begun to extend to the pairs ``ids``."""
    record = DatasetRecord.read(out)
    first = pair_set(info_of([row["pair_id"] for row in ChainDataset(out).rows(["pair_id"])]))
    later = AppendedPairs(manifest="more.parquet", pairs=pair_set(info_of(ids)))
    record.model_copy(update={"pairs": record.pairs or first, "appended": [*(record.appended or ()), later]}).write(out)


def test_readers_see_the_finished_version_until_the_next_one_is(write_dataset: Writer) -> None:
    out, first = write_dataset({"depth": 5})
    second = more_rows(3)
    old = ChainDataset(out)
    before = [(row["pair_id"], row["source"].tolist()) for row in old.rows()]
    ids = [row["pair_id"] for row in [*first, *second]]
    begin_version(out, ids)
    write_version(out, second, 2)

    meanwhile = ChainDataset(out)
    assert (meanwhile.version, meanwhile.count()) == (1, 5)
    assert [(row["pair_id"], row["source"].tolist()) for row in meanwhile.rows()] == before
    with pytest.raises(DatasetError, match="unfinished"):
        ChainDataset(f"{out}@2")
    assert len(ChainDataset(out, unfinished=True, version=2).table(["pair_id"])) == 8

    audit = audit_dataset(out, np.array(ids), {"depth": 8}, 2)
    audit.model_copy(update={"versions": [*earlier_counts(Folder(out), 2), audit.counts()]}).write(out)
    new = ChainDataset(out)
    assert (new.version, new.versions, new.count()) == (2, 2, 8)
    assert {row["pair_id"] for row in new.rows()} == set(ids)
    assert new.config["pairs"] == "more.parquet"
    assert new.record.pairs == pair_set(info_of(ids))
    for reader in (old, ChainDataset(f"{out}@1"), ChainDataset(new.reference.replace("@2", "@1"))):
        assert [(row["pair_id"], row["source"].tolist()) for row in reader.rows()] == before
        assert reader.count() == len(reader.table(["pair_id"])) == 5
    assert ChainDataset(f"{out}@1").config["pairs"] == old.config["pairs"]
    with pytest.raises(DatasetError, match="has 2 versions, no version 3"):
        ChainDataset(f"{out}@3")


def test_a_folder_whose_name_ends_like_a_version_is_itself(write_dataset: Writer) -> None:
    out, _ = write_dataset({"depth": 4})
    moved = Path(out).rename(out + "@7")
    assert (ChainDataset(str(moved)).version, ChainDataset(f"{moved}@1").count()) == (1, 4)


def test_which_version_a_manifest_is(write_dataset: Writer) -> None:
    out, rows = write_dataset({"depth": 4})
    ids = [row["pair_id"] for row in rows]
    larger, largest = [*ids, 1, 2], [*ids, 1, 2, 3]
    config = BuildConfig(pairs="pairs.parquet", out=out)
    record = DatasetRecord.read(out).model_copy(update={"pairs": pair_set(info_of(ids))})
    record.write(out)

    def choose(ids: list[int], append: bool = False) -> tuple[int, int, bool]:
        output = Output(out, DatasetRecord, "covray build")
        output.inspect()
        version = choose_version(config, output, info_of(ids), append)
        return version.number, version.finished, version.is_new

    assert choose(ids) == choose(ids, append=True) == (1, 1, False)
    assert choose(larger, append=True) == (2, 1, True)
    assert grows(config, info_of(larger), append=True)
    assert not grows(config, info_of(ids), append=True)
    with pytest.raises(DatasetError, match=r"another manifest.* or --append a manifest"):
        choose(larger)

    begin_version(out, larger)
    assert choose(larger) == choose(larger, append=True) == (2, 1, False)
    assert grows(config, info_of(larger), append=False)
    with pytest.raises(DatasetError, match=r"the build of more\.parquet is unfinished; run it again"):
        choose(largest, append=True)

    Path(out, Audit.FILE).unlink()  # the first version is to be made whole before the second
    assert choose(ids) == (1, 0, False)
    with pytest.raises(DatasetError, match=r"version 1 is unfinished; run covray build --manifest pairs\.parquet"):
        choose(larger)


def test_an_append_keeps_every_pair_and_the_classes(write_dataset: Writer) -> None:
    out, rows = write_dataset({"depth": 4})
    ids = [row["pair_id"] for row in rows]
    config = BuildConfig(pairs="pairs.parquet", out=out)
    record = DatasetRecord.read(out)
    grown = with_version(config, record, info_of([*ids, 1]))
    assert [pairs.rows for pairs in grown.pair_sets[1:] if pairs] == [5]
    with pytest.raises(DatasetError, match=r"lacks 1 pairs that .* has; --append a manifest that holds all"):
        with_version(config, record, info_of([*ids[1:], 1]))


def finished_dataset(write_dataset: Writer, tmp_path: Path) -> BuildConfig:
    """Write a dataset of four pairs; return the build of a manifest with four more."""
    manifests = tmp_path / "manifests"
    manifests.mkdir()
    for name, first in (("a", 0), ("b", 4)):
        with ManifestWriter(str(manifests / f"{name}.parquet")) as writer:
            for number in range(first, first + 4):
                writer.add(Pair("depth", "train", Picture(uri=f"{number}.png"), Picture(uri="label.png")))
    out, rows = write_dataset({"depth": 4}, methods=("linear",))
    small = check_manifest(str(manifests / "a.parquet"))
    config = BuildConfig(pairs=str(manifests), out=out, methods=("linear",))
    for row, pair_id in zip(rows, small.pair_ids.tolist(), strict=True):
        row["pair_id"] = pair_id
    for shard in Path(out, "shards").rglob("*.parquet"):
        shard.unlink()
    pq.write_table(pa.Table.from_pylist(rows, shard_schema(False)), Path(out, "shards/task=depth/part.parquet"))
    record = DatasetRecord.read(out)
    settings = config.model_dump(mode="json") | {"rows_per_block": 2}
    described = {"pairs": pair_set(small), "identity": config.identity(), "config": settings}
    record.model_copy(update=described).write(out)
    return config


def test_a_plan_counts_the_new_pairs_alone(write_dataset: Writer, tmp_path: Path) -> None:
    config = finished_dataset(write_dataset, tmp_path)
    with pytest.raises(DatasetError, match="leave out --append"):
        plan_build(config.model_copy(update={"out": str(tmp_path / "absent")}), append=True)
    planned = plan_build(config, append=True)
    assert (planned.pairs, planned.per_task) == (4, {"depth": 4})


def test_an_append_counts_all_pairs_of_the_version_before_as_written(
    write_dataset: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = finished_dataset(write_dataset, tmp_path)
    record = DatasetRecord.read(config.out)
    ids = ChainDataset(config.out).table(["pair_id"])["pair_id"]
    # A build that is killed while it deletes its checkpoint leaves a part of it.
    checkpoint = Folder(config.out) / CHECKPOINT
    checkpoint.write_bytes("left.parquet", parquet_bytes(pa.table({"pair_id": ids.slice(0, 2)})))
    models = BuildModels(8, 8, record.tokens_per_image, record.codes or 0, None, dict(record.fingerprints))
    committed: list[int] = []

    def write(*_: object) -> None:
        for name in checkpoint.list_files(".parquet"):
            committed.extend(pq.read_table(checkpoint.inner_path(name))["pair_id"].to_pylist())
        raise InterruptedError

    monkeypatch.setattr(building, "ray_session", lambda: contextlib.nullcontext(2))
    monkeypatch.setattr(building, "require_on_nodes", lambda _: None)
    monkeypatch.setattr(building, "gpus_of", lambda *_: 0.0)
    monkeypatch.setattr(building, "most_actors", lambda *_: 1)
    monkeypatch.setattr(building, "_load_once", lambda config, _: (config, models))
    monkeypatch.setattr(building, "_write_version", write)
    with pytest.raises(InterruptedError):
        building.build(config, append=True)
    assert sorted(committed) == sorted(ids.to_pylist())
    committed.clear()
    with pytest.raises(InterruptedError):  # and so does the next one, which continues the version
        building.build(config)
    assert sorted(committed) == sorted(ids.to_pylist())
