"""``covray pairs check``: what is missing is named, and label figures are the test's own counts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from numpy.typing import NDArray

from covray.cli import app as cli
from covray.io.images import Picture, encode_png
from covray.pairs import check
from covray.pairs.check import PairsReport, check_pairs, checked_here
from covray.pairs.manifest import ManifestWriter, Pair
from covray.pairs.manifest_reading import ManifestInfo, check_manifest
from covray.tasks import depth, edges, normals, segmentation
from tests.support.photographs import photo, save

SHAPE = (16, 24)


def never(manifest: str, info: ManifestInfo) -> Iterator[pa.Table]:
    raise AssertionError("a small manifest needs no cluster")


def drawn(task: str, label: NDArray[np.uint8], **meta: object) -> Pair:
    return Pair(task, "train", Picture(bytes=encode_png(photo(1))), Picture(bytes=encode_png(label)), dict(meta))


def report_of(path: Path, *pairs: Pair, root: Path | None = None) -> PairsReport:
    with ManifestWriter(path, root) as writer:
        for pair in pairs:
            writer.add(pair)
    return check_pairs(str(path), never)


def test_classes_void_and_colours_of_no_class_are_counted(tmp_path: Path) -> None:
    classes = np.zeros(SHAPE, np.uint8)
    classes[:4], classes[4:6], classes[6] = 1, 2, 5
    label = segmentation.render(classes)
    label[7] += 7  # rounding of a lossy format
    label[8, :12] = (60, 60, 60)
    meta = {"classes": ["ground", "cat", "dog", "bird"], "void": 5}
    report = report_of(tmp_path / "p.parquet", drawn("segmentation", label, **meta))
    pixels = report.tasks["segmentation"].pixels
    counts = {"cat": 4 * 24, "dog": 2 * 24, "bird": 0, "void": 24, "ground": 9 * 24 - 12, "near no class": 12}
    assert pixels == counts
    assert report.tasks["segmentation"].shares()["near no class"] == 12 / (16 * 24)
    assert report.notes() == [
        "segmentation: 3.1% of the labels' pixels have a colour near no class: are the classes declared, and the "
        "files lossless?",
        "segmentation: 1 classes occur in no label: bird",
    ]


def test_depth_normals_and_edges_say_what_is_invalid(tmp_path: Path) -> None:
    metres = np.full(SHAPE, 2.0)
    metres[:4], metres[4:6], metres[6] = 0, 12, 5
    up = np.zeros((*SHAPE, 3), np.float32)
    up[2:, :, 1] = 1
    wrong = normals.render(up)
    wrong[2:4] = (250, 250, 250)
    lines = np.zeros(SHAPE, bool)
    lines[3] = True
    report = report_of(
        tmp_path / "p.parquet",
        drawn("depth", depth.render(metres)),
        drawn("normals", wrong),
        drawn("edges", edges.render(lines)),
    )
    assert report.tasks["depth"].pixels == {"no depth": 4 * 24, "10 m and more": 2 * 24, "known depth": 10 * 24}
    low, high = report.tasks["depth"].ranges["metres"]
    assert low == pytest.approx(2, abs=0.02)
    assert high == pytest.approx(5, abs=0.02)
    assert report.tasks["normals"].pixels == {"no direction": 2 * 24, "direction": 14 * 24}
    assert report.tasks["normals"].unusual == {"length not 1": 2 * 24}
    assert report.tasks["edges"].pixels == {"edge": 24, "weak edge": 0, "no edge": 15 * 24}
    assert report.notes() == ["normals: 12.5% of the labels' pixels are no unit normals: is rgb = (n + 1) / 2?"]


def test_colours_where_grey_is_due_and_swapped_ends_are_noted(tmp_path: Path) -> None:
    grey = np.full((*SHAPE, 3), 90, np.uint8)
    pairs = [drawn("depth", photo(2)), drawn("colorization", grey), drawn("low_light", grey // 9)]
    notes = report_of(tmp_path / "p.parquet", *pairs).notes()
    assert notes[0] == "colorization: no label has a colour: are image and label swapped?"
    assert notes[1].startswith("depth: ")
    assert notes[1].endswith("of the labels' pixels are coloured, where grey is expected")
    assert notes[2:] == ["low_light: every image is brighter than every label: are they swapped?"]


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Five pairs by URI: a sound one, a missing image, a missing label, a broken image, a label of another shape."""
    root = tmp_path / "root"
    for name in ("good", "nolabel", "broken", "shape"):
        save(root / f"{name}.png", photo(3))
    for name in ("good", "noimage", "broken"):
        save(root / f"{name}_label.png", photo(4))
    save(root / "shape_label.png", photo(4, 40, 24))
    (root / "broken.png").write_bytes((root / "broken.png").read_bytes()[:300])
    with ManifestWriter(tmp_path / "pairs.parquet", root) as writer:
        for name in ("good", "noimage", "nolabel", "broken", "shape"):
            pair = Pair("colorization", "train", Picture(uri=f"{name}.png"), Picture(uri=f"{name}_label.png"))
            writer.add(pair)
    return tmp_path / "pairs.parquet"


def test_what_cannot_be_used_is_named_with_its_reason(manifest: Path) -> None:
    report = check_pairs(str(manifest), never)
    assert [(bad.name, bad.reason) for bad in report.bad] == [
        ("broken.png", "truncated"),
        ("noimage.png", "missing"),
        ("nolabel.png", "missing"),
        ("shape.png", "label_shape"),
    ]
    assert report.bad[1].detail == "image: 'noimage.png' is not below the root"
    assert report.bad[2].detail == "label: 'nolabel_label.png' is not below the root"
    assert (report.pairs, report.tasks["colorization"].usable) == (5, 1)
    assert report.tasks["colorization"].image_px == {"24x16": 1}


def test_a_photograph_whose_name_is_not_utf8_has_one_to_show(tmp_path: Path) -> None:
    """As ``covray pairs photos`` names a file whose name is in Latin-1."""
    good = drawn("colorization", photo(1), photo="caf\udce9.png")
    bad = Pair("colorization", "train", Picture(uri="x.png"), Picture(), {"photo": "caf\udce9.png"})
    report = report_of(tmp_path / "pairs.parquet", good, bad, root=tmp_path)
    assert (report.pairs, [bad.name for bad in report.bad]) == (2, ["x.png"])


def test_a_mask_whose_classes_cannot_be_read_is_named(tmp_path: Path) -> None:
    save(tmp_path / "a.png", photo(3))
    save(tmp_path / "train.png", np.zeros((16, 24, 3), np.uint8))
    save(tmp_path / "val.png", np.zeros((16, 24, 3), np.uint8))
    with ManifestWriter(tmp_path / "pairs.parquet", tmp_path) as writer:
        for split, numbers in (("train", [3, 7]), ("val", [3])):
            meta = {"classes": ["road", "sky"], "class_numbers": numbers}
            writer.add(Pair("segmentation", split, Picture(uri="a.png"), Picture(uri=f"{split}.png"), meta))
    report = check_pairs(str(tmp_path / "pairs.parquet"), never)
    assert [(bad.reason, bad.detail) for bad in report.bad] == [
        ("malformed_meta", "meta: class_numbers is not a list of 2 numbers from 0 to 65535, one for each of classes")
    ]
    assert report.tasks["segmentation"].usable == 1


def test_large_manifests_go_to_the_cluster_and_read_the_same(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = check_pairs(str(manifest), never).to_json()
    calls = []

    def elsewhere(path: str, info: ManifestInfo) -> Iterator[pa.Table]:
        calls.append(path)
        return iter(reversed(list(checked_here(path, info))))  # blocks come in any order

    monkeypatch.setattr(check, "PAIRS_HERE", 4)
    monkeypatch.setattr(check, "_ROWS_AT_ONCE", 2)
    assert check_pairs(str(manifest), elsewhere).to_json() == here
    assert calls == [str(manifest)]


@pytest.mark.ray
def test_on_ray_the_report_is_the_same(manifest: Path) -> None:
    from covray.distributed.check import checked_on_ray

    info = check_manifest(manifest)
    report = PairsReport.of(str(manifest), info)
    for block in checked_on_ray(str(manifest), info):
        report.add(block)
    report.sort()
    assert report.to_json() == check_pairs(str(manifest), never).to_json()


def test_the_command_lists_findings_and_ends_well(
    manifest: Path, command: Callable[..., tuple[Any, str]], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    answer, _ = command("check", manifest)
    assert answer == json.loads(json.dumps(check_pairs(str(manifest), never).to_json()))
    assert answer["reasons"] == {"missing": 2, "truncated": 1, "label_shape": 1}
    monkeypatch.setattr(sys, "argv", ["covray", "pairs", "check", str(manifest), "--limit", "2"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    text = capsys.readouterr().out
    assert "noimage.png: colorization: missing: image: 'noimage.png' is not below the root" in text
    assert "and 2 more; --json names all" in text
    assert "1 of 5 pairs can be used; missing 2, truncated 1, label_shape 1" in text


def test_a_manifest_that_cannot_be_read_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.parquet").write_text("no parquet")
    monkeypatch.setattr(sys, "argv", ["covray", "pairs", "check", str(tmp_path / "text.parquet")])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert "text.parquet" in capsys.readouterr().err
