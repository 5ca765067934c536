"""BSDS: an edge is what enough annotators drew, pixel by pixel; a .mat file of a stranger does no harm."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.io import savemat
from scipy.sparse import csc_matrix

from covray.errors import ConfigError, ManifestError, PairError
from covray.io.images import Picture
from covray.pairs.bsds import MAX_MAT_BYTES, agreement, bsds_pairs
from covray.tasks import edges
from tests.support.photographs import bomb, label_of, photo, reasons, save
from tests.support.picture_files import png_file

DRAWN = np.zeros((5, 16, 24), np.uint8)  # five annotators: column k is drawn by k of them
for column in range(6):
    DRAWN[:column, :, column] = 1


def mat(drawn: NDArray[Any], compressed: bool = True) -> bytes:
    """``groundTruth``: a cell [1, annotators] of structs with Segmentation uint16 and Boundaries."""
    cells = np.empty((1, len(drawn)), object)
    for index, boundaries in enumerate(drawn):
        cells[0, index] = {"Segmentation": np.ones(boundaries.shape, np.uint16), "Boundaries": boundaries}
    buffer = io.BytesIO()
    savemat(buffer, {"groundTruth": cells}, do_compression=compressed)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "unpacked"
    data = root / "BSR" / "BSDS500" / "data"
    for split, names in (("train", ("8143", "100075")), ("val", ("3096",)), ("test", ("2018",))):
        (data / "groundTruth" / split).mkdir(parents=True)
        for name in names:
            save(data / "images" / split / f"{name}.jpg", photo(0))
            (data / "groundTruth" / split / f"{name}.mat").write_bytes(mat(DRAWN))
        (data / "images" / split / "Thumbs.db").write_bytes(b"as in the archive")
    return root


@pytest.fixture
def hed(tmp_path: Path) -> Path:
    """HED-BSDS: copies with their labels in grey, and a list of both."""
    root = tmp_path / "HED-BSDS"
    label = np.zeros((16, 24), np.uint8)
    label[0, :6] = (0, 51, 127, 128, 204, 255)
    lines = []
    for turn in ("0.0_1_0", "22.5_1_1"):
        lines.append(f"train/aug_data/{turn}/100075.jpg train/aug_gt/{turn}/100075.png")
        save(root / f"train/aug_data/{turn}/100075.jpg", photo(0))
        save(root / f"train/aug_gt/{turn}/100075.png", label)
    (root / "train_pair.lst").write_text("\n".join(lines) + "\n\n")
    return root


@pytest.mark.parametrize("compressed", [True, False])
def test_agreement_is_the_share_of_annotators(compressed: bool) -> None:
    found = agreement(mat(DRAWN, compressed))
    assert found.shape == (16, 24)
    assert found[7].tolist() == [0, 0.2, 0.4, 0.6, 0.8, 1] + [0] * 18


@pytest.mark.parametrize("kind", ["double", "single", "logical", "int8", "sparse", "sparse double"])
def test_boundaries_of_every_matlab_type_are_read(kind: str) -> None:
    drawn = DRAWN[3]
    boundaries = {
        "double": drawn.astype(np.float64), "single": drawn.astype(np.float32), "logical": drawn.astype(bool),
        "int8": drawn.astype(np.int8), "sparse": csc_matrix(drawn.astype(bool)),
        "sparse double": csc_matrix(drawn.astype(np.float64)),
    }[kind]  # fmt: skip
    cells = np.empty((1, 2), object)
    cells[0, 0] = {"Segmentation": np.ones((16, 24), np.uint16), "Boundaries": boundaries}
    cells[0, 1] = {"Segmentation": np.ones((16, 24), np.uint16), "Boundaries": DRAWN[4]}
    buffer = io.BytesIO()
    savemat(buffer, {"groundTruth": cells})
    assert np.array_equal(agreement(buffer.getvalue()), (drawn.astype(float) + DRAWN[4]) / 2)


@pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
def test_boundaries_that_are_no_whole_numbers_are_refused(value: float) -> None:
    drawn = DRAWN[:1].astype(np.float64)
    drawn[0, 3, 3] = value
    if np.isinf(value):
        assert agreement(mat(drawn))[3, 3] == 1  # above 0 as any other
        return
    with pytest.raises(PairError, match="whole numbers"):
        agreement(mat(drawn))


def test_a_sparse_array_is_not_made_larger_than_a_picture() -> None:
    cells = np.empty((1, 1), object)
    cells[0, 0] = {"Boundaries": csc_matrix(([1.0], ([5], [7])), shape=(3_000_000, 300))}
    buffer = io.BytesIO()
    savemat(buffer, {"groundTruth": cells})
    with pytest.raises(PairError, match="too_large"):
        agreement(buffer.getvalue())


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_first_name(hed: Path, encoding: str) -> None:
    listing = hed / "train_pair.lst"
    expected = list(bsds_pairs(hed, listing="train_pair.lst"))
    listing.write_text(listing.read_text(), encoding=encoding)
    assert list(bsds_pairs(hed, listing="train_pair.lst")) == expected
    assert not any("error" in pair.meta for pair in expected)


def test_grey_labels_of_another_coding_are_rejected(hed: Path) -> None:
    """Levels 0 and 1 would be all black, black on white all edges, and a photograph is no label."""
    lines = np.zeros((16, 24), np.uint8)
    lines[4] = 1
    for name, label in (("ones", lines), ("inverted", 255 - 255 * lines), ("photo", photo(3)), ("good", lines * 255)):
        save(hed / f"{name}.jpg", photo(0))
        save(hed / f"{name}.png", label)
    (hed / "odd.lst").write_text("\n".join(f"{name}.jpg {name}.png" for name in ("ones", "inverted", "photo", "good")))
    pairs = list(bsds_pairs(hed, listing="odd.lst"))
    expected = {"ones.jpg": "unsupported", "inverted.jpg": "inverted", "photo.jpg": "unsupported"}
    assert reasons(pairs, hed) == expected
    (good,) = (pair for pair in pairs if "error" not in pair.meta)
    assert np.array_equal(label_of(good, hed)[..., 0], lines * 255)


@pytest.mark.parametrize("bits", [1, 4])
def test_white_of_a_png_of_few_bits_is_an_edge(hed: Path, bits: int) -> None:
    """Programs that shrink PNGs write 0 and 255 as 0 and 1, or with other greys as 0 and 15."""
    levels = np.zeros((16, 24, 1), np.uint8)
    levels[4] = 2**bits - 1
    save(hed / "few.jpg", photo(0))
    (hed / "few.png").write_bytes(png_file(levels, 0, bits))
    (hed / "few.lst").write_text("few.jpg few.png")
    (pair,) = bsds_pairs(hed, listing="few.lst")
    assert np.array_equal(np.flatnonzero(label_of(pair, hed)[:, 0, 0]), [4])


def test_an_index_beyond_its_palette_is_one_bad_pair(hed: Path) -> None:
    save(hed / "odd.jpg", photo(0))
    (hed / "odd.png").write_bytes(png_file(np.full((16, 24, 1), 9), 3, 8, [(b"PLTE", b"\0\0\0\xff\xff\xff")]))
    (hed / "odd.lst").write_text("odd.jpg odd.png")
    assert reasons(bsds_pairs(hed, listing="odd.lst"), hed) == {"odd.jpg": "damaged"}


def test_an_image_that_a_list_names_twice_is_refused(hed: Path) -> None:
    (hed / "twice.lst").write_text("a.jpg a.png\nb.jpg b.png\na.jpg c.png\n")
    with pytest.raises(ManifestError, match=r"twice\.lst, line 3: names a\.jpg a second time"):
        bsds_pairs(hed, listing="twice.lst")


@pytest.mark.parametrize(
    ("share", "columns"),
    [(0.5, [3, 4, 5]), (0.6, [3, 4, 5]), (0.61, [4, 5]), (0.3, [2, 3, 4, 5]), (0.001, [1, 2, 3, 4, 5]), (1.0, [5])],
)
def test_a_pixel_is_an_edge_where_enough_drew_it(root: Path, share: float, columns: list[int]) -> None:
    pairs = list(bsds_pairs(root, share=share))
    folder = "BSR/BSDS500/data/images/train"
    assert [pair.image for pair in pairs] == [Picture(uri=f"{folder}/{name}.jpg") for name in ("100075", "8143")]
    for pair in pairs:
        assert (pair.task, pair.split, pair.meta["share"]) == ("edges", "train", share)
        expected = np.zeros((16, 24, 3), np.uint8)
        expected[:, columns] = 255
        assert np.array_equal(label_of(pair, root), expected)


def test_splits_are_the_datasets_own(root: Path) -> None:
    for split, name in (("val", "3096"), ("test", "2018")):
        (pair,) = bsds_pairs(root, split)
        assert pair.split == split
        assert pair.image.uri == f"BSR/BSDS500/data/images/{split}/{name}.jpg"


@pytest.mark.parametrize(("share", "columns"), [(0.5, [3, 4, 5]), (0.2, [1, 2, 3, 4, 5]), (0.9, [5])])
def test_a_list_names_images_and_grey_labels(hed: Path, share: float, columns: list[int]) -> None:
    pairs = list(bsds_pairs(hed, share=share, listing="train_pair.lst"))
    assert [pair.image.uri for pair in pairs] == [
        f"train/aug_data/{turn}/100075.jpg" for turn in ("0.0_1_0", "22.5_1_1")
    ]
    for pair in pairs:
        strength = edges.read(label_of(pair, hed))
        assert np.flatnonzero(strength[0]).tolist() == columns
        assert not strength[1:].any()


def test_what_cannot_be_used_is_a_row_with_its_reason(root: Path, hed: Path, tmp_path: Path) -> None:
    data = root / "BSR" / "BSDS500" / "data"
    whole = mat(DRAWN)
    header = b"MATLAB 5.0 MAT-file".ljust(124) + b"\x00\x01IM"
    huge = zlib.compress(bytes(MAX_MAT_BYTES + 1))
    nested = b"".join(struct.pack("<12I", 14, 0, 6, 8, 1, 0, 5, 8, 1, 1, 1, 0) for _ in range(20_000))
    for name, content in {
        "cut": whole[:-40], "empty": b"", "text": b"hello", "v73": b"MATLAB 7.3".ljust(124) + b"\x00\x02IM" + whole,
        "bomb": header + struct.pack("<II", 15, len(huge)) + huge,
        "nested": header + (lambda packed: struct.pack("<II", 15, len(packed)) + packed)(zlib.compress(nested)),
        "other": mat(DRAWN[:, :, :20]), "nobody": mat(DRAWN[:0]), "deep": mat(np.zeros((2, 4, 16, 24))),
    }.items():  # fmt: skip
        save(data / "images" / "test" / f"{name}.jpg", photo(0))
        (data / "groundTruth" / "test" / f"{name}.mat").write_bytes(content)
    save(data / "images" / "test" / "none.jpg", photo(0))
    found = reasons(bsds_pairs(root, "test"), root)
    assert {Path(uri).stem: reason for uri, reason in found.items()} == {
        "cut": "damaged", "empty": "empty", "text": "unsupported", "v73": "unsupported", "bomb": "too_large",
        "nested": "unsupported", "other": "label_shape", "nobody": "damaged", "deep": "damaged", "none": "missing",
    }  # fmt: skip

    save(tmp_path / "secret.png", np.zeros((16, 24), np.uint8))
    bomb(hed / "bomb.png")
    lines = ["../secret.png a.png", f"train/aug_data/0.0_1_0/100075.jpg {tmp_path}/secret.png"]
    lines += ["train/aug_data/22.5_1_1/100075.jpg bomb.png", "/etc/hostname /etc/hostname", "absent.jpg absent.png"]
    (hed / "hostile.lst").write_text("\n".join(lines))
    assert sorted(reasons(bsds_pairs(hed, listing="hostile.lst"), hed).values()) == [
        "missing", "outside_root", "outside_root", "outside_root", "too_large",
    ]  # fmt: skip


def test_damaged_files_raise_nothing_but_pair_errors() -> None:
    generator = np.random.default_rng(3)
    texts = []
    for data in (mat(DRAWN), mat(DRAWN, compressed=False)):
        for _ in range(100):
            damaged = bytearray(data)
            at = int(generator.integers(120, len(data) if generator.random() < 0.5 else 400))
            damaged[at : at + 4] = generator.bytes(int(generator.integers(0, 9)))
            try:
                assert agreement(bytes(damaged)).ndim == 2
            except PairError as error:
                texts.append(str(error))
    assert len(texts) > 100
    assert not any("\n" in text for text in texts)


def test_mistakes_are_told_in_one_line(root: Path, hed: Path) -> None:
    with pytest.raises(ManifestError, match=r"images/train is missing; give the folder BSR_bsds500\.tgz was unpacked"):
        bsds_pairs(root / "BSR")
    with pytest.raises(ManifestError, match=r"train\.lst is missing; give a list of lines 'image label'"):
        bsds_pairs(hed, listing="train.lst")
    (hed / "test.lst").write_text("a.jpg b.png\n\ntest/100007.jpg\n")
    with pytest.raises(ManifestError, match=r"test\.lst, line 3: is 1 names, not 'image label'"):
        bsds_pairs(hed, listing="test.lst")
    (hed / "latin.lst").write_bytes(b"a\xff.jpg b.png\n")
    with pytest.raises(ManifestError, match=r"latin\.lst, line 1: is not UTF-8"):
        bsds_pairs(hed, listing="latin.lst")
    (hed / "empty.lst").write_bytes(b"\n")
    with pytest.raises(ManifestError, match=r"empty\.lst is empty"):
        bsds_pairs(hed, listing="empty.lst")
    with pytest.raises(ManifestError, match="outside_root"):
        bsds_pairs(hed, listing="../unpacked/BSR/BSDS500/data/images/train/8143.jpg")
    with pytest.raises(ConfigError, match="split: BSDS gives train, val, test"):
        bsds_pairs(root, "trainval")
    for share in (0, -1, 1.01, float("nan")):
        with pytest.raises(ConfigError, match="share"):
            bsds_pairs(root, share=share)


def test_the_command_takes_both_layouts(
    root: Path, hed: Path, tmp_path: Path, command: Callable[..., tuple[Any, str]]
) -> None:
    out = tmp_path / "pairs.parquet"
    answer, told = command("bsds", root, "--split", "val", "--share", 0.3, "--out", out)
    assert (answer["per_task"], answer["splits"]) == ({"edges": 1}, {"val": 1})
    assert told.endswith("files that are no pictures by their names are passed over: .db 1\n")  # said, and nothing else
    assert told.count("\n") == 1
    answer, told = command("bsds", hed, "--list", "train_pair.lst", "--count", 1, "--seed", 4, "--out", out)
    assert (answer["per_task"], answer["splits"], told) == ({"edges": 1}, {"train": 1}, "")
