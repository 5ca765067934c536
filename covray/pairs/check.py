"""``covray pairs check``: open every picture of a manifest, before anything is built, and say what is in it.

``check_block`` looks at the rows of a table, on any machine; ``PairsReport`` joins what it returns.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covray.errors import PairError
from covray.io.images import picture_of
from covray.pairs.loading import LoadedPair, load_pair
from covray.pairs.manifest_reading import ManifestInfo, check_manifest, read_manifest, read_meta, row_dicts
from covray.pairs.rows import PairRow
from covray.pairs.values import storable
from covray.progress import stage
from covray.tasks import TASKS, depth, pose, segmentation
from covray.tasks.base import Meta

COLUMNS = ("pair_id", "task", "split", "image", "label", "meta")
"""Columns of a manifest that ``check_block`` reads."""
CHECKED_SCHEMA = pa.schema(
    [
        ("pair_id", pa.int64()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("name", pa.string()),  # of the image, for people
        ("error", pa.string()),  # reason and detail; null where the pair can be used
        ("image_px", pa.list_(pa.int32())),  # width, height
        ("label_px", pa.list_(pa.int32())),
        ("figures", pa.string()),  # JSON of LabelFigures
    ]
)
PAIRS_HERE = 2_000
"""Up to so many pairs are checked in the process that asks."""
_ROWS_AT_ONCE = 16
"""In this process: so often the stage says how far it is."""
NEAR_LEVELS = 16
"""A colour within so many levels of a class's, in every channel, is near it: half the least distance of two classes."""
_NAMED = 8
"""Absent classes that a note names."""
UNUSUAL_SHARE = 0.01
"""Pixels that fit no meaning are noted in the report from this share on."""


@dataclass(frozen=True)
class LabelFigures:
    """What one label consists of."""

    pixels: dict[str, int]
    """Every pixel by what it means, such as its class."""
    unusual: dict[str, int] = field(default_factory=dict)
    """Pixels that a label of the task should not have, by ``UNUSUAL``."""
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Least and greatest of a quantity."""


def check_pairs(manifest: str, on_cluster: Callable[[str, ManifestInfo], Iterator[pa.Table]]) -> PairsReport:
    """Open every picture of ``manifest`` and return what is in it.

    Args:
        manifest: a Parquet file, or a folder of them.
        on_cluster: yields the checked rows of a manifest of more than ``PAIRS_HERE`` pairs; smaller ones are checked in
            this process, in less time than a cluster takes to start.

    Raises:
        ManifestError: for a manifest that cannot be read. Pairs that cannot be used are part of the report.
    """
    info = check_manifest(manifest)
    report = PairsReport.of(manifest, info)
    with stage(f"opening {info.rows} pairs") as opening:
        # A few pictures are opened sooner than Ray starts.
        blocks = checked_here(manifest, info) if info.rows <= PAIRS_HERE else on_cluster(manifest, info)
        for block in blocks:
            report.add(block)
            opening.say(f"{report.pairs} of {info.rows} pairs opened")
    report.sort()
    return report


def checked_here(manifest: str, info: ManifestInfo) -> Iterator[pa.Table]:
    """Yield the checked rows of ``manifest`` as ``check_block`` returns them, computed in this process."""
    for batch in read_manifest(manifest, COLUMNS):
        rows = pa.Table.from_batches([batch])
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            yield check_block(rows.slice(start, _ROWS_AT_ONCE), info.root)


def check_block(table: pa.Table, root: str | None) -> pa.Table:
    """Return ``CHECKED_SCHEMA`` of the manifest rows ``table``, whose URIs are below ``root``."""
    # A pair that cannot be used is a row with its error: a block never fails.
    rows = [_checked(row, root) for row in row_dicts(table)]
    return pa.Table.from_pylist(rows, CHECKED_SCHEMA)


class CheckedRow(TypedDict, total=False):
    """A row of ``CHECKED_SCHEMA``."""

    pair_id: int
    task: str
    split: str
    name: str
    error: str
    image_px: list[int]
    label_px: list[int]
    figures: str


def _checked(row: PairRow, root: str | None) -> CheckedRow:
    checked = CheckedRow(pair_id=row["pair_id"], task=row["task"], split=row["split"], name=name_of_pair(row))
    try:
        pair = load_pair(row, root)
    except PairError as error:
        checked["error"] = str(error)
        return checked
    figures = figures_of(row["task"], pair, read_meta(row["meta"]))
    checked["image_px"] = [pair.image.shape[1], pair.image.shape[0]]
    checked["label_px"] = [pair.label.shape[1], pair.label.shape[0]]
    checked["figures"] = json.dumps(vars(figures))
    return checked


def figures_of(task: str, pair: LoadedPair, meta: Meta) -> LabelFigures:
    """Return what the label of ``pair`` consists of; of a plug-in's task, nothing."""
    return _FIGURES.get(task, _no_figures)(pair, meta)


def name_of_pair(row: PairRow) -> str:
    """Return what people know a manifest's ``row`` by: its image's URI, its photograph, or its id."""
    meta = read_meta(row["meta"])
    name = picture_of(row["image"]).uri or meta.get("photo")
    if name is None and "scene" in meta:
        name = f"scene {meta['scene']}"
    # JSON keeps the bytes of a file's name that are no UTF-8 as lone surrogates, which no table and no page can hold.
    return str(storable(str(name or row["pair_id"])))


def _segmentation_figures(pair: LoadedPair, meta: Meta) -> LabelFigures:
    """Pixels by class; a colour that is not near its nearest class is counted apart."""
    classes = segmentation.class_table(meta)
    indices = segmentation.read(pair.label, meta)
    colours = segmentation.palette(256)[indices].astype(np.int16)
    # A tolerance for rounding: labels may have been resized.
    near = np.abs(colours - pair.label).max(axis=2) <= NEAR_LEVELS
    pixels = dict.fromkeys(classes.names, 0) if "classes" in meta else {}
    counts = np.bincount(indices[near], minlength=256)
    for index in np.flatnonzero(counts):
        name = "void" if index == classes.void else classes.names[index]
        pixels[name] = pixels.get(name, 0) + int(counts[index])
    unusual = {"near no class": int((~near).sum())}
    return LabelFigures(pixels | unusual, unusual)


def _depth_figures(pair: LoadedPair, meta: Meta) -> LabelFigures:
    metres = depth.read(pair.label)
    known = (metres >= depth.MIN_M) & (metres < depth.MAX_M)
    pixels = {
        "known depth": int(known.sum()),
        "no depth": int((metres < depth.MIN_M).sum()),
        f"{depth.MAX_M:g} m and more": int((metres >= depth.MAX_M).sum()),
    }
    unusual = {"coloured": int(_colourful(pair.label).sum())}
    ranges = {}
    if known.any():
        ranges["metres"] = (float(metres[known].min()), float(metres[known].max()))
    return LabelFigures(pixels, unusual, ranges)


def _normals_figures(pair: LoadedPair, meta: Meta) -> LabelFigures:
    vectors = pair.label.astype(np.float32) / 127.5 - 1
    length = np.linalg.norm(vectors, axis=2)
    known = pair.label.any(axis=2)
    # Rounding to 8 bits changes the length of a unit vector by less than 0.01.
    unusual = {"length not 1": int((known & (np.abs(length - 1) > 0.1)).sum())}
    return LabelFigures({"direction": int(known.sum()), "no direction": int((~known).sum())}, unusual)


def _edges_figures(pair: LoadedPair, meta: Meta) -> LabelFigures:
    strength = TASKS["edges"].read(pair.label, meta)
    pixels = {
        "edge": int((strength >= 0.5).sum()),
        "weak edge": int(((strength > 0) & (strength < 0.5)).sum()),
        "no edge": int((strength == 0).sum()),
    }
    return LabelFigures(pixels, {"coloured": int(_colourful(pair.label).sum())})


def _pose_figures(pair: LoadedPair, meta: Meta) -> LabelFigures:
    drawn = pair.label.any(axis=2)
    keypoints = float(pose.read(pair.label)[:, 2].sum())
    pixels = {"drawn": int(drawn.sum()), "ground": int((~drawn).sum())}
    return LabelFigures(pixels, ranges={"keypoints": (keypoints, keypoints)})


def _photograph_figures(pair: LoadedPair, meta: Meta) -> LabelFigures:
    """Of colorization and low light, whose labels are photographs: their colours, and how bright both ends are."""
    coloured = _colourful(pair.label)
    pixels = {"coloured": int(coloured.sum()), "grey": int((~coloured).sum())}
    image_level, label_level = float(pair.image.mean()), float(pair.label.mean())
    levels = {"mean level of the image": (image_level,) * 2, "mean level of the label": (label_level,) * 2}
    return LabelFigures(pixels, ranges=levels)


def _no_figures(pair: LoadedPair, meta: Meta) -> LabelFigures:
    return LabelFigures({})


_FIGURES: dict[str, Callable[[LoadedPair, Meta], LabelFigures]] = {
    "segmentation": _segmentation_figures,
    "depth": _depth_figures,
    "normals": _normals_figures,
    "edges": _edges_figures,
    "pose": _pose_figures,
    "colorization": _photograph_figures,
    "low_light": _photograph_figures,
}
"""What the labels of a task are asked; those of a plug-in's task are opened and measured only."""

UNUSUAL = {
    "near no class": "have a colour near no class: are the classes declared, and the files lossless?",
    "length not 1": "are no unit normals: is rgb = (n + 1) / 2?",
    "coloured": "are coloured, where grey is expected",
}
"""Names of pixels that a label should not have, and what the report says of them."""


def _colourful(picture: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Where the channels differ by more than JPEG's rounding."""
    return picture.max(axis=2).astype(np.int16) - picture.min(axis=2) > 4


@dataclass
class TaskReport:
    """What the pairs of one task are."""

    pairs: int = 0
    usable: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    image_px: Counter[str] = field(default_factory=Counter)
    """Usable pairs by the size of their image, such as 640x480."""
    label_px: Counter[str] = field(default_factory=Counter)
    pixels: Counter[str] = field(default_factory=Counter)
    unusual: Counter[str] = field(default_factory=Counter)
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)

    def shares(self) -> dict[str, float]:
        """Return the share of the labels' pixels that each meaning has, the greatest first."""
        return self._of_all(self.pixels)

    def unusual_shares(self) -> dict[str, float]:
        """Return the share of the labels' pixels that look wrong, by ``UNUSUAL``."""
        return self._of_all(self.unusual)

    def _of_all(self, counts: Counter[str]) -> dict[str, float]:
        total = max(1, sum(self.pixels.values()))
        return {name: count / total for name, count in counts.most_common()}


@dataclass(frozen=True)
class BadPair:
    """A pair that a build would reject."""

    pair_id: int
    task: str
    name: str
    reason: str
    detail: str


@dataclass
class PairsReport:
    """What a manifest holds, pair by pair."""

    manifest: str
    root: str | None
    tasks: dict[str, TaskReport] = field(default_factory=dict)
    bad: list[BadPair] = field(default_factory=list)

    @classmethod
    def of(cls, manifest: str, info: ManifestInfo) -> PairsReport:
        """Return the report of ``manifest`` before any of its pairs is added."""
        return cls(manifest, info.root, {task: TaskReport() for task in info.per_task})

    def sort(self) -> None:
        """Put bad pairs in an order that does not depend on who checked them."""
        self.bad.sort(key=lambda bad: (bad.name, bad.task, bad.pair_id))

    @property
    def pairs(self) -> int:
        """Pairs that were looked at."""
        return sum(task.pairs for task in self.tasks.values())

    def add(self, checked: pa.Table) -> None:
        """Add what ``check_block`` has returned."""
        for row in checked.to_pylist():
            task = self.tasks[row["task"]]
            task.pairs += 1
            task.splits[row["split"]] += 1
            if row["error"] is not None:
                reason, _, detail = row["error"].partition(": ")
                self.bad.append(BadPair(row["pair_id"], row["task"], row["name"], reason, detail))
                continue
            task.usable += 1
            task.image_px["x".join(map(str, row["image_px"]))] += 1
            task.label_px["x".join(map(str, row["label_px"]))] += 1
            figures = json.loads(row["figures"])
            task.pixels.update(figures["pixels"])
            task.unusual.update(figures["unusual"])
            for name, (low, high) in figures["ranges"].items():
                # Of all labels: the lowest and the highest value that any of them has.
                before = task.ranges.get(name, (low, high))
                task.ranges[name] = (min(low, before[0]), max(high, before[1]))

    def reasons(self) -> Counter[str]:
        """Return how many pairs are bad for each reason."""
        return Counter(bad.reason for bad in self.bad)

    def notes(self) -> list[str]:
        """Return what looks wrong though every file is sound, a line each."""
        notes = []
        for name, task in self.tasks.items():
            shares = task.shares()
            for kind, share in task.unusual_shares().items():
                if share >= UNUSUAL_SHARE:
                    notes.append(f"{name}: {share:.1%} of the labels' pixels {UNUSUAL[kind]}")
            absent = [meaning for meaning, pixels in task.pixels.items() if not pixels and meaning not in UNUSUAL]
            if name == "segmentation" and absent:
                listed = ", ".join(absent[:_NAMED])
                if len(absent) > _NAMED:
                    listed += ", ..."
                notes.append(f"segmentation: {len(absent)} classes occur in no label: {listed}")
            if name == "colorization" and task.usable and shares.get("coloured", 0) == 0:
                notes.append("colorization: no label has a colour: are image and label swapped?")
            if name == "depth" and shares.get("known depth", 1) < 0.5:
                notes.append("depth: more than half of the labels' pixels have no depth under 10 m: is the unit right?")
            image, label = task.ranges.get("mean level of the image"), task.ranges.get("mean level of the label")
            if name == "low_light" and image and label and image[0] > label[1]:
                notes.append("low_light: every image is brighter than every label: are they swapped?")
        return notes

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values."""
        tasks = {}
        for name, task in self.tasks.items():
            tasks[name] = {
                "pairs": task.pairs,
                "usable": task.usable,
                "splits": dict(task.splits),
                "image_px": dict(task.image_px.most_common()),
                "label_px": dict(task.label_px.most_common()),
                "shares": task.shares(),
                "unusual": task.unusual_shares(),
                "ranges": task.ranges,
            }
        return {
            "manifest": self.manifest,
            "root": self.root,
            "pairs": self.pairs,
            "usable": self.pairs - len(self.bad),
            "tasks": tasks,
            "reasons": dict(self.reasons().most_common()),
            "notes": self.notes(),
            "bad": [vars(bad) for bad in self.bad],
        }
