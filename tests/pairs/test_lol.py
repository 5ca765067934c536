"""LOL: the dark photograph of a name belongs to the bright one of that name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from covray.errors import ConfigError, ManifestError
from covray.io.images import Picture, decode, load_picture
from covray.pairs.lol import lol_pairs
from covray.pairs.manifest_reading import check_manifest
from tests.support.photographs import bomb, label_of, photo, reasons, save


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three pairs to train with, one to test, in LOL's folders; the dark is a tenth of the light."""
    root = tmp_path / "LOL"
    for folder, numbers in (("our485", (2, 5, 11)), ("eval15", (1,))):
        for number in numbers:
            save(root / folder / "high" / f"{number}.png", photo(number))
            save(root / folder / "low" / f"{number}.png", photo(number) // 10)
    return root


@pytest.mark.parametrize(("split", "folder", "numbers"), [("train", "our485", (11, 2, 5)), ("test", "eval15", (1,))])
def test_dark_and_light_are_paired_by_name(root: Path, split: str, folder: str, numbers: tuple[int, ...]) -> None:
    pairs = list(lol_pairs(root, split))
    assert [pair.image for pair in pairs] == [Picture(uri=f"{folder}/low/{number}.png") for number in numbers]
    assert [pair.label for pair in pairs] == [Picture(uri=f"{folder}/high/{number}.png") for number in numbers]
    assert {(pair.task, pair.split) for pair in pairs} == {("low_light", split)}
    for pair, number in zip(pairs, numbers, strict=True):
        assert np.array_equal(label_of(pair, root), photo(number))
        assert np.array_equal(decode(load_picture(pair.image, str(root))), photo(number) // 10)


def test_what_cannot_be_used_is_a_row_with_its_reason(root: Path, tmp_path: Path) -> None:
    low, high = root / "our485" / "low", root / "our485" / "high"
    save(low / "20.png", photo(0))  # no bright one
    save(high / "21.png", photo(0))  # no dark one
    save(low / "22.png", photo(0))
    save(high / "22.png", photo(0, 16, 25))  # of another size
    save(low / "23.png", photo(0))
    (high / "23.png").write_bytes((low / "23.png").read_bytes()[:200])
    save(low / "24.png", photo(0))
    bomb(high / "24.png")
    save(low / "25.png", photo(0))
    save(tmp_path / "secret.png", photo(0))
    (high / "25.png").symlink_to(tmp_path / "secret.png")
    pairs = list(lol_pairs(root))
    assert len(pairs) == 9
    assert reasons(pairs, root) == {
        "our485/low/20.png": "missing", "our485/low/21.png": "missing", "our485/low/22.png": "label_shape",
        "our485/low/23.png": "truncated", "our485/low/24.png": "too_large", "our485/low/25.png": "outside_root",
    }  # fmt: skip


def test_a_missing_folder_is_named(root: Path) -> None:
    (root / "our485" / "high").rename(root / "our485" / "normal")
    with pytest.raises(ManifestError, match=r"LOL: our485/high is missing; give the folder LOLdataset\.zip"):
        lol_pairs(root)
    with pytest.raises(ManifestError, match="our485/low is missing"):
        lol_pairs(root / "our485")
    with pytest.raises(ConfigError, match=r"split: LOL gives train and test \(got val\)"):
        lol_pairs(root, "val")


def test_the_command_says_when_there_are_fewer(
    root: Path, tmp_path: Path, command: Callable[..., tuple[Any, str]]
) -> None:
    (root / "our485" / "low" / "2.png").unlink()
    out = tmp_path / "pairs.parquet"
    answer, told = command("lol", root, "--out", out, "--count", 10)
    assert (answer["per_task"], answer["splits"]) == ({"low_light": 3}, {"train": 3})
    assert told.splitlines() == [
        "covray: 10 pairs asked for, only 3 present: all were taken",
        "covray: cannot be used, and will be rejected: missing 1",
    ]
    assert check_manifest(out).root == str(root)
    answer, told = command("lol", root, "--out", out, "--count", 1, "--split", "test")
    assert (answer["splits"], told) == ({"test": 1}, "")


def test_several_datasets_name_the_folder_that_holds_them(
    root: Path, tmp_path: Path, command: Callable[..., tuple[Any, str]]
) -> None:
    pairs = tmp_path / "pairs"
    command("lol", root, "--root", tmp_path, "--out", pairs / "lol.parquet")
    command("photos", root / "eval15", "--root", tmp_path, "--tasks", "edges", "--out", pairs / "edges.parquet")
    info = check_manifest(pairs)
    assert (info.root, info.per_task) == (str(tmp_path), {"edges": 2, "low_light": 3})
    rows = pq.read_table(pairs / "lol.parquet").to_pylist()
    for row in rows:
        for name in ("image", "label"):
            assert row[name]["uri"].startswith("LOL/our485/")
            assert decode(load_picture(row[name], info.root)).shape == (16, 24, 3)
