"""Contact sheets: the chains of a dataset as one picture a task, to look at."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image, ImageDraw

from covray.chains.dataset import ChainDataset, task_of
from covray.io.drawing import FAINT, GAP_PX, PAPER, TILE_PX, load_font
from covray.models.tokenizer.vqgan import Tokenizer

_MARGIN_PX, _META_PX, _METHOD_PX = 28, 230, 86
_INK, _RULE = "#1c1f24", "#e3e5e9"


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
    """The first ``limit_per_task`` good pairs of every task (or of ``tasks``), by task, all their frames decoded."""
    chosen = sorted({task_of(shard) for shard in dataset.shards} if tasks is None else set(tasks))
    methods, alphas = dataset.methods, dataset.alphas
    rows = [row for task in chosen for row in islice(dataset.rows(tasks=[task]), limit_per_task)]
    tokens = []
    for row in rows:
        frames = {(frame["method"], frame["alpha"]): frame["tokens"] for frame in row["frames"]}
        tokens += [row["source"], row["label"], *(frames[method, alpha] for method in methods for alpha in alphas)]
    if not rows:
        return []
    pictures = tokenizer.decode(np.stack(tokens))
    size = pictures.shape[1:]
    chains = []
    for row, (source, label, *frames) in zip(rows, pictures.reshape(len(rows), -1, *size), strict=True):
        by_method = np.reshape(frames, (len(methods), len(alphas), *size))
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
    """A contact sheet as PNG: per chain a band a method, from source to label, alphas above, figures at the left.

    ``chains``: at least one, all of one dataset.
    """
    alphas, methods = chains[0].alphas, list(chains[0].frames) or [""]
    captions = ["source", *(f"α = {alpha:.3g}" for alpha in alphas), "label"]
    step = TILE_PX + GAP_PX
    left = _MARGIN_PX + _META_PX + _METHOD_PX
    chain_px = len(methods) * step + 26
    top = 112
    width = left + len(captions) * step - GAP_PX + _MARGIN_PX
    sheet = Image.new("RGB", (width, top + len(chains) * chain_px + _MARGIN_PX - 13), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN_PX, 22), title, _INK, load_font(24, bold=True))
    draw.text((_MARGIN_PX, 56), subtitle, FAINT, load_font(13))
    for column, caption in enumerate(captions):
        centre = left + column * step + TILE_PX // 2
        draw.text((centre, top - 12), caption, FAINT, load_font(12), anchor="ms")
    for index, chain in enumerate(chains):
        y = top + index * chain_px
        if index:
            draw.line((_MARGIN_PX, y - 16, width - _MARGIN_PX, y - 16), _RULE)
        draw.text((_MARGIN_PX, y), str(chain.pair_id), _INK, load_font(12, bold=True))
        draw.text((_MARGIN_PX, y + 18), chain.split, FAINT, load_font(12))
        for line, (name, value) in enumerate(quality_lines(chain)):
            draw.text((_MARGIN_PX, y + 44 + 34 * line), name, FAINT, load_font(11))
            draw.text((_MARGIN_PX, y + 58 + 34 * line), value, _INK, load_font(12))
        for band, method in enumerate(methods):
            band_y = y + band * step
            draw.text((left - 14, band_y + TILE_PX // 2), method, _INK, load_font(13), anchor="rm")
            for column, picture in enumerate([chain.source, *chain.frames.get(method, []), chain.label]):
                tile = Image.fromarray(picture).resize((TILE_PX, TILE_PX), Image.Resampling.LANCZOS)
                sheet.paste(tile, (left + column * step, band_y))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def quality_lines(chain: ChainPictures) -> list[tuple[str, str]]:
    """The quality figures of a chain as (name, figures) for people, without the ones that were not taken."""
    lines = []
    for name, columns, digits, unit in (
        ("noise |z|/√d", ("source_noise_rms", "label_noise_rms"), 2, ""),
        ("round trip", ("source_psnr", "label_psnr"), 1, " dB"),
        ("path / direct way", ("diffusion_path", "linear_path"), 2, ""),
    ):
        known = [(column.split("_")[0], chain.quality.get(column)) for column in columns]
        figures = [f"{which} {value:.{digits}f}{unit}" for which, value in known if value is not None]
        if figures:
            lines.append((name, " · ".join(figures)))
    return lines
