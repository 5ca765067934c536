"""Sources of pairs that other packages bring, by entry points of the group ``covray.pairs``."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, Protocol

from covray.errors import ConfigError
from covray.pairs.manifest import Pair
from covray.plugins import PAIRS_GROUP, Plugin, Refused, load_plugins


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


@functools.cache
def pair_sources() -> tuple[dict[str, PairSource], list[Plugin]]:
    """Return the sources of installed packages by name, and all plug-ins of the group."""
    sources: dict[str, PairSource] = {}

    def register(name: str, source: Any) -> str:
        if not callable(source):
            raise Refused("is no source of pairs: it cannot be called")
        if name in sources:
            raise Refused("has the name of another source")
        sources[name] = source
        return name

    plugins = load_plugins(PAIRS_GROUP, register)
    return sources, plugins


def find_source(name: str) -> PairSource:
    """Return the source called ``name``. Raises ConfigError where no installed package has one."""
    sources, _ = pair_sources()
    if name not in sources:
        known = f"the installed ones are {', '.join(sources)}" if sources else "no package with one is installed"
        raise ConfigError(f"{name}: no such source of pairs; {known} (covray plugins)")
    return sources[name]
