"""Sheets of a manifest: the right pairs, their pictures where they belong, and reasons in place of bad ones."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from covray.cli import app as cli
from covray.errors import ConfigError
from covray.io.images import Picture, encode_png
from covray.pairs.loading import LoadedPair
from covray.pairs.manifest import ManifestWriter, Pair
from covray.report.pairs_sheet import SHOWN_PX, ShownPair, draw_pairs, is_manifest, view_pairs
from tests.support.photographs import photo


def flat(level: int) -> np.ndarray:
    return np.full((20, 30, 3), level, np.uint8)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    with ManifestWriter(tmp_path / "pairs.parquet") as writer:
        for number in range(9):
            image = Picture(bytes=encode_png(photo(number)))
            writer.add(Pair("depth", "train", image, Picture(bytes=encode_png(photo(number + 50))), {"photo": number}))
        bad = Pair("edges", "val", Picture(bytes=b"no picture"), Picture(), {"photo": "\x1b[31m evil\n name"})
        writer.add(bad)
    return tmp_path / "pairs.parquet"


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def test_image_label_and_both_stand_side_by_side() -> None:
    shown = ShownPair("name", "train", LoadedPair(flat(200), flat(100)), ("a line",))
    sheet = pixels(draw_pairs([shown], "title", "subtitle"))
    row = sheet[104 + SHOWN_PX // 3]
    levels = [int(row[278 + column * (SHOWN_PX + 6) + SHOWN_PX // 2, 0]) for column in range(3)]
    assert levels == [200, 100, 150]


def test_a_label_of_another_size_is_laid_over_its_image() -> None:
    label = np.repeat(np.repeat(photo(3), 2, axis=0), 2, axis=1)
    small = pixels(draw_pairs([ShownPair("n", "s", LoadedPair(photo(1), photo(3)), ())], "t", "s"))
    large = pixels(draw_pairs([ShownPair("n", "s", LoadedPair(photo(1), label), ())], "t", "s"))
    assert np.array_equal(small, large)


def test_a_sheet_a_task_shows_so_many_pairs_and_the_same_each_time(manifest: Path, tmp_path: Path) -> None:
    paths = view_pairs(str(manifest), str(tmp_path / "out"), 4)
    assert [Path(path).name for path in paths] == ["depth.png", "edges.png"]
    first = [Path(path).read_bytes() for path in paths]
    assert pixels(first[0]).shape[0] == 104 + 4 * (SHOWN_PX + 26) + 28
    again = [Path(path).read_bytes() for path in view_pairs(str(manifest), str(tmp_path / "again"), 4)]
    assert first == again


def test_an_out_that_cannot_be_written_is_one_line(manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "pairs.parquet" / "view"
    with pytest.raises(ConfigError, match=f"^--out {out}: cannot be written"):
        view_pairs(str(manifest), str(out))


def test_manifests_are_told_from_datasets(manifest: Path, tmp_path: Path) -> None:
    assert is_manifest(str(manifest))
    assert is_manifest(str(tmp_path))
    (tmp_path / "_dataset.json").write_text("{}")
    assert not is_manifest(str(tmp_path))
    assert not is_manifest(str(tmp_path / "absent"))


def test_the_command_takes_a_manifest(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["covray", "view", str(manifest), "--limit", "2"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    folder = manifest.parent / "pairs-view"
    assert capsys.readouterr().out.split() == [str(folder / "depth.png"), str(folder / "edges.png")]
    assert sorted(path.name for path in folder.iterdir()) == ["depth.png", "edges.png"]
