"""Example pairs to choose from: a few training pairs of each adapter's task, read once when serving starts.

They come from the manifest of the dataset that the run was trained on. Where it is not there any more, the gallery is
empty, and a client sends pairs of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from covray.chains.dataset import ChainDataset
from covray.config import ServeConfig, TrainConfig
from covray.errors import CovrayError, PairError
from covray.io import storage
from covray.io.images import encode_png, resize
from covray.io.pixels import Picture
from covray.models.lvm.adapter import read_run
from covray.pairs.loading import load_pair
from covray.pairs.manifest_reading import check_manifest, row_dicts
from covray.pairs.rows import PairRow
from covray.serve.schemas import Adapters, GalleryPair
from covray.tasks import TASKS
from covray.tasks.base import Resample

Gallery = Mapping[str, tuple[GalleryPair, ...]]
"""Pairs by their task; tasks without any are left out."""

_SIDE_PX = 512
"""Longest side of a picture: no model reads more of it, and a pair stays below a megabyte or two."""
_COLUMNS = ("pair_id", "task", "image", "label", "meta")
_READ_ROWS = 64
"""Rows of a task among which its pairs are chosen: neighbours in a manifest often look alike."""
_ROWS_AT_ONCE = 16
"""Rows that are read at once with their pictures."""


@dataclass
class _Choice:
    """The rows of one row group of a manifest that are chosen, and the tasks that they are of."""

    rows: set[int] = field(default_factory=set)
    tasks: set[str] = field(default_factory=set)


def read_galleries(config: ServeConfig) -> dict[str, Gallery]:
    """Return the gallery of each adapter by its name.

    Args:
        config: Of the server. The runs are finished ones.
    """
    galleries: dict[str, Gallery] = {}
    if not config.gallery:
        return galleries
    for name, generator in config.generators().items():
        assert generator.adapter is not None
        galleries[name] = _read_gallery(generator.adapter, config.gallery)
    return galleries


def with_galleries(adapters: Adapters, galleries: Mapping[str, Gallery]) -> Adapters:
    """Return ``adapters`` with the tasks of their galleries."""
    infos = []
    for info in adapters.adapters:
        infos.append(info.model_copy(update={"gallery": tuple(galleries.get(info.name, ()))}))
    return adapters.model_copy(update={"adapters": tuple(infos)})


def _read_gallery(run: str, count: int) -> Gallery:
    """Return at most ``count`` training pairs of each task of a run; none where they cannot be read."""
    try:
        trained = TrainConfig.model_validate(read_run(run).config)
        manifest = str(ChainDataset(trained.data).config["pairs"])
        info = check_manifest(manifest)
        chosen = trained.sentences.tasks
        tasks = [task for task in info.per_task if chosen is None or task in chosen]
        gallery: dict[str, list[GalleryPair]] = {}
        for row in _spread_rows(manifest, info.files, tasks, trained.sentences.split, count):
            pairs = gallery.setdefault(row["task"], [])
            pair = _encoded(row, info.root)
            if pair is not None and len(pairs) < count:
                pairs.append(pair)
    # Example pairs are an extra: a manifest that was moved or damaged since is no reason not to serve.
    except (CovrayError, OSError, KeyError, ValidationError, pa.ArrowException):
        return {}
    return {task: tuple(pairs) for task, pairs in gallery.items() if pairs}


def _spread_rows(
    manifest: str, files: Collection[str], tasks: Collection[str], split: str, count: int
) -> Iterator[PairRow]:
    """Yield about ``count`` rows of each task, of the first row group that has any; no further rows are read.

    Args:
        manifest: The manifest.
        files: Its files.
        tasks: The tasks.
        split: Only rows of this split.
        count: Rows of each task.
    """
    filesystem, _ = storage.resolve(manifest)
    # Manifests can be large: once every task has rows, no further row group is read.
    missing = set(tasks)
    for name in files:
        if not missing:
            return
        with pq.ParquetFile(name, filesystem=filesystem) as file:
            for group in range(file.num_row_groups):
                choice = _choose(file.read_row_group(group, columns=["task", "split"]), missing, split, count)
                missing -= choice.tasks
                if choice.rows:
                    yield from _rows_of(file, group, choice.rows)


def _choose(table: pa.Table, tasks: Collection[str], split: str, count: int) -> _Choice:
    """Choose ``count`` rows of each task, spread evenly over its first ones."""
    choice = _Choice()
    of_split = np.array(table["split"].to_pylist()) == split
    task_of = np.array(table["task"].to_pylist())
    for task in tasks:
        rows = np.flatnonzero(of_split & (task_of == task))[:_READ_ROWS]
        if len(rows):
            places = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
            choice.rows.update(rows[places].tolist())
            choice.tasks.add(task)
    return choice


def _rows_of(file: pq.ParquetFile, group: int, rows: Collection[int]) -> Iterator[PairRow]:
    """Yield ``rows`` of a row group, and read no further than the last of them."""
    first, last = 0, max(rows)
    for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=list(_COLUMNS)):
        wanted = [row - first for row in sorted(rows) if first <= row < first + len(batch)]
        if wanted:
            yield from row_dicts(pa.Table.from_batches([batch]).take(wanted))
        first += len(batch)
        if first > last:
            return


def _encoded(row: PairRow, root: str | None) -> GalleryPair | None:
    """Return a row's pictures; None where they cannot be used."""
    try:
        pair = load_pair(row, root)
    except (PairError, OSError):
        return None
    label = _small(pair.label, TASKS[row["task"]].resample)
    # As text: a browser rounds whole numbers of 64 bits.
    return GalleryPair.of(str(row["pair_id"]), _small(pair.image, "bicubic"), label)


def _small(picture: Picture, resample: Resample) -> bytes:
    """Return a picture as PNG, made smaller where it is large."""
    height_px, width_px = picture.shape[:2]
    scale = _SIDE_PX / max(height_px, width_px)
    if scale < 1:
        picture = resize(picture, max(1, round(scale * height_px)), max(1, round(scale * width_px)), resample)
    return encode_png(picture)
