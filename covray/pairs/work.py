"""Pairs still to be made: a list of items, and a function that makes the pairs of an item anywhere, in any order.

A command makes them one after another in its own process, or on a pool of actors (``covray.distributed.pairs``); the
manifest has the same bytes.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from covray.pairs.manifest import Pair

Item = tuple[str, Any]
"""What one or several pairs are made of: a name that is its own, and data that can be pickled."""
Maker = Callable[[Sequence[Item]], Iterable[list[Pair]]]
"""Makes the pairs of some items: a list for each, in their order."""

MOST_ITEMS_PER_BLOCK = 64
_ITEMS_AT_ONCE = 16
"""Items that one process makes at a time: enough for the batches of a model."""


@dataclass(frozen=True)
class PairWork:
    """Pairs to be made. The pairs of an item depend on the item and the settings only."""

    items: Sequence[Item]
    """In the order of the manifest."""
    load: Callable[[], Maker]
    """Returns what makes the pairs, and loads what that needs, such as a model; it can be pickled."""
    settings: Mapping[str, Any]
    """What decides the pairs beside the items, as JSON: work that has begun is continued with the same settings."""
    unit: str = "images"
    """What an item is called where progress is shown, in the plural."""
    items_per_block: int = MOST_ITEMS_PER_BLOCK
    """Items that an actor makes at a time, at most: their pairs are in memory together."""
    uses_gpu: bool = False
    """Whether a GPU makes it faster."""
    loads_model: bool = False
    """Whether ``load`` may fail on what the user gave, so that it is tried once before actors start."""

    def __iter__(self) -> Iterator[Pair]:
        """Make the pairs in this process, one item after another."""
        make = self.load()
        # Enough for the batches of a model, and never more pictures than an actor would hold.
        step = min(_ITEMS_AT_ONCE, self.items_per_block)
        for start in range(0, len(self.items), step):
            for pairs in make(self.items[start : start + step]):
                yield from pairs

    def changed(self, change: Callable[[Pair], Pair], **settings: Any) -> PairWork:
        """Return the work with ``change``, which can be pickled, applied to all pairs; ``settings`` say what it is."""
        # A partial of a function of this module: a closure could not be pickled, and sent to an actor.
        load = functools.partial(_load_changed, self.load, change)
        return replace(self, load=load, settings={**self.settings, **settings})

    def names_sha256(self) -> str:
        """Return a SHA-256 (hex) over the names of the items in their order."""
        whole = hashlib.sha256()
        for name, _ in self.items:
            # JSON escapes line ends and broken UTF-8, so that no two lists of names are one text.
            whole.update(json.dumps(name).encode() + b"\n")
        return whole.hexdigest()


def one_by_one(make: Callable[[str, Any], list[Pair]]) -> Maker:
    """Return a ``Maker`` that makes the pairs of each item by itself."""
    return functools.partial(_make_each, make)


def _make_each(make: Callable[[str, Any], list[Pair]], items: Sequence[Item]) -> Iterator[list[Pair]]:
    for name, data in items:
        yield make(name, data)


def _load_changed(load: Callable[[], Maker], change: Callable[[Pair], Pair]) -> Maker:
    """Load what makes pairs; return it with ``change`` made to every pair."""
    return functools.partial(_make_changed, load(), change)


def _make_changed(make: Maker, change: Callable[[Pair], Pair], items: Sequence[Item]) -> Iterator[list[Pair]]:
    for pairs in make(items):
        yield [change(pair) for pair in pairs]
