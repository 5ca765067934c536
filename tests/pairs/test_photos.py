"""Photographs label themselves: the ends fit, splits are the photograph's own, a broken file is a row with a reason."""

import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from covray.errors import ConfigError, ManifestError, PairError
from covray.io.images import Picture, decode, load_picture, square
from covray.pairs.manifest import ManifestWriter, Pair
from covray.pairs.manifest_reading import check_manifest
from covray.pairs.photos import PHOTO_TASKS, edge_map, photo_pairs
from covray.tasks.colorization import grey


def photo(seed: int, height_px: int = 40, width_px: int = 56) -> NDArray[np.uint8]:
    """Soft colours with a dark box in it."""
    generator = np.random.default_rng(seed)
    small = Image.fromarray(generator.integers(120, 256, (3, 3, 3), dtype=np.uint8))
    image = np.array(small.resize((width_px, height_px), Image.Resampling.BICUBIC))
    image[height_px // 4 : height_px // 2, width_px // 4 : width_px // 2] //= 4
    return image


def save(path: Path, image: NDArray[np.uint8]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for number, name in enumerate(["b.png", "a.PNG", "aa/deep/c.webp", "sub/d.bmp"]):
        save(root / name, photo(number))
    return root


def pixels(picture: Picture) -> NDArray[np.uint8]:
    assert picture.bytes is not None
    return decode(picture.bytes)


def by_task(pairs: list[Pair]) -> dict[str, Pair]:
    return {pair.task: pair for pair in pairs}


def test_each_photograph_gives_its_tasks_together_and_in_order(folder: Path) -> None:
    (folder / "notes.txt").write_text("no photograph")
    save(folder / ".hidden.png", photo(8))
    save(folder / ".thumbs" / "x.png", photo(9))
    pairs = list(photo_pairs(folder))
    names = ["a.PNG", "aa/deep/c.webp", "b.png", "sub/d.bmp"]
    assert [(pair.meta["photo"], pair.task) for pair in pairs] == [(n, task) for n in names for task in PHOTO_TASKS]
    assert len({pair.pair_id for pair in pairs}) == 12
    assert all(pixels(pair.image).shape == pixels(pair.label).shape == (40, 56, 3) for pair in pairs)


def test_the_ends_are_what_the_task_says(folder: Path) -> None:
    pairs = by_task([pair for pair in photo_pairs(folder) if pair.meta["photo"] == "b.png"])
    original = photo(0)
    assert np.array_equal(pixels(pairs["colorization"].label), original)
    assert np.array_equal(pixels(pairs["colorization"].image), grey(original))
    assert np.array_equal(pixels(pairs["edges"].image), original)
    assert np.array_equal(pixels(pairs["edges"].label)[..., 0] > 0, edge_map(original))
    assert np.array_equal(pixels(pairs["low_light"].label), original)
    assert pixels(pairs["low_light"].image).mean() < 0.7 * original.mean()
    assert 2 <= pairs["low_light"].meta["ev"] <= 4.5


def test_a_photograph_is_one_picture_to_all_tasks(folder: Path) -> None:
    """What the build needs to invert it once: the same bytes."""
    pairs = by_task([pair for pair in photo_pairs(folder) if pair.meta["photo"] == "b.png"])
    assert pairs["colorization"].label == pairs["edges"].image == pairs["low_light"].label


def test_large_photographs_shrink_and_small_ones_stay(tmp_path: Path) -> None:
    save(tmp_path / "tall.png", photo(1, 90, 30))
    save(tmp_path / "wide.png", photo(2, 50, 120))
    save(tmp_path / "tiny.png", photo(3, 4, 6))
    shapes = {p.meta["photo"]: pixels(p.label).shape[:2] for p in photo_pairs(tmp_path, ["edges"], size_px=25)}
    assert shapes == {"tall.png": (75, 25), "wide.png": (25, 60), "tiny.png": (4, 6)}


def test_pairs_do_not_depend_on_names_order_or_neighbours(folder: Path, tmp_path: Path) -> None:
    before = {pair.pair_id: pair.split for pair in photo_pairs(folder)}
    other = tmp_path / "other"
    for number, name in enumerate(["z.png", "y/x.PNG"]):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / ["b.png", "a.PNG"][number], other / name)
    save(other / "new.png", photo(77))
    after = {pair.pair_id: pair.split for pair in photo_pairs(other)}
    assert len(before.keys() & after.keys()) == 6
    assert all(before[pair_id] == after[pair_id] for pair_id in before.keys() & after.keys())


def test_the_seed_changes_the_dark_only(folder: Path) -> None:
    one, again, other = (
        {(p.task, p.meta["photo"]): (p.pair_id, p.split) for p in photo_pairs(folder, seed=seed)} for seed in (0, 0, 1)
    )
    assert one == again
    changed = {task for task, name in one if one[task, name] != other[task, name]}
    assert changed == {"low_light"}
    assert all(one[key][1] == other[key][1] for key in one)


def test_splits_have_their_shares_and_keep_a_photograph_whole(tmp_path: Path) -> None:
    for number in range(300):
        save(tmp_path / f"{number}.png", np.random.default_rng(number).integers(0, 256, (2, 2, 3), dtype=np.uint8))
    pairs = list(photo_pairs(tmp_path, ["colorization", "low_light"]))
    splits = {}
    for pair in pairs:
        assert splits.setdefault(pair.meta["photo"], pair.split) == pair.split
    counts = Counter(splits.values())
    for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(counts[split] - 300 * share) < 4 * np.sqrt(300 * share * (1 - share))
    custom = {p.split for p in photo_pairs(tmp_path, ["colorization"], splits={"a": 3, "none": 0, "b": 1})}
    assert custom == {"a", "b"}


def test_a_broken_photograph_is_a_row_with_its_reason(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "b.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(99))
    save(tmp_path / "secret.png", photo(5))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    expected = {
        "cut.png": "truncated",
        "empty.jpg": "empty",
        "phone.heic": "unsupported",
        "link.png": "outside_root",
        "gone.png": "missing",
        "pipe.png": "unreadable",
    }
    out = tmp_path / "pairs.parquet"
    bad: Counter[str] = Counter()
    with ManifestWriter(out, folder) as writer:
        for pair in photo_pairs(folder):
            assert writer.add(pair)
            if "error" not in pair.meta:
                continue
            name = pair.meta["photo"]
            bad[name] += 1
            assert pair.label == Picture()
            assert pair.meta["error"].startswith(f"{expected[name]}: ")
            # The build, which opens the URI below the manifest's root, meets the same reason.
            assert reason_of(pair.image, writer.root) == expected[name]
    assert bad == dict.fromkeys(expected, 3)
    assert check_manifest(out).rows == 3 * (4 + len(expected))


def reason_of(picture: Picture, root: str | None) -> str:
    with pytest.raises(PairError) as caught:
        decode_loaded(picture, root)
    return caught.value.reason


def decode_loaded(picture: Picture, root: str | None) -> None:
    decode(load_picture(picture, root))


def test_names_that_are_not_utf8_are_used(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "b.png", os.fsencode(folder) + b"/z\xff.png")
    with open(os.fsencode(folder) + b"/y\xff.png", "wb") as file:
        file.write(b"broken")
    out = tmp_path / "pairs.parquet"
    with ManifestWriter(out, folder) as writer:
        for pair in photo_pairs(folder, ["edges"]):
            writer.add(pair)
    assert (writer.rows, writer.duplicates) == (5, 1)  # the copy is the same photograph


def test_so_many_as_asked_for_are_drawn_by_the_seed(folder: Path) -> None:
    def drawn(count: int | None, seed: int = 0) -> list[Pair]:
        return list(photo_pairs(folder, ["colorization"], seed=seed, count=count))

    whole = drawn(None)
    assert drawn(9) == whole
    draws = [drawn(count) for count in (1, 2, 3)]
    assert [len(pairs) for pairs in draws] == [1, 2, 3]
    for pairs in draws:
        assert pairs == [pair for pair in whole if pair in pairs]  # the same pairs, in the same order
    assert draws[0][0] in draws[1]
    assert len({drawn(1, seed)[0].meta["photo"] for seed in range(9)}) > 1


def test_links_in_circles_end(folder: Path) -> None:
    (folder / "sub" / "loop").symlink_to(folder)
    assert len(list(photo_pairs(folder, ["edges"]))) == 4


def test_edges_lie_on_the_step_and_nowhere_else() -> None:
    image = np.full((128, 128, 3), 60, np.uint8)
    image[:, 64:] = 140
    drawn = edge_map(image)
    columns = np.flatnonzero(drawn[20:-20].any(axis=0))
    assert columns.min() >= 62
    assert columns.max() <= 66
    assert drawn[20:-20, 63:65].any(axis=1).all()
    assert not edge_map(np.full((64, 64, 3), 60, np.uint8)).any()
    image[:, 64:] = 66
    assert not edge_map(image).any()


@pytest.mark.parametrize("size_px", [64, 128, 256, 512])
def test_lines_survive_at_64_px_whatever_the_size(size_px: int) -> None:
    image = np.full((size_px, size_px, 3), 60, np.uint8)
    image[:, size_px // 2 :] = 200
    image[: size_px // 3] = 20
    small = square(np.repeat(edge_map(image)[..., None], 3, axis=2).astype(np.uint8) * 255, 64)[..., 0]
    assert (small[26:60].max(axis=1) > 128).all()
    assert 1 <= (small[40] > 64).sum() <= 3


@pytest.mark.parametrize("shape", [(2, 2), (2, 50), (3, 3)])
def test_the_smallest_photographs_have_edges_to_draw(shape: tuple[int, int]) -> None:
    assert edge_map(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)).shape == shape


def test_every_ending_of_a_picture_is_read_or_gives_a_row(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = Image.fromarray(photo(7))
    for name in ("x.jpe", "x.JFIF", "x.mpo", "x.jif"):
        image.save(folder / name, "JPEG")
    image.save(folder / "x.avif")
    image.save(folder / "x.dib", "BMP")
    for name, data in (("x.jxl", b"\xff\x0a"), ("x.hif", b"\0\0\0\x18ftypheic"), ("x.psd", b"8BPS")):
        (folder / name).write_bytes(data + bytes(60))
    (folder / "x.txt").write_text("no picture")
    (folder / "y.svg").write_text("<svg/>")
    with caplog.at_level("WARNING", "covray"):
        errors = {pair.meta["photo"]: pair.meta.get("error") for pair in photo_pairs(folder, ["edges"])}
    added = {name: error and error.partition(":")[0] for name, error in errors.items() if name.startswith("x.")}
    read = dict.fromkeys(["x.jpe", "x.JFIF", "x.mpo", "x.jif", "x.avif", "x.dib"])
    assert added == read | dict.fromkeys(["x.jxl", "x.hif", "x.psd"], "unsupported")
    (message,) = (record.getMessage() for record in caplog.records)
    assert message.endswith("files that are no pictures by their names are passed over: .svg 1, .txt 1")


def test_mistakes_are_told_before_any_work(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot label depth; photographs give colorization"):
        photo_pairs(folder, ["depth"])
    with pytest.raises(ConfigError, match="none asked for"):
        photo_pairs(folder, [])
    with pytest.raises(ConfigError, match="size_px"):
        photo_pairs(folder, size_px=0)
    for splits in ({"train": -1.0, "test": 2.0}, {"train": 0.0}, {}, {"train": float("nan")}):
        with pytest.raises(ConfigError, match="splits"):
            photo_pairs(folder, splits=splits)
    with pytest.raises(ManifestError, match="no such folder"):
        photo_pairs(tmp_path / "no")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ManifestError, match="holds no photographs"):
        photo_pairs(tmp_path / "bare")
