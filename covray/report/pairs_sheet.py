"""Contact sheets of a manifest: its pairs as one picture a task, to look at before anything is built from them."""

from __future__ import annotations

import heapq
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from pyarrow import fs

from covray.chains.records import DatasetRecord
from covray.errors import ConfigError, PairError, one_line
from covray.io import storage
from covray.io.drawing import FAINT, GAP_PX, INK, PAPER, TILE_PX, load_font
from covray.io.images import resize
from covray.pairs.check import COLUMNS, figures_of, name_of_pair
from covray.pairs.loading import LoadedPair, load_pair
from covray.pairs.manifest_reading import ManifestInfo, check_manifest, read_manifest, read_meta, row_dicts
from covray.pairs.rows import PairRow
from covray.pairs.values import reading
from covray.progress import stage
from covray.tasks import TASKS

COLUMN_TITLES = ("image", "label", "label over image")
SHOWN_PX = 2 * TILE_PX
_MARGIN_PX, _TEXT_PX, _TOP_PX = 28, 250, 104
_RULE, _BAD = "#e3e5e9", "#b42318"
_BAD_ROW_PX = 90
_LINE_PX, _LINES, _LINE_CHARACTERS, _WIDE_LINE_CHARACTERS = 16, 14, 38, 150


def is_manifest(path: str) -> bool:
    """Return whether ``path`` is a file, or a folder of Parquet files that is no dataset of chains.

    Raises:
        ManifestError: The storage cannot be asked.
    """
    with reading(path):
        filesystem, inner = storage.resolve(path)
        if filesystem.get_file_info(inner).type == fs.FileType.File:
            return True
        if storage.exists(storage.join(path, DatasetRecord.FILE)):
            return False
        # A folder of a manifest holds Parquet files directly.
        for entry in filesystem.get_file_info(fs.FileSelector(inner, allow_not_found=True)):
            if entry.path.lower().endswith((".parquet", ".pq")):
                return True
    return False


@dataclass(frozen=True)
class ShownPair:
    """A row of a sheet."""

    name: str
    split: str
    pair: LoadedPair | None
    """None where the pair cannot be used."""
    lines: tuple[str, ...]
    """What the label consists of, or why there is none."""


def view_pairs(manifest: str, out: str, limit_per_task: int = 12) -> list[str]:
    """Write a sheet a task of ``manifest`` into the folder ``out`` and return the paths.

    The pairs shown are those of the smallest ids, which are hashes: a sample that any machine repeats.

    Raises:
        ManifestError: for a manifest that cannot be read. Pairs that cannot be used are shown with their reason.
        ConfigError: ``out`` cannot be written.
    """
    # Checked as a whole first: a sheet of a manifest that a build would refuse misleads.
    info = check_manifest(manifest)
    storage.require_writable(out)
    paths = []
    with stage(f"reading {info.rows} pairs") as reading:
        rows_by_task = _sampled_rows(manifest, limit_per_task)
        for task, rows in sorted(rows_by_task.items()):
            reading.say(f"drawing {len(rows)} pairs of {task}")
            shown = [shown_pair(row, info.root) for row in rows]
            title = f"{task}: {len(shown)} of {info.per_task[task]} pairs"
            path = storage.join(out, f"{task}.png")
            try:
                storage.write_bytes(path, draw_pairs(shown, title, _subtitle(manifest, info)))
            except OSError as error:  # the disk may have become full
                raise ConfigError(f"{path}: cannot be written ({one_line(error)}); give another --out") from error
            paths.append(path)
    return paths


def shown_pair(row: PairRow, root: str | None) -> ShownPair:
    """Return a manifest's ``row`` as a row of a sheet."""
    name, split = name_of_pair(row), row["split"]
    try:
        pair = load_pair(row, root)
    except PairError as error:
        return ShownPair(name, split, None, (str(error),))
    image, label = pair.image, pair.label
    lines = [f"image {image.shape[1]}x{image.shape[0]}, label {label.shape[1]}x{label.shape[0]}"]
    # What the label means by the task's own reading: classes with their share of pixels, or a range of values.
    figures = figures_of(row["task"], pair, read_meta(row["meta"]))
    total = sum(figures.pixels.values())
    for meaning, pixels in sorted(figures.pixels.items(), key=lambda item: -item[1]):
        if pixels:
            lines.append(f"{meaning} {pixels / total:.1%}")
    for quantity, (low, high) in figures.ranges.items():
        text = f"{quantity} {low:.3g}"
        if low != high:
            text += f" to {high:.3g}"
        lines.append(text)
    return ShownPair(name, split, pair, tuple(lines))


def draw_pairs(shown: Sequence[ShownPair], title: str, subtitle: str) -> bytes:
    """Return a sheet as PNG: a row a pair, with image, label, and the label laid over the image."""
    step = SHOWN_PX + GAP_PX
    left = _MARGIN_PX + _TEXT_PX
    width = left + len(COLUMN_TITLES) * step + _MARGIN_PX
    # A pair that cannot be used has a line of text and no pictures.
    heights_px = []
    for row in shown:
        if row.pair is None:
            heights_px.append(_BAD_ROW_PX)
        else:
            heights_px.append(step + 20)

    sheet = Image.new("RGB", (width, _TOP_PX + sum(heights_px) + _MARGIN_PX), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN_PX, 22), title, INK, load_font(24, bold=True))
    draw.text((_MARGIN_PX, 56), subtitle, FAINT, load_font(13))
    for column, caption in enumerate(COLUMN_TITLES):
        draw.text((left + column * step + SHOWN_PX // 2, _TOP_PX - 10), caption, FAINT, load_font(12), anchor="ms")

    top = _TOP_PX
    for row, height_px in zip(shown, heights_px, strict=True):
        draw.line((_MARGIN_PX, top - 6, width - _MARGIN_PX, top - 6), _RULE)
        _draw_text(draw, row, top)
        if row.pair is not None:
            for column, tile in enumerate(_tiles(row.pair)):
                sheet.paste(tile, (left + column * step, top))
        top += height_px
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _draw_text(draw: ImageDraw.ImageDraw, shown: ShownPair, top: int) -> None:
    draw.text((_MARGIN_PX, top), _printable(shown.name)[-_LINE_CHARACTERS:], INK, load_font(12, bold=True))
    draw.text((_MARGIN_PX, top + _LINE_PX), _printable(shown.split), FAINT, load_font(12))
    colour, characters = INK, _LINE_CHARACTERS
    if shown.pair is None:
        colour, characters = _BAD, _WIDE_LINE_CHARACTERS
    # Error texts can be long and contain paths; lines beyond the sheet are left out.
    lines = []
    for text in shown.lines:
        lines += textwrap.wrap(_printable(text), characters)
    for number, line in enumerate(lines[:_LINES]):
        draw.text((_MARGIN_PX, top + 40 + number * (_LINE_PX - 1)), line, colour, load_font(11))


def _tiles(pair: LoadedPair) -> list[Image.Image]:
    """Image, label and both, each within a square tile; the label is seen at the image's size."""
    # Labels may have another size than their image; "nearest" invents no colours between classes.
    height_px, width_px = pair.image.shape[:2]
    label = resize(pair.label, height_px, width_px, "nearest")
    # uint16, as the sum of two uint8 overflows.
    both = ((pair.image.astype(np.uint16) + label) // 2).astype(np.uint8)
    tiles = []
    for picture in (pair.image, label, both):
        tile = Image.fromarray(picture)
        scale = SHOWN_PX / max(tile.size)
        # At least one pixel: a panorama of 10,000 x 1 would become empty.
        size = tuple(max(1, round(side * scale)) for side in tile.size)
        tiles.append(tile.resize((size[0], size[1]), Image.Resampling.LANCZOS))
    return tiles


def _sampled_rows(manifest: str, limit_per_task: int) -> dict[str, list[PairRow]]:
    """The rows of the smallest ids of each task, by task and id."""
    # Read twice: first the narrow columns of all rows, then the pictures of the few that are shown.
    ids_by_task: dict[str, list[int]] = {}
    for batch in read_manifest(manifest, ["pair_id", "task"]):
        for row in batch.to_pylist():
            ids_by_task.setdefault(row["task"], []).append(row["pair_id"])
    wanted: set[int] = set()
    for pair_ids in ids_by_task.values():
        wanted.update(heapq.nsmallest(limit_per_task, pair_ids))
    rows_by_task: dict[str, list[PairRow]] = {}
    for batch in read_manifest(manifest, COLUMNS):
        keep = np.isin(batch.column("pair_id").to_numpy(), list(wanted))
        for row in row_dicts(batch.filter(keep)):
            rows_by_task.setdefault(row["task"], []).append(row)
    for rows in rows_by_task.values():
        rows.sort(key=lambda row: row["pair_id"])
    return rows_by_task


def _subtitle(manifest: str, info: ManifestInfo) -> str:
    splits = ", ".join(f"{split} {count}" for split, count in info.splits.items())
    tasks = ", ".join(task for task in TASKS if task in info.per_task)
    return _printable(f"{manifest} · {splits} · {tasks}")


def _printable(text: str) -> str:
    """Text of a stranger on one line."""
    shown = ""
    # Whatever is not printable would break lines or run right to left over the rest.
    for character in " ".join(text.split()):
        if not character.isprintable():
            character = "?"
        shown += character
    return shown
