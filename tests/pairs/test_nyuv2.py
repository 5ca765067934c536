"""NYUv2: millimetres become metres, the normals' x points to the right as everywhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from covray.errors import ConfigError, ManifestError
from covray.io.images import Picture
from covray.pairs.nyuv2 import nyuv2_pairs
from covray.tasks import depth, normals
from tests.support.photographs import bomb, label_of, photo, reasons, save
from tests.support.picture_files import png_file

DEPTH_MM = np.full((16, 24), 3000, np.uint16)
DEPTH_MM[0, :5] = (0, 1, 712, 9999, 65535)  # invalid, invalid a level off, ..., invalid as full scale
DEPTH_MM[1, :2] = (2, 60000)
NORMALS = {  # n in DSINE's frame (x left, y up, z to the viewer) -> its 8 bits
    (1, 2): ((1, 0, 0), (255, 128, 128)),
    (3, 4): ((0, 1, 0), (128, 255, 128)),
    (5, 6): ((0.6, 0, 0.8), (204, 128, 230)),
    (7, 8): ((0, 0, 0), (0, 0, 0)),
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "nyu"
    for scene, frames in (("sync/kitchen_0028a", ("00045", "00007")), ("sync/bath", ("00007",))):
        for frame in frames:
            save(root / scene / f"rgb_{frame}.jpg", photo(0))
            save(root / scene / f"sync_depth_{frame}.png", DEPTH_MM)
    save(root / "official_splits/test/office/rgb_00001.jpg", photo(1))
    save(root / "official_splits/test/office/sync_depth_00001.png", DEPTH_MM * 2)
    levels = np.full((16, 24, 3), (128, 128, 255), np.uint8)
    for place, (_, colour) in NORMALS.items():
        levels[place] = colour
    for split, number in (("train", 2), ("test", 0)):
        save(root / split / f"{number:06d}_img.png", photo(2))
        save(root / split / f"{number:06d}_normal.png", levels)
    return root


def test_depth_is_in_metres(root: Path) -> None:
    pairs = list(nyuv2_pairs(root, "depth"))
    scenes = ("sync/bath/rgb_00007", "sync/kitchen_0028a/rgb_00007", "sync/kitchen_0028a/rgb_00045")
    assert [pair.image for pair in pairs] == [Picture(uri=f"{name}.jpg") for name in scenes]
    assert {(pair.task, pair.split) for pair in pairs} == {("depth", "train")}
    for pair in pairs:
        label = label_of(pair, root)
        assert label[0, :6, 0].tolist() == [0, 0, 18, 255, 0, 76]  # none, none, 0.712 m, 9.999 m, none, 3 m
        assert label[1, :2, 0].tolist() == [1, 255]  # 2 mm, beyond
        assert np.abs(depth.read(label)[0, 2:6] - (0.712, 9.999, 0, 3)).max() <= 5 / 255
        assert (label == label[..., :1]).all()


def test_the_test_split_is_the_official_one(root: Path) -> None:
    (pair,) = nyuv2_pairs(root, "depth", "test")
    assert (pair.split, pair.image.uri) == ("test", "official_splits/test/office/rgb_00001.jpg")
    assert label_of(pair, root)[5, 5, 0] == 153  # 6 m


@pytest.mark.parametrize(("split", "number"), [("train", 2), ("test", 0)])
def test_normals_keep_their_direction_in_our_frame(root: Path, split: str, number: int) -> None:
    (pair,) = nyuv2_pairs(root, "normals", split)
    assert (pair.task, pair.split, pair.image.uri) == ("normals", split, f"{split}/{number:06d}_img.png")
    label = label_of(pair, root)
    found = normals.read(label)
    for place, ((x, y, z), (red, green, blue)) in NORMALS.items():
        valid = bool(x or y or z)
        assert label[place].tolist() == [255 - red if valid else 0, green, blue]
        assert np.abs(found[place] - (-x, y, z)).max() < 1 / 127
    assert np.abs(found[0, 0] - (0, 0, 1)).max() < 1 / 127


@pytest.mark.parametrize("level", [(127, 127, 127), (128, 128, 128), (127, 128, 127), (1, 1, 1), (0, 0, 1), (2, 0, 1)])
def test_a_normal_that_is_no_direction_is_none(root: Path, level: tuple[int, int, int]) -> None:
    """No normal is a zero vector, grey when it is stored, or black; both may be a level off."""
    path = root / "test/000000_normal.png"
    levels = np.full((16, 24, 3), (128, 128, 255), np.uint8)
    levels[3] = level
    save(path, levels)
    (pair,) = nyuv2_pairs(root, "normals", "test")
    valid = normals.read(label_of(pair, root)).any(axis=2)
    assert not valid[3].any()
    assert valid[:3].all()
    assert valid[4:].all()


def test_normals_of_sixteen_bits_are_refused(root: Path) -> None:
    """Read as 8 bits none of them would be a direction, and the label black."""
    path = root / "test/000000_normal.png"
    path.write_bytes(png_file(np.full((16, 24, 3), (32896, 32896, 65535)), 2, 16))
    assert reasons(nyuv2_pairs(root, "normals", "test"), root) == {"test/000000_img.png": "unsupported"}


def test_depth_turns_with_its_image_and_normals_are_refused(root: Path) -> None:
    orientation = Image.Exif()
    orientation[274] = 3
    for path in (root / "official_splits/test/office/rgb_00001.jpg", root / "test/000000_img.png"):
        Image.open(path).save(path, exif=orientation)
    (pair,) = nyuv2_pairs(root, "depth", "test")
    label = label_of(pair, root)[..., 0]
    assert label[15, 20:22].tolist() == [255, 36]  # twice 9.999 m and 0.712 m, at the other end of the last row
    assert reasons(nyuv2_pairs(root, "normals", "test"), root) == {"test/000000_img.png": "orientation"}


def test_what_cannot_be_used_is_a_row_with_its_reason(root: Path, tmp_path: Path) -> None:
    scene = root / "sync" / "bath"
    for name in range(20, 26):
        save(scene / f"rgb_000{name}.jpg", photo(0))
    (scene / "rgb_00026.png").write_bytes(b"of no frame: frames are JPEG, their depth PNG")
    save(scene / "sync_depth_00019.png", DEPTH_MM)  # no photograph
    save(scene / "sync_depth_00021.png", DEPTH_MM[:, :20])
    save(scene / "sync_depth_00022.png", (DEPTH_MM // 256).astype(np.uint8))
    save(scene / "sync_depth_00023.png", photo(0))
    bomb(scene / "sync_depth_00024.png")
    save(tmp_path / "secret.png", DEPTH_MM)
    (scene / "sync_depth_00025.png").symlink_to(tmp_path / "secret.png")
    found = reasons(nyuv2_pairs(root, "depth"), root)
    assert found == {
        f"sync/bath/rgb_000{number}.jpg": reason
        for number, reason in {
            19: "missing", 20: "missing", 21: "label_shape", 22: "unsupported", 23: "unsupported", 24: "too_large",
            25: "outside_root",
        }.items()
    }  # fmt: skip


def test_a_wrong_root_is_told_in_one_line(root: Path) -> None:
    with pytest.raises(ManifestError, match=r"sync is missing; depth is expected as sync/<scene>/rgb_00000\.jpg and"):
        nyuv2_pairs(root / "sync", "depth")
    with pytest.raises(ManifestError, match=r"train is missing; normals are expected as train/000000_img\.png"):
        nyuv2_pairs(root / "sync", "normals")
    save(root / "other" / "sync" / "kitchen" / "picture.jpg", photo(0))
    with pytest.raises(ManifestError, match="holds no pairs of depth for train"):
        nyuv2_pairs(root / "other", "depth")
    with pytest.raises(ConfigError, match=r"task: NYUv2 gives depth and normals \(got pose\)"):
        nyuv2_pairs(root, "pose")
    with pytest.raises(ConfigError, match="split: NYUv2 gives train and test"):
        nyuv2_pairs(root, "depth", "val")


def test_the_command_draws_the_same_pairs_again(
    root: Path, tmp_path: Path, command: Callable[..., tuple[Any, str]]
) -> None:
    out = [tmp_path / f"{number}.parquet" for number in range(2)]
    for path in out:
        answer, told = command("nyuv2", root, "--task", "depth", "--count", 2, "--seed", 3, "--out", path)
        assert (answer["per_task"], answer["splits"], told) == ({"depth": 2}, {"train": 2}, "")
    assert out[0].read_bytes() == out[1].read_bytes()
    answer, _ = command("nyuv2", root, "--task", "normals", "--split", "test", "--out", out[0])
    assert (answer["per_task"], answer["splits"]) == ({"normals": 1}, {"test": 1})
