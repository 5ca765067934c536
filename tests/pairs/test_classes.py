"""Own masks: every pixel is read as the class that its number or colour declares, or the mask is refused."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image

from covray.errors import ConfigError, ManifestError, PairError
from covray.io.images import decode
from covray.pairs.classes import VOID, ClassesFile, draw_mask, load_classes, painter_coding, read_mask, voc_coding
from covray.pairs.label_files import read_label_file
from covray.pairs.manifest_reading import read_classes
from covray.tasks.segmentation import class_table, export, palette, read, render
from tests.support.photographs import photo, save

NAMES = ("soil", "road", "tree", "roof", "water", "car")
NUMBERS = (0, 3, 4, 7, 100, 200)
COLOURS = ((1, 1, 1), (255, 0, 0), (0, 255, 0), (70, 70, 70), (0, 0, 255), (250, 250, 0))
VOID_NUMBER, VOID_COLOUR = 33, (255, 0, 255)
TRUTH = np.random.default_rng(0).integers(0, 7, (30, 40)).astype(np.uint8)
TRUTH[TRUTH == 6] = VOID
"""Six classes and void, as their indices."""


def declared(index: bool = True, colour: bool = True, **more: Any) -> dict[str, Any]:
    """The six classes as a file declares them."""
    classes = []
    for name, number, rgb in zip(NAMES, NUMBERS, COLOURS, strict=True):
        item: dict[str, Any] = {"name": name}
        item |= {"index": number} if index else {}
        item |= {"colour": list(rgb)} if colour else {}
        classes.append(item)
    void: dict[str, Any] = {"index": VOID_NUMBER} if index else {}
    void |= {"colour": list(VOID_COLOUR)} if colour else {}
    return {"classes": classes, "void": void, **more}


def in_numbers(kind: type[np.unsignedinteger] = np.uint8) -> NDArray[Any]:
    table = np.zeros(256, kind)
    table[:6], table[VOID] = NUMBERS, VOID_NUMBER
    return table[TRUTH]


def in_colours() -> NDArray[np.uint8]:
    table = np.zeros((256, 3), np.uint8)
    table[:6], table[VOID] = COLOURS, VOID_COLOUR
    return table[TRUTH]


def with_palette(colours: bool) -> Image.Image:
    """An indexed PNG: the class's own number, in its colour or in colours that say nothing."""
    image = Image.fromarray(in_numbers())
    table = np.random.default_rng(1).integers(0, 256, (256, 3)).astype(np.uint8)
    if colours:
        table[list(NUMBERS)], table[VOID_NUMBER] = COLOURS, VOID_COLOUR
    image.putpalette(table.ravel().tolist())
    return image


def encoded(image: Image.Image | NDArray[Any], kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, kind, **options)
    return buffer.getvalue()


def mask(data: bytes, values: dict[str, Any]) -> NDArray[np.uint8]:
    return read_mask(read_label_file(data), ClassesFile.model_validate(values).coding())


CODINGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "index": (in_numbers(), declared(colour=False)),
    "index of 16 bits": (in_numbers(np.uint16), declared(colour=False)),
    "index in three channels": (np.repeat(in_numbers()[..., None], 3, axis=2), declared(colour=False)),
    "palette of own colours": (with_palette(colours=True), declared()),
    "palette that says nothing": (with_palette(colours=False), declared(colour=False)),
    "colours": (in_colours(), declared(index=False)),
    "colours of a palette": (with_palette(colours=True), declared(index=False)),
    "colours, both declared": (in_colours(), declared()),
    "opaque colours": (np.dstack([in_colours(), np.full(TRUTH.shape, 255, np.uint8)]), declared(index=False)),
}


@pytest.mark.parametrize("coding", CODINGS)
def test_every_pixel_of_every_coding_is_read_as_its_class(coding: str) -> None:
    image, values = CODINGS[coding]
    assert np.array_equal(mask(encoded(image), values), TRUTH)


@pytest.mark.parametrize("coding", ["index", "palette of own colours", "palette that says nothing", "colours"])
def test_own_masks_go_through_the_manifest_and_back(
    coding: str, tmp_path: Path, command: Callable[..., tuple[Any, str]]
) -> None:
    image, values = CODINGS[coding]
    save(tmp_path / "a.png", photo(0, 30, 40))
    (tmp_path / "mask.png").write_bytes(encoded(image))
    (tmp_path / "classes.yaml").write_text(json.dumps(values))
    (tmp_path / "list.csv").write_text("image,label\na.png,mask.png\n")
    options = ("--task", "segmentation", "--classes", tmp_path / "classes.yaml", "--out", tmp_path / "pairs.parquet")
    answer, message = command("manifest", tmp_path / "list.csv", *options)
    assert (answer["pairs"], message) == (1, "")
    (row,) = pq.read_table(tmp_path / "pairs.parquet").to_pylist()
    meta, label = json.loads(row["meta"]), decode(row["label"]["bytes"])
    assert np.array_equal(read(label, meta), TRUTH)
    assert class_table(meta).names == NAMES
    returned = np.asarray(Image.open(io.BytesIO(export(label, meta)["classes.png"])))
    numbers = in_numbers() if values["classes"][0].get("index") is not None else TRUTH
    assert np.array_equal(returned, numbers)  # by position, and 255 for void, where the masks have no numbers


@pytest.mark.parametrize("coding", CODINGS)
def test_an_example_of_every_coding_is_drawn_as_the_dataset_is(coding: str) -> None:
    """By ``meta`` alone, as ``covray generate`` knows the classes."""
    image, values = CODINGS[coding]
    meta = json.loads(json.dumps(ClassesFile.model_validate(values).coding().meta))
    drawn = draw_mask(encoded(image), meta)
    assert np.array_equal(decode(drawn), render(TRUTH))
    assert draw_mask(drawn, meta) == drawn  # a label of the manifest is drawn already
    with pytest.raises(PairError, match="unknown_class"):
        draw_mask(encoded(photo(0)), meta)
    assert draw_mask(encoded(photo(0)), {"classes": ["sky", "wall"]}) == encoded(photo(0))


def test_a_plain_list_of_names_is_enough() -> None:
    values = {"classes": list(NAMES), "void": 255}
    assert np.array_equal(mask(encoded(TRUTH), values), TRUTH)


def test_what_is_none_of_the_classes_is_refused() -> None:
    odd = in_numbers().copy()
    odd[3, 3] = 5  # near two of the classes
    off = in_colours().copy()
    off[3, 3] = (255, 1, 0)
    for image, values, message in (
        (odd, declared(colour=False), "number 5 is none of the 6 classes"),
        (off, declared(index=False), r"colour \(255, 1, 0\) is none of the 6 classes"),
        (in_colours(), declared(colour=False), "a mask in colour, where the classes have numbers"),
        (in_numbers(), {**declared(colour=False), "void": None}, "number 33 is none"),
    ):
        with pytest.raises(PairError, match=f"unknown_class: .*{message}"):
            mask(encoded(image), values)


def test_a_jpeg_is_read_by_colours_with_tolerance_only() -> None:
    # Blocks of eight pixels, so that colours stay near what they were.
    truth = np.kron(TRUTH[:4, :5] % 6, np.ones((16, 16), np.uint8)).astype(np.uint8)
    colours = np.array(COLOURS, np.uint8)[truth]
    data = encoded(colours, "JPEG", quality=100, subsampling=0)
    with pytest.raises(PairError, match="set tolerance if the mask is a JPEG"):
        mask(data, declared(index=False))
    assert np.array_equal(mask(data, declared(index=False, tolerance=20)), truth)
    with pytest.raises(PairError, match="which changes the numbers"):
        mask(encoded(in_numbers(), "JPEG", quality=100), declared(colour=False))


def test_a_palette_of_greys_in_another_order_is_ambiguous() -> None:
    """Programs that shrink PNGs make such files of grey ones: level k is no longer index k."""
    image = Image.fromarray((TRUTH % 6).astype(np.uint8))
    image.putpalette([level for index in (1, 0, 2, 3, 4, 5) for level in (index,) * 3])
    with pytest.raises(PairError, match="ambiguous"):
        mask(encoded(image), {"classes": list(NAMES)})
    image.putpalette([level for index in range(6) for level in (index,) * 3])
    assert np.array_equal(mask(encoded(image), {"classes": list(NAMES)}), TRUTH % 6)


def test_a_palette_whose_numbers_and_colours_disagree_is_ambiguous() -> None:
    image = Image.fromarray(in_numbers())
    table = np.zeros((256, 3), np.uint8)
    table[list(NUMBERS)], table[VOID_NUMBER] = COLOURS[::-1], VOID_COLOUR
    image.putpalette(table.ravel().tolist())
    with pytest.raises(PairError, match=r"ambiguous: .* declare only index or only colour"):
        mask(encoded(image), declared())


# --- without a declaration -------------------------------------------------------------------------------------------


def recognised(image: Image.Image | NDArray[Any], kind: str = "PNG") -> NDArray[np.uint8]:
    return read_mask(read_label_file(encoded(image, kind)), voc_coding())


VOC = np.random.default_rng(3).integers(0, 22, (30, 40)).astype(np.uint8)
VOC[VOC == 21] = VOID


def test_pascal_voc_is_recognised_in_every_form() -> None:
    indexed = Image.fromarray(VOC)
    indexed.putpalette(palette(256).ravel().tolist())
    for image in (VOC, indexed, indexed.convert("RGB"), np.repeat(VOC[..., None], 3, axis=2)):
        assert np.array_equal(recognised(image), VOC)


def test_what_is_not_pascal_voc_is_refused() -> None:
    ade = np.zeros((64, 64, 3), np.uint8)
    ade[:32], ade[32:, :32], ade[32:, 32:] = (255, 255, 255), (255, 255, 129), (255, 213, 255)
    binary = np.zeros((16, 16), np.uint8)
    binary[4:8] = 255
    quantised = Image.fromarray(TRUTH % 6)
    quantised.putpalette([value for colour in COLOURS for value in colour])
    for image, message in (
        (ade, "unknown_class: colour"),
        (np.full((8, 8), 21, np.uint8), "unknown_class: number 21"),
        (np.full((8, 8), 254, np.uint8), "unknown_class: number 254"),  # void a level off
        (photo(0), "unknown_class"),
        (Image.fromarray(binary).convert("1"), "ambiguous: one bit a pixel"),
        (binary, "ambiguous: numbers 0 and 255: void or a class"),
        (np.repeat(binary[..., None], 3, axis=2), "ambiguous: numbers 0 and 255"),
        (quantised, "ambiguous: a palette of other colours than PASCAL VOC's"),
    ):
        with pytest.raises(PairError, match=f"{message}.*--classes"):
            recognised(image)


def test_painters_colours_are_those_of_its_scripts() -> None:
    """ADE20K: 256 // 6 = 42 between levels; COCO: 256 // 7 = 36; black is not labelled."""
    ade, coco = painter_coding(150, 6), painter_coding(133, 7)
    expected = {(255, 255, 255): 0, (255, 255, 129): 3, (255, 213, 255): 6, (213, 255, 255): 36, (0, 0, 0): VOID}
    assert ade.colours is not None
    assert {colour: ade.colours[colour] for colour in expected} == expected
    assert coco.colours is not None
    assert (coco.colours[219, 255, 255], coco.colours[255, 255, 39], len(coco.colours)) == (49, 6, 134)
    table = class_table(ade.meta)
    assert (table.numbers[0], table.numbers[-1], table.void_number) == (1, 150, 0)


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "valid dictionary|Input should be"),
        ("classes: []", "classes: .*at least 1"),
        ("classes: [a, a]", "two classes have one name"),
        ("classes: [{name: a, index: 1}, {name: b}]", "some classes have index and some have not"),
        ("classes: [{name: a, index: 1}, {name: b, index: 1}]", "two of the classes and void have one index"),
        ("{classes: [{name: a, index: 1}], void: 1}", "two of the classes and void have one index"),
        ("classes: [{name: a, color: [1, 2, 3]}, {name: b, color: '#010203'}]", "have one colour"),
        ("classes: [{name: a, colour: [1, 2, 256]}]", r"classes\.0\.colour\.2: .*less than or equal to 255"),
        ("classes: [{name: a, colour: red}]", r"classes\.0\.colour"),
        ("classes: [{name: a, index: -1}]", r"classes\.0\.index: .*greater"),
        ("classes: [{name: a, index: true}]", r"classes\.0\.index"),
        ("classes: [{name: a, rgb: [1, 2, 3]}]", r"classes\.0\.rgb: Extra"),
        ("{classes: [{name: a, colour: [0, 0, 0]}, {name: b, colour: [9, 9, 9]}], tolerance: 5}", "tolerance 5 is not"),
        ("classes: [", "cannot be read"),
        (b"\xff\xfe\xff", "cannot be read"),
    ],
)
def test_a_malformed_file_is_one_line_that_names_the_place(tmp_path: Path, text: str | bytes, message: str) -> None:
    path = tmp_path / "classes.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=rf"^--classes [^\n]*({message})[^\n]*$"):
        load_classes(str(path))


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_classes(str(tmp_path / "classes.yaml"))


def test_more_classes_than_colours_are_refused() -> None:
    ClassesFile.model_validate({"classes": [f"class {number}" for number in range(255)], "void": 300})
    with pytest.raises(ValueError, match="at most 255"):
        ClassesFile.model_validate({"classes": [f"class {number}" for number in range(256)]})


# --- one palette a manifest ------------------------------------------------------------------------------------------


def test_two_sets_of_classes_in_one_manifest_are_refused(
    tmp_path: Path, command: Callable[..., tuple[Any, str]]
) -> None:
    for number, classes in enumerate((NAMES, NAMES[::-1], NAMES)):
        save(tmp_path / f"{number}.png", photo(number, 30, 40))
        save(tmp_path / f"mask{number}.png", TRUTH % 6)
        (tmp_path / "classes.yaml").write_text(json.dumps({"classes": list(classes)}))
        (tmp_path / "list.csv").write_text(f"image,label\n{number}.png,mask{number}.png\n")
        command(
            "manifest", tmp_path / "list.csv", "--task", "segmentation", "--classes", tmp_path / "classes.yaml",
            "--out", tmp_path / f"pairs/{number}.parquet", "--root", tmp_path,
        )  # fmt: skip
    with pytest.raises(
        ManifestError, match=r"two sets of classes, 6 from 'soil' to 'car' .* and 6 from 'car' to 'soil'"
    ):
        read_classes(tmp_path / "pairs")
    (tmp_path / "pairs/1.parquet").unlink()
    assert read_classes(tmp_path / "pairs") == {"classes": list(NAMES)}
    assert np.array_equal(read(render(TRUTH % 6), read_classes(tmp_path / "pairs")), TRUTH % 6)


@pytest.mark.parametrize("meta", ['{"classes": ["soil", ', "[1]", "classes"])
def test_damaged_meta_of_a_mask_is_no_default(
    tmp_path: Path, command: Callable[..., tuple[Any, str]], meta: str
) -> None:
    """PASCAL VOC's classes stand for a mask that names none, and would stand for one whose names are lost."""
    save(tmp_path / "a.png", photo(0, 30, 40))
    save(tmp_path / "mask.png", TRUTH % 6)
    (tmp_path / "list.csv").write_text("image,label\na.png,mask.png\n")
    manifest = tmp_path / "pairs.parquet"
    command("manifest", tmp_path / "list.csv", "--task", "segmentation", "--out", manifest)
    table = pq.read_table(manifest)
    pq.write_table(table.set_column(table.schema.get_field_index("meta"), "meta", pa.array([meta])), manifest)
    with pytest.raises(ManifestError, match=r"pairs\.parquet: meta of pair -?\d+ is no JSON object"):
        read_classes(manifest)
