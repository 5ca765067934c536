"""Sources of pairs: covray's own datasets, and those that other packages bring by entry points of ``covray.pairs``."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Protocol

from covray.pairs.manifest import Pair
from covray.plugins import PAIRS_GROUP, Refused, Registry, own_entry

_OWN = {
    "coco": "covray.pairs.coco:coco_pairs",
    "nyuv2-depth": "covray.pairs.nyuv2:depth_pairs",
    "nyuv2-normals": "covray.pairs.nyuv2:normals_pairs",
    "bsds": "covray.pairs.bsds:bsds_pairs",
    "lol": "covray.pairs.lol:lol_pairs",
}
"""covray's own; their commands have further options."""


class PairSource(Protocol):
    """What an entry point of ``covray.pairs`` names: a function from a folder to pairs.

    ``covray.pairs.sources.labelled`` makes pairs whose images stay where they are, and samples them by the seed.
    """

    def __call__(self, root: str, *, split: str, count: int | None, seed: int) -> Iterable[Pair]:
        """Return pairs of the data set in the folder ``root``.

        Args:
            root: The folder, on any storage; URIs of the pairs are relative to it.
            split: Split of the data set, which is the pairs' split.
            count: How many pairs to sample; None for all.
            seed: Of the sample: the same arguments give the same pairs.
        """


def _check(source: Any) -> None:
    if not callable(source):
        raise Refused("is no source of pairs: it cannot be called")


@functools.cache
def pair_sources() -> Registry[PairSource]:
    """Return the sources of pairs, which are loaded when they are asked for."""
    own = [own_entry(name, target) for name, target in _OWN.items()]
    return Registry(PAIRS_GROUP, "source of pairs", own, _check)
