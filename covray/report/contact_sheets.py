"""Contact sheets: the chains of a dataset as one picture a task, to look at."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw

from covray.chains.dataset import ChainDataset, task_of
from covray.chains.shard_rows import ShardRow
from covray.io.drawing import FAINT, GAP_PX, INK, PAPER, TILE_PX, load_font
from covray.models.tokenizer.vqgan import Tokenizer
from covray.tasks import table_order

_MARGIN_PX, _TOP_PX = 28, 112
_FIGURES_PX, _METHOD_PX = 230, 86
"""Widths of the columns left of the pictures."""
_LEFT_PX = _MARGIN_PX + _FIGURES_PX + _METHOD_PX
_STEP_PX = TILE_PX + GAP_PX
_CHAIN_GAP_PX = 26
_RULE = "#e3e5e9"


@dataclass(frozen=True)
class ChainPictures:
    """One pair of a dataset, decoded from its tokens. Pictures are uint8 ``[s, s, 3]``."""

    pair_id: int
    task: str
    split: str
    source: np.ndarray
    label: np.ndarray
    frames: dict[str, np.ndarray]
    """By method, uint8 ``[frames, s, s, 3]`` in the order of ``alphas``."""
    alphas: tuple[float, ...]
    quality: dict[str, float | None]


def decode_chains(
    dataset: ChainDataset, tokenizer: Tokenizer, limit_per_task: int, tasks: Iterable[str] | None = None
) -> list[ChainPictures]:
    """Decode the first good pairs of every task with all their frames.

    Args:
        dataset: The dataset, finished or not.
        tokenizer: The tokenizer of the dataset.
        limit_per_task: The number of pairs of each task.
        tasks: The tasks to decode; by default all of the dataset.

    Returns:
        The pairs, grouped by task.
    """
    if tasks is None:
        # A task without a shard has nothing to decode yet.
        tasks = map(task_of, dataset.shards)
    chosen = set(tasks)
    rows: list[ShardRow] = []
    for task in sorted(chosen, key=table_order):
        rows += islice(dataset.rows(tasks=[task]), limit_per_task)
    return decode_rows(dataset, tokenizer, rows)


def decode_rows(dataset: ChainDataset, tokenizer: Tokenizer, rows: Sequence[ShardRow]) -> list[ChainPictures]:
    """Decode good rows of ``dataset``, as its ``rows`` yields them, with all their frames."""
    if not rows:
        return []
    # Every row has 2 + methods x alphas pictures, in the order source, label, frames by method, then by alpha.
    methods, alphas = dataset.methods, dataset.alphas
    tokens = []
    for row in rows:
        # Rows have their frames in one order, which is not that of the sheet.
        frames = {}
        for frame in row["frames"]:
            frames[frame["method"], frame["alpha"]] = frame["tokens"]
        tokens += [row["source"], row["label"]]
        for key in itertools.product(methods, alphas):
            tokens.append(frames[key])
    # All pictures of all rows in one call: the tokenizer batches them.
    pictures = tokenizer.decode(np.stack(tokens))
    size = pictures.shape[1:]

    chains = []
    # [rows, pictures a row, s, s, 3], of which the frames become [methods, alphas, s, s, 3].
    for row, (source, label, *decoded) in zip(rows, pictures.reshape(len(rows), -1, *size), strict=True):
        by_method = np.reshape(decoded, (len(methods), len(alphas), *size))
        chains.append(
            ChainPictures(
                pair_id=row["pair_id"],
                task=row["task"],
                split=row["split"] or "",
                source=source,
                label=label,
                frames=dict(zip(methods, by_method, strict=True)),
                alphas=alphas,
                quality=row["quality"] or {},
            )
        )
    return chains


def draw_sheet(chains: Sequence[ChainPictures], title: str, subtitle: str = "") -> bytes:
    """Draw a contact sheet: for each chain a row a method, from source to label, with figures at the left.

    Args:
        chains: At least one, all of one dataset.
        title: Stands at the top.
        subtitle: Stands below the title.

    Returns:
        The sheet as PNG.
    """
    # A chain without frames takes a row, too.
    rows = max(1, len(chains[0].frames))
    captions = ["source", *(f"α = {alpha:.3g}" for alpha in chains[0].alphas), "label"]
    chain_px = rows * _STEP_PX + _CHAIN_GAP_PX
    width = _LEFT_PX + len(captions) * _STEP_PX - GAP_PX + _MARGIN_PX
    sheet = Image.new("RGB", (width, _TOP_PX + len(chains) * chain_px + _MARGIN_PX - _CHAIN_GAP_PX // 2), PAPER)

    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN_PX, 22), title, INK, load_font(24, bold=True))
    draw.text((_MARGIN_PX, 56), subtitle, FAINT, load_font(13))
    for column, caption in enumerate(captions):
        centre = _LEFT_PX + column * _STEP_PX + TILE_PX // 2
        draw.text((centre, _TOP_PX - 12), caption, FAINT, load_font(12), anchor="ms")
    for index, chain in enumerate(chains):
        y = _TOP_PX + index * chain_px
        if index > 0:
            # The rule stands in the gap between two chains.
            draw.line((_MARGIN_PX, y - 16, width - _MARGIN_PX, y - 16), _RULE)
        _draw_figures(draw, chain, y)
        _draw_chain(sheet, draw, chain, y)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _draw_figures(draw: ImageDraw.ImageDraw, chain: ChainPictures, y: int) -> None:
    """Draw the figures of a chain at the left, from ``y`` pixels down."""
    draw.text((_MARGIN_PX, y), str(chain.pair_id), INK, load_font(12, bold=True))
    draw.text((_MARGIN_PX, y + 18), chain.split, FAINT, load_font(12))
    for line, (name, value) in enumerate(quality_lines(chain)):
        draw.text((_MARGIN_PX, y + 44 + 34 * line), name, FAINT, load_font(11))
        draw.text((_MARGIN_PX, y + 58 + 34 * line), value, INK, load_font(12))


def _draw_chain(sheet: Image.Image, draw: ImageDraw.ImageDraw, chain: ChainPictures, y: int) -> None:
    """Draw the pictures of a chain, a row a method; a chain without frames is one row."""
    # A chain without frames is drawn in one row without a name.
    for row, method in enumerate(chain.frames or [""]):
        row_y = y + row * _STEP_PX
        draw.text((_LEFT_PX - 14, row_y + TILE_PX // 2), method, INK, load_font(13), anchor="rm")
        for column, picture in enumerate([chain.source, *chain.frames.get(method, []), chain.label]):
            tile = Image.fromarray(picture).resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
            sheet.paste(tile, (_LEFT_PX + column * _STEP_PX, row_y))


def quality_lines(chain: ChainPictures) -> list[tuple[str, str]]:
    """Return the quality figures of a chain as (name, figures) for people, without those that were not measured."""
    lines = []
    for name, columns, digits, unit in (
        ("noise |z|/√d", ("source_noise_rms", "label_noise_rms"), 2, ""),
        ("round trip", ("source_psnr", "label_psnr"), 1, " dB"),
        ("path / direct way", ("diffusion_path", "linear_path"), 2, ""),
    ):
        figures = []
        for column in columns:
            value = chain.quality.get(column)
            if value is not None:
                figures.append(f"{column.partition('_')[0]} {value:.{digits}f}{unit}")
        if figures:
            lines.append((name, " · ".join(figures)))
    return lines
