"""A user's pairs are opened: what is there is read by what is known of it, what is not is named before any build."""

import json
import threading
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from covray.cli.pairs_lists import label_rules
from covray.errors import ConfigError, ManifestError
from covray.io.images import Picture, decode, load_picture
from covray.pairs.classes import VOID, ClassesFile
from covray.pairs.manifest import Pair
from covray.pairs.manifest_reading import check_manifest
from covray.pairs.user_labels import LabelRules, checked_pairs, in_order
from covray.pairs.user_lists import read_user_list
from covray.tasks import depth, normals, segmentation
from tests.support.photographs import bomb, photo, save
from tests.support.picture_files import png_file

MILLIMETRES = np.full((16, 24), 5500, np.uint16)
MILLIMETRES[0, :3] = (0, 712, 9000)


def pair(task: str, image: str = "a.png", label: str = "b.png", **meta: Any) -> Pair:
    return Pair(task, "train", Picture(uri=image), Picture(uri=label), meta)


def checked(root: Path, *pairs: Pair, **rules: Any) -> list[Pair]:
    return list(checked_pairs(pairs, str(root), LabelRules(**rules)))


def label_of(pair: Pair, root: Path) -> NDArray[np.uint8]:
    return decode(load_picture(pair.label, str(root)))


def error(pair: Pair) -> str:
    assert pair.label == Picture()
    return str(pair.meta["error"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    save(tmp_path / "a.png", photo(0))
    return tmp_path


@pytest.mark.parametrize(
    ("task", "label"),
    [
        ("depth", np.repeat(photo(1)[..., :1], 3, axis=2)),
        ("depth", photo(1)[..., 0]),
        ("segmentation", segmentation.render(photo(1)[..., 0] % 21)),
        ("segmentation", segmentation.render(np.where(photo(1)[..., 0] < 99, 3, VOID).astype(np.uint8))),
        ("normals", np.full((16, 24, 3), (128, 128, 255), np.uint8)),
        ("edges", np.where(photo(1) > 200, 255, 0).astype(np.uint8)),
        ("pose", photo(1)),
        ("colorization", photo(1)),
        ("low_light", photo(1)),
    ],
)
def test_a_label_that_is_drawn_as_its_task_draws_it_stays_where_it_is(
    root: Path, task: str, label: NDArray[np.uint8]
) -> None:
    """And the pair keeps its id."""
    save(root / "b.png", label)
    (result,) = checked(root, pair(task, note="x"))
    assert (result.label, result.pair_id) == (Picture(uri="b.png"), pair(task).pair_id)
    assert result.meta["note"] == "x"


def test_painters_depth_is_millimetres(root: Path) -> None:
    """Its list names 16 bits of millimetres, which read as a grey picture would be 0.82 m for 5.5 m."""
    save(root / "b.png", MILLIMETRES)
    items = [{"image_path": "a.png", "target_path": "b.png", "type": "nyuv2_image2depth"}]
    (root / "list.json").write_text(json.dumps(items))
    (result,) = checked(root, *read_user_list(root / "list.json"))
    read = depth.read(label_of(result, root))
    assert np.abs(read[5:] - 5.5).max() <= 5 / 255
    assert np.abs(read[0, :3] - (0, 0.712, 9)).max() <= 5 / 255
    assert result.meta["label_file"] == "b.png"


def test_depth_of_sixteen_bits_needs_its_unit(root: Path) -> None:
    save(root / "b.png", MILLIMETRES)
    (result,) = checked(root, pair("depth"))
    assert error(result) == (
        "undeclared: b.png: 16 bits of depth without a unit; give --metres-per-level, such as 0.001 for millimetres"
    )
    for scale, metres in ((0.001, 5.5), (1 / 5000, 1.1), (1 / 256, 10.0)):
        (result,) = checked(root, pair("depth"), metres_per_level=scale)
        assert np.abs(depth.read(label_of(result, root))[5:] - metres).max() <= 5 / 255
        assert depth.read(label_of(result, root))[0, 0] == 0


def test_depth_of_sixteen_bits_in_three_channels_is_that_of_one(root: Path) -> None:
    """In 8 bits 5500 would be 124."""
    (root / "b.png").write_bytes(png_file(np.repeat(MILLIMETRES[..., None], 3, axis=2), 2, 16))
    (result,) = checked(root, pair("depth"))
    assert error(result).startswith("undeclared: b.png: 16 bits of depth")
    (result,) = checked(root, pair("depth"), metres_per_level=0.001)
    assert np.abs(depth.read(label_of(result, root))[5:] - 5.5).max() <= 5 / 255


def test_white_of_depth_in_few_bits_is_ten_metres(root: Path) -> None:
    """A program that shrinks PNGs writes levels 0, 17, ... 255 as 0, 1, ... 15: the picture is the same."""
    levels = np.arange(16 * 24).reshape(16, 24, 1) % 16
    (root / "b.png").write_bytes(png_file(levels, 0, 4))
    (result,) = checked(root, pair("depth"))
    assert np.array_equal(label_of(result, root), np.repeat(levels * 17, 3, axis=2))


@pytest.mark.parametrize(("scale", "levels"), [(1.0, "0 to 9000 of 1 m"), (1e-8, "0 to 9000 of 1e-08 m")])
def test_a_unit_by_which_nothing_has_a_depth_is_refused(root: Path, scale: float, levels: str) -> None:
    save(root / "b.png", MILLIMETRES)
    (result,) = checked(root, pair("depth"), metres_per_level=scale)
    assert error(result) == (
        f"no_depth: b.png: levels {levels}, none of them 0.001 to 10 m deep; correct --metres-per-level"
    )


def test_depth_in_colours_is_refused(root: Path) -> None:
    save(root / "b.png", photo(1))
    (result,) = checked(root, pair("depth"))
    assert error(result).startswith("unsupported: b.png: depth in colour")


def test_painters_masks_are_read_by_their_own_colours(root: Path) -> None:
    ade = np.zeros((16, 24, 3), np.uint8)
    ade[:4], ade[4:8, :12], ade[4:8, 12:] = (255, 255, 255), (255, 255, 129), (255, 213, 255)
    save(root / "b.png", ade)
    (result,) = checked(root, pair("segmentation", type="ade20k_image2semantic"))
    indices = segmentation.read(label_of(result, root), result.meta)
    numbers = segmentation.class_table(result.meta).to_numbers(indices)
    assert numbers[:, [0, 23]].tolist() == [[1, 1]] * 4 + [[4, 7]] * 4 + [[0, 0]] * 8  # ADE20K's; 0 is not labelled
    (result,) = checked(root, pair("segmentation"))
    assert error(result).startswith("unknown_class: b.png: colour")


def test_void_of_pascal_voc_is_void(root: Path) -> None:
    truth = np.full((16, 24), 12, np.uint8)
    truth[:3], truth[3:5] = 0, VOID
    mask = Image.fromarray(truth)
    mask.putpalette(segmentation.palette(256).ravel().tolist())
    mask.save(root / "b.png")
    (result,) = checked(root, pair("segmentation"))
    assert np.array_equal(segmentation.read(label_of(result, root), result.meta), truth)
    assert segmentation.class_table(result.meta).names[12] == "dog"


def test_classes_that_a_row_names_are_pascal_vocs_numbers_and_colours(root: Path) -> None:
    names = [f"class {number}" for number in range(134)]
    truth = (np.arange(16 * 24).reshape(16, 24) % 134).astype(np.uint8)
    for label in (truth, segmentation.render(truth)):
        save(root / "b.png", label)
        (result,) = checked(root, pair("segmentation", classes=names))
        assert np.array_equal(segmentation.read(label_of(result, root), result.meta), truth)
        assert result.meta["classes"] == names


def test_columns_that_are_called_as_classes_are_do_not_change_them(root: Path) -> None:
    """A list's column "void" of its own meaning would keep the first class from being scored."""
    save(root / "b.png", np.ones((16, 24), np.uint8))
    masks = ClassesFile.model_validate({"classes": ["soil", "road"]}).coding()
    own = {"void": 0, "class_numbers": [7, 8], "class_colours": "red"}
    (result,) = checked(root, pair("segmentation", lens="wide", **own), masks=masks)
    assert result.meta == {"lens": "wide", "classes": ["soil", "road"], "label_file": "b.png"}


def test_normals_that_are_no_directions_are_none(root: Path) -> None:
    levels = np.full((16, 24, 3), (128, 128, 255), np.uint8)
    levels[0, :4] = [(127, 127, 127), (128, 128, 128), (1, 0, 0), (0, 0, 0)]
    save(root / "b.png", levels)
    (result,) = checked(root, pair("normals"))
    valid = normals.read(label_of(result, root)).any(axis=2)
    assert not valid[0, :4].any()
    assert valid.sum() == valid.size - 4
    save(root / "b.png", photo(1) // 4 + 96)  # greys
    (result,) = checked(root, pair("normals"))
    assert error(result).startswith("unsupported: b.png: most pixels are no directions")


def test_edges_of_another_coding_are_refused(root: Path) -> None:
    lines = np.zeros((16, 24), np.uint8)
    lines[4] = 1
    for label, reason in ((lines, "unsupported"), (255 - 255 * lines, "inverted")):
        save(root / "b.png", label)
        (result,) = checked(root, pair("edges"))
        assert error(result).partition(":")[0] == reason


@pytest.mark.parametrize("task", ["segmentation", "depth", "edges", "pose"])
def test_labels_turn_with_their_images_or_are_refused(root: Path, task: str) -> None:
    label = np.zeros((16, 24), np.uint8)
    label[2, 3] = 9
    image = Image.fromarray(photo(0))
    turn = Image.Exif()
    save(root / "b.png", label)
    for orientation, declared, expected in (
        (6, None, "turned"),  # the sizes tell
        (3, None, "refused"),
        (3, "stored", "turned"),
        (3, "upright", "as it is"),
    ):
        turn[274] = orientation
        image.save(root / "a.png", exif=turn)
        (result,) = checked(root, pair(task), orientation=declared)
        if expected == "refused":
            assert error(result).startswith("orientation: b.png: EXIF turns the image")
            continue
        drawn = np.argwhere(label_of(result, root).any(axis=2)).tolist()
        turned = {6: [3, 13], 3: [13, 20]}[orientation]
        assert drawn == [turned if expected == "turned" else [2, 3]]
    (result,) = checked(root, pair("normals"))
    assert "error" in result.meta


def test_names_in_another_spelling_are_found(root: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    save(root / f"img/{decomposed}.png", photo(0))
    save(root / f"img/{composed}o.png", photo(0))
    for written, found in (
        (f"img/{composed}.png", f"img/{decomposed}.png"),
        (f"img/{decomposed}o.png", f"img/{composed}o.png"),
        (f" img/{decomposed}.png ", f"img/{decomposed}.png"),
        (f"img\\{composed}.png ", f"img/{decomposed}.png"),
        (f"img/{decomposed}.png", f"img/{decomposed}.png"),
    ):
        (result,) = checked(root, pair("colorization", written, written))
        assert (result.image.uri, result.label.uri) == (found, found), written
        assert "error" not in result.meta
    save(root / " blank.png", photo(0))
    save(root / "blank.png", photo(1))
    (result,) = checked(root, pair("colorization", " blank.png", "blank.png"))
    assert (result.image.uri, result.label.uri) == (" blank.png", "blank.png")


def test_what_is_missing_or_broken_is_said_and_keeps_its_pictures(root: Path) -> None:
    """So that the pair keeps its id, and the build finds a file that has come in the meantime."""
    save(root / "c.png", photo(1))
    (root / "d.png").write_bytes((root / "c.png").read_bytes()[:100])
    bomb(root / "e.png")
    (root / "link.png").symlink_to("/etc/hostname")
    pairs = [
        pair("colorization", *names)
        for names in (
            ("none.png", "c.png"), ("a.png", "none.png"), ("A.png", "c.png"), ("a.png", "d.png"), ("e.png", "c.png"),
            ("a.png", "../x.png"), ("link.png", "c.png"), ("a.png", "https://host/c.png"), ("a.png", "c.png"),
        )
    ]  # fmt: skip
    results = checked(root, *pairs)
    assert [(result.image, result.label, result.pair_id) for result in results] == [
        (pair.image, pair.label, pair.pair_id) for pair in pairs
    ]
    messages = [result.meta.get("error", "") for result in results]
    assert [message.partition(":")[0] for message in messages] == [
        "missing", "missing", "missing", "truncated", "too_large", "outside_root", "outside_root", "outside_root", "",
    ]  # fmt: skip
    assert messages[0] == "missing: image: 'none.png' is not below the root"
    assert messages[1] == "missing: label: 'none.png' is not below the root"
    assert messages[2] == "missing: image: 'A.png' is not below the root; 'a.png' is there: capitals matter"


def test_a_folder_that_cannot_be_listed_gives_no_hint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.listdir", refuse)
    first, _ = checked(root, pair("depth", "A.png"), pair("depth", "a.png"))
    assert first.meta["error"] == "missing: image: 'A.png' is not below the root"


def test_pairs_ahead_are_not_opened_once_nobody_wants_them() -> None:
    go_on, opened = threading.Event(), []

    def slow(each: Pair) -> Pair:
        opened.append(each)
        if len(opened) > 1:
            go_on.wait(10)
        return each

    results: Any = in_order(slow, [pair("depth", f"{number}.png") for number in range(100)])
    assert next(results).image.uri == "0.png"
    threading.Timer(0.3, go_on.set).start()
    results.close()
    assert len(opened) < 20


@pytest.mark.parametrize("metres", [0.0, float("nan"), float("inf")])
def test_a_unit_of_no_length_is_refused(metres: float) -> None:
    with pytest.raises(ConfigError, match=r"^--metres-per-level .*: must be above 0; 0\.001 is for millimetres$"):
        label_rules(None, metres, None, None, (30.0, 64.0, 3))


def test_a_root_without_any_of_the_images_is_refused(root: Path) -> None:
    with pytest.raises(ManifestError, match=r"none of the 2 images is there, such as 'x\.png'; give --root$"):
        checked(root, pair("depth", "x.png"), pair("depth", "y.png"))


def test_a_label_of_another_shape_is_named(root: Path) -> None:
    save(root / "b.png", np.zeros((16, 20), np.uint8))
    (result,) = checked(root, pair("depth"))
    assert error(result) == "label_shape: b.png: label is 20x16 px, image is 24x16 px; their aspects differ"
    save(root / "b.png", np.zeros((32, 48), np.uint8))  # larger, of the same shape
    (result,) = checked(root, pair("depth"))
    assert result.label == Picture(uri="b.png")


def test_the_order_of_the_list_is_kept(root: Path) -> None:
    for number in range(200):
        save(root / f"{number}.png", photo(number, 8, 8))
    pairs = [pair("colorization", f"{number}.png", f"{number}.png") for number in range(200)]
    assert [result.pair_id for result in checked(root, *pairs)] == [each.pair_id for each in pairs]


def test_the_command_counts_and_names_what_is_missing(root: Path, command: Callable[..., tuple[Any, str]]) -> None:
    (root / "list.csv").write_text("image,label,error\na.png,a.png,0.5\n" + "a.png,none.png,\n" + "b.png,a.png,\n")
    out = root / "pairs.parquet"
    answer, message = command("manifest", root / "list.csv", "--task", "colorization", "--out", out)
    assert answer["pairs"] == 3
    assert message.splitlines() == [
        "covray: cannot be used, and will be rejected: missing 2",
        "covray: missing: label: 'none.png' is not below the root",
        "covray: missing: image: 'b.png' is not below the root",
    ]
    assert check_manifest(out).rows == 3
    metas = [json.loads(row["meta"]) for row in pq.read_table(out).to_pylist()]
    assert (metas[0], metas[1]["list_error"]) == ({"list_error": "0.5"}, "")
