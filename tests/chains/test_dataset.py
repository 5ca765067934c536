from __future__ import annotations

import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covray.chains.dataset import ChainDataset
from covray.chains.shard_rows import alphas_of, frame_order, shard_schema, union_alphas
from covray.errors import ConfigError, DatasetError
from covray.io import storage
from tests.chains.contract import validate_rows

Writer = Callable[..., tuple[str, list[dict[str, Any]]]]


@pytest.mark.parametrize("length", range(2, 65))
def test_alphas_split_the_chain_evenly_and_survive_float32(length: int) -> None:
    alphas = alphas_of(length)
    assert len(alphas) == length - 2
    assert list(alphas) == [float(np.float32(float(Fraction(k, length - 1)))) for k in range(1, length - 1)]
    assert all(float(np.float32(alpha)) == alpha for alpha in alphas)


def test_union_of_alphas_holds_every_length_once() -> None:
    union = union_alphas([4, 7, 2], [0.9])
    assert set(union) == set(alphas_of(4)) | set(alphas_of(7)) | {float(np.float32(0.9))}
    assert list(union) == sorted(set(union))
    assert union_alphas([4]) == union_alphas([4], [1 / 3, 2 / 3])  # 1/3 and its float32 are one alpha
    assert len(union_alphas([4, 7])) == 5  # 1/3 and 2/6 are one alpha
    assert union_alphas([2]) == ()


@pytest.mark.parametrize("alpha", [1e-60, 1 - 1e-12])
def test_an_alpha_that_float32_makes_an_end_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alphas"):
        union_alphas([4], [alpha])


@pytest.mark.parametrize("task_in_files", [True, False])
def test_rows_are_what_was_written(write_dataset: Writer, task_in_files: bool) -> None:
    out, written = write_dataset(
        {"depth": 5, "edges": 3}, rejects={0: "missing: no such file"}, task_in_files=task_in_files
    )
    dataset = ChainDataset(out)
    read = {row["pair_id"]: row for row in dataset.rows(errors=True)}
    assert len(read) == len(written) == dataset.count(errors=True)
    for expected in written:
        row = read[expected["pair_id"]]
        assert row["task"] == expected["task"]
        assert row["split"] == expected["split"]
        assert row["error"] == expected.get("error")
        if "error" in expected:
            assert row["source"] is None
            assert row["frames"] is None
            assert row["quality"] is None
            continue
        assert row["quality"] == pytest.approx(expected["quality"])
        assert row["source"].dtype == np.uint16
        assert row["source"].tolist() == expected["source"]
        assert row["label"].tolist() == expected["label"]
        assert [frame["tokens"].tolist() for frame in row["frames"]] == [f["tokens"] for f in expected["frames"]]
        assert [(f["method"], f["alpha"]) for f in row["frames"]] == [
            (f["method"], f["alpha"]) for f in expected["frames"]
        ]


def test_filters_keep_exactly_their_rows(write_dataset: Writer) -> None:
    out, written = write_dataset({"depth": 9, "edges": 7}, rejects={0: "empty: no bytes", 12: "missing: gone"})
    dataset = ChainDataset(out)

    def ids(**filters: Any) -> set[int]:
        return {row["pair_id"] for row in dataset.rows(["pair_id"], **filters)}

    good = [row for row in written if "error" not in row]
    assert ids() == {row["pair_id"] for row in good}
    assert ids(tasks=["edges"]) == {row["pair_id"] for row in good if row["task"] == "edges"}
    assert ids(split="val") == {row["pair_id"] for row in good if row["split"] == "val"}
    assert ids(tasks=["depth"], split="train", errors=True) == {
        row["pair_id"] for row in written if (row["task"], row["split"]) == ("depth", "train")
    }
    assert dataset.count() == len(good)
    assert ChainDataset(out, unfinished=True).count() == len(good)


def test_columns_are_the_ones_asked_for_in_that_order(write_dataset: Writer) -> None:
    out, _ = write_dataset({"depth": 4})
    dataset = ChainDataset(out)
    assert [list(row) for row in dataset.rows(["task", "pair_id"])] == [["task", "pair_id"]] * 4
    assert [row["task"] for row in dataset.rows(["task"], errors=True)] == ["depth"] * 4
    table = dataset.table(["task", "source"])
    assert table.schema == pa.schema([shard_schema(False).field(name) for name in ("task", "source")])
    assert dataset.table().schema == shard_schema(False)
    assert dataset.table(tasks=["pose"]).num_rows == 0
    with pytest.raises(DatasetError, match="no column tokens"):
        list(dataset.rows(["tokens"]))


def test_one_build_serves_every_length_and_method(write_dataset: Writer) -> None:
    out, written = write_dataset({"depth": 2}, lengths=(4, 6))
    dataset = ChainDataset(out)
    by_id = {row["pair_id"]: row for row in written}
    for row in dataset.rows():
        expected = by_id[row["pair_id"]]
        frames = {(frame["method"], frame["alpha"]): frame["tokens"] for frame in expected["frames"]}
        for method in ("diffusion", "linear"):
            for length in (4, 6):
                chain = dataset.chain(row, length, method)
                assert chain.dtype == np.uint16
                middle = [frames[method, alpha] for alpha in alphas_of(length)]
                assert chain.tolist() == [expected["source"], *middle, expected["label"]]
        ends = [expected["source"], expected["label"]]
        assert dataset.chain(row, 2, "linear").tolist() == ends
        assert dataset.chain(row, 4, "none").tolist() == ends


def test_what_a_dataset_lacks_is_named_with_the_remedy(write_dataset: Writer) -> None:
    out, _ = write_dataset({"depth": 2}, methods=("linear",), rejects={1: "missing: gone"})
    dataset = ChainDataset(out)
    good, bad = sorted(dataset.rows(errors=True), key=lambda row: row["error"] is not None)
    with pytest.raises(DatasetError, match=r"needs alpha 0\.25, 0\.5, 0\.75.* has 0\.3333, 0\.6667; .*--length 4,5"):
        dataset.chain(good, 5, "linear")
    with pytest.raises(
        DatasetError, match="no frames by diffusion, only by linear; build with --method linear,diffusion"
    ):
        dataset.chain(good, 4, "diffusion")
    with pytest.raises(DatasetError, match=r"rejected \(missing: gone\)"):
        dataset.chain(bad, 4, "linear")


def test_an_unfinished_dataset_is_only_for_looking(write_dataset: Writer) -> None:
    out, written = write_dataset({"depth": 4}, finished=False)
    Path(out, "shards", "task=depth", "torn.parquet").write_bytes(b"PAR1 and then the power went")
    with pytest.raises(DatasetError, match="unfinished; run the same covray build again"):
        ChainDataset(out)
    dataset = ChainDataset(out, unfinished=True)
    assert {row["pair_id"] for row in dataset.rows()} == {row["pair_id"] for row in written}
    assert dataset.unreadable == ["shards/task=depth/torn.parquet"]


def test_a_finished_dataset_that_lost_or_doubled_a_shard_is_refused(write_dataset: Writer) -> None:
    out, _ = write_dataset({"depth": 3, "edges": 2})
    shard = next(Path(out).glob("shards/task=depth/*.parquet"))
    copy, rows_of_shard = shard.with_name("copy.parquet"), pq.read_metadata(shard).num_rows

    def require_refused(rows: int) -> None:
        dataset = ChainDataset(out)
        message = f"holds {rows} rows of depth, its build wrote 3; restore the shards"
        with pytest.raises(DatasetError, match=message):
            list(dataset.rows(["pair_id"]))
        with pytest.raises(DatasetError, match=message):
            dataset.table(["task"], ["depth"])
        assert len(dataset.table(["pair_id"], ["edges"])) == 2, "the other task is whole"

    shutil.copy(shard, copy)
    require_refused(3 + rows_of_shard)
    copy.unlink()
    shard.unlink()
    require_refused(3 - rows_of_shard)


def test_a_finished_dataset_with_a_damaged_shard_is_refused(write_dataset: Writer) -> None:
    out, _ = write_dataset({"depth": 4})
    shard = next(Path(out).rglob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(DatasetError, match=rf"{shard.name}: cannot be read"):
        list(ChainDataset(out).rows())


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("_dataset.json", {"config": None}, "lacks config; build the dataset again"),
        ("_dataset.json", {"config": {"methods": ["linear"]}}, "config lacks lengths; build the dataset again"),
        ("_dataset.json", {"config": 7}, "config: input should be an object; build the dataset again"),
        ("_dataset.json", {"fingerprints": None}, "lacks fingerprints; build the dataset again"),
        ("_dataset.json", {"tokens_per_image": "16"}, "tokens_per_image: input should be a valid integer; build"),
        ("_audit.json", {"written": None}, "lacks written; delete it, and run the same covray build again"),
        ("_audit.json", {"per_task": None}, "lacks per_task; delete it, and run the same covray build again"),
    ],
)
def test_a_description_that_says_too_little_is_refused(
    write_dataset: Writer, name: str, changes: dict[str, Any], message: str
) -> None:
    """``changes`` of the file's keys; None removes one."""
    out, _ = write_dataset({"depth": 4})
    values = storage.read_json(f"{out}/{name}") | changes
    storage.write_json(f"{out}/{name}", {key: value for key, value in values.items() if value is not None})
    with pytest.raises(DatasetError, match=f"{name}: {message}"):
        ChainDataset(out)


def test_versions_are_counted_from_one(write_dataset: Writer) -> None:
    out, _ = write_dataset({"depth": 3})
    assert ChainDataset(f"{out}@1").version == 1
    for version in (0, 2):
        with pytest.raises(DatasetError, match=f"has 1 versions, no version {version}"):
            ChainDataset(f"{out}@{version}")


def test_no_dataset_and_another_version_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no _dataset\.json"):
        ChainDataset(str(tmp_path))
    (tmp_path / "_dataset.json").write_text('{"version": 2}')
    with pytest.raises(DatasetError, match="version 2, not 1"):
        ChainDataset(str(tmp_path))
    (tmp_path / "_dataset.json").write_text('{"version": ')
    with pytest.raises(DatasetError, match="cannot be read"):
        ChainDataset(str(tmp_path))


ALPHAS = alphas_of(4)


def _good(pair_id: int) -> dict[str, Any]:
    frames = [
        {"method": m, "alpha": a, "tokens": [1, 2, 3, 7]} for m, a in frame_order(["linear", "diffusion"], ALPHAS)
    ]
    return {
        "pair_id": pair_id,
        "task": "depth",
        "split": "train",
        "source": [0] * 4,
        "label": [7] * 4,
        "frames": frames,
    }


def _validate(*rows: dict[str, Any]) -> None:
    table = pa.Table.from_pylist(list(rows), shard_schema(keep_noise=True))
    validate_rows(table, tokens_per_image=4, codes=8, methods=["diffusion", "linear"], alphas=ALPHAS)


def _bad() -> dict[str, Any]:
    return {"pair_id": 2, "task": "depth", "split": "train", "error": "missing: gone"}


def test_rows_that_keep_the_contract_pass() -> None:
    _validate(_good(1), _bad(), _good(3))
    _validate(_bad())
    _validate()


def _with(**changes: Any) -> dict[str, Any]:
    return _good(77) | changes


@pytest.mark.parametrize(
    ("row", "what"),
    [
        (_with(source=[0] * 3), "source does not have 4 tokens"),
        (_with(label=[0, 1, 2, 8]), "label has a token beyond the 8 codes"),
        (_with(label=[0, 1, 2, None]), "label has an empty token"),
        (_with(source=None), "no error and no source"),
        (_with(frames=None), "no error and no frames"),
        (_with(frames=_good(0)["frames"][:-1]), "does not have 4 frames"),
        (_with(frames=_good(0)["frames"][::-1]), "methods and alphas"),
        (_with(frames=[f | {"alpha": 0.5} for f in _good(0)["frames"]]), "methods and alphas"),
        (_with(frames=[f | {"tokens": [1, 2, 3, 9]} for f in _good(0)["frames"]]), "a frame has a token beyond"),
        (_with(frames=[f | {"tokens": None} for f in _good(0)["frames"]]), "a frame does not have 4 tokens"),
        (_with(error="missing: gone"), "it has an error and yet source"),
        (_bad() | {"pair_id": 77, "error": "something broke"}, "not 'reason: detail'"),
        (_bad() | {"pair_id": 77, "source_noise": b"1234"}, "it has an error and yet source_noise"),
        (_bad() | {"pair_id": 77, "quality": {"source_psnr": 1.0}}, "it has an error and yet quality"),
    ],
)
def test_a_row_that_breaks_the_contract_is_named(row: dict[str, Any], what: str) -> None:
    with pytest.raises(AssertionError, match=f"pair 77: .*{what}"):
        _validate(_good(1), _bad(), row, _good(3))


def test_a_table_of_another_schema_is_refused() -> None:
    table = pa.Table.from_pylist([_good(1)], shard_schema(keep_noise=False))
    for broken, what in [
        (table.drop_columns("frames"), "column frames is missing"),
        (table.set_column(0, "pair_id", pa.array([1], pa.int32())), "pair_id is int32, not int64"),
    ]:
        with pytest.raises(AssertionError, match=what):
            validate_rows(broken, tokens_per_image=4, codes=8, methods=["linear"], alphas=ALPHAS)
