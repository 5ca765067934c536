"""Pairs of rows of Parquet files, read a part of a row group at a time wherever the files lie."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from covray.errors import ManifestError
from covray.io import storage
from covray.pairs.manifest import Pair
from covray.pairs.sources import draw
from covray.pairs.user_labels import LabelRules, check_pair, in_order
from covray.pairs.user_lists import list_picture
from covray.pairs.values import reading
from covray.pairs.work import Item, PairWork
from covray.tasks.base import Meta

ROWS_PER_ITEM = 128
"""Rows of a row group that are made at a time."""


@dataclass(frozen=True)
class RowSource:
    """How rows become pairs."""

    task: str
    split: str
    image_column: str
    label_column: str
    meta: Meta
    """What all rows keep."""


@dataclass(frozen=True)
class _Group:
    """A row group of a file."""

    file: str
    number: int
    first: int
    """The place in the file of its first row."""
    rows: int

    def name(self, row: int) -> str:
        """Return the name of a row, which is its own among all files."""
        return f"{self.file}#{self.first + row}"


@dataclass(frozen=True)
class _Part:
    """Some rows of one row group."""

    group: _Group
    rows: tuple[int, ...]


def row_pairs(
    files: Sequence[str], source: RowSource, rules: LabelRules, count: int | None = None, seed: int = 0
) -> PairWork:
    """Return a pair for every row of ``files``; only their footers are read here.

    Args:
        files: Addresses of Parquet files.
        source: How rows become pairs.
        rules: What is declared of the labels.
        count: Only so many rows, sampled by the seed, the file and the row.
        seed: Of the sample.

    Raises:
        ManifestError: A file cannot be read, lacks a column, or there are no rows.
        ConfigError: ``count`` is below 1.
    """
    groups: list[_Group] = []
    for file in files:
        groups += _groups(file, source)
    if not sum(group.rows for group in groups):
        raise ManifestError(f"{files[0]}: holds no rows; give files with pairs")
    chosen = {group: list(range(group.rows)) for group in groups}
    if count is not None:
        chosen = _sample(groups, count, seed)
    settings = {"source": "rows", **asdict(source), **rules.settings()}
    load = functools.partial(_load, source, rules)
    return PairWork(_items(chosen), load, settings, unit="parts", items_per_block=2)


def _sample(groups: Sequence[_Group], count: int, seed: int) -> dict[_Group, list[int]]:
    places: dict[str, tuple[_Group, int]] = {}
    for group in groups:
        for row in range(group.rows):
            places[group.name(row)] = (group, row)
    rows: dict[_Group, list[int]] = {group: [] for group in groups}
    for name in draw(places, count, seed):
        group, row = places[name]
        rows[group].append(row)
    return rows


def _groups(file: str, source: RowSource) -> list[_Group]:
    """Return the row groups of a file that has the columns. Raises ManifestError."""
    # The footer alone says what is in a file: datasets of the hub have terabytes.
    with reading(file):
        filesystem, inner = storage.resolve(file)
        with pq.ParquetFile(inner, filesystem=filesystem) as parquet:
            columns = parquet.schema_arrow.names
            metadata = parquet.metadata
    for option, column in (("--image-column", source.image_column), ("--label-column", source.label_column)):
        if column not in columns:
            raise ManifestError(f"{file}: has no column {column}; its columns are {', '.join(columns)}: give {option}")
    groups, first = [], 0
    for number in range(metadata.num_row_groups):
        groups.append(_Group(file, number, first, metadata.row_group(number).num_rows))
        first += groups[-1].rows
    return groups


def _items(chosen: Mapping[_Group, list[int]]) -> list[Item]:
    """Return the parts that hold the chosen rows, in the order of files and rows."""
    items: list[Item] = []
    for group, rows in chosen.items():
        rows.sort()
        for start in range(0, len(rows), ROWS_PER_ITEM):
            # The rows are in the name: with another sample a part is other work, and must not be taken for this one.
            part = tuple(rows[start : start + ROWS_PER_ITEM])
            items.append((f"{group.name(0)}+{','.join(map(str, part))}", _Part(group, part)))
    return items


def _load(source: RowSource, rules: LabelRules) -> functools.partial[Iterator[list[Pair]]]:
    return functools.partial(_made, source, rules)


def _made(source: RowSource, rules: LabelRules, items: Sequence[Item]) -> Iterator[list[Pair]]:
    check = functools.partial(check_pair, root=None, rules=rules)
    for _, part in items:
        yield list(in_order(check, _pairs(source, part)))


def _pairs(source: RowSource, part: _Part) -> Iterator[Pair]:
    file = part.group.file
    # Image and label may be one column.
    columns = list(dict.fromkeys([source.image_column, source.label_column]))
    with reading(file):
        filesystem, inner = storage.resolve(file)
        with pq.ParquetFile(inner, filesystem=filesystem) as parquet:
            table = parquet.read_row_group(part.group.number, columns=columns)
        # Within ``reading``: Parquet may call text what is not UTF-8, which shows here only.
        values = table.take(pa.array(part.rows)).to_pylist()
    for row, cells in zip(part.rows, values, strict=True):
        number = part.group.first + row
        image, label = (
            list_picture(file, f"row {number}", column, cells[column], "")
            for column in (source.image_column, source.label_column)
        )
        yield Pair(source.task, source.split, image, label, {**source.meta, "row": f"{_name(file)}#{number}"})


def _name(file: str) -> str:
    """Return what rows call a file: without the hub's address, which ``meta`` has by itself."""
    return file.partition("@")[2].partition("/")[2] if file.startswith("hf://") else file
