"""What the commands of ``covray pairs`` share: pairs made here or by actors, counted, shown and written."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from covray.cli.output import console, escape
from covray.errors import ConfigError
from covray.progress import counted, own_display, stage

if TYPE_CHECKING:
    from covray.pairs.manifest import Pair

_LOG = logging.getLogger("covray")

Count = Annotated[int | None, typer.Option("--count", min=1, help="Draw so many, by the seed; all by default.")]
Actors = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Make them on so many actors of Ray, here or on the cluster of RAY_ADDRESS; killed, the same command "
        "continues. By default this process makes them.",
    ),
]


def write_drawn(
    out: str, root: str, base: str | None, pairs: Iterable[Pair], count: int | None, json_: bool, actors: int | None
) -> None:
    """Write the ``pairs`` of a data set below ``root``, with paths below ``base`` if that is given."""
    from covray.pairs.sources import rebased

    placed = pairs if base is None else rebased(pairs, root, base)
    with made_by(placed, out, actors) as made:
        write_manifest(out, base or root, checked(made, count), json_, count)


@contextmanager
def made_by(pairs: Iterable[Pair], out: str, actors: int | None) -> Iterator[Iterable[Pair]]:
    """Give ``pairs``, made by ``actors`` where a number is given, for the length of the block that writes ``out``."""
    from covray.pairs.manifest import manifest_place
    from covray.pairs.work import PairWork

    if actors is None:
        yield pairs
        return
    if not isinstance(pairs, PairWork):
        raise ConfigError("--actors: this source makes its pairs one after another; leave --actors out")
    # Refused now, not after Ray has started.
    manifest_place(out)
    from covray.distributed.pairs import pairs_on_ray  # Ray takes seconds to import: only where it is needed

    with pairs_on_ray(pairs, out, actors) as made:
        yield made


def checked(pairs: Iterable[Pair], count: int | None, examples: int = 0) -> Iterator[Pair]:
    """Yield ``pairs``; then warn if there are fewer than ``count``, and of those that cannot be used.

    Args:
        pairs: Pairs with the reason in ``meta["error"]`` where they cannot be used.
        count: How many pairs were asked for; None for all.
        examples: How many errors of each reason are shown in full.
    """
    present, reasons = 0, Counter[str]()
    shown = defaultdict[str, list[str]](list)
    for pair in pairs:
        present += 1
        if "error" in pair.meta:
            reason = pair.meta["error"].partition(":")[0]
            reasons[reason] += 1
            if len(shown[reason]) < examples:
                shown[reason].append(pair.meta["error"])
        yield pair
    if count is not None and present < count:
        _LOG.warning("%d pairs asked for, only %d present: all were taken", count, present)
    if reasons:
        counts = ", ".join(f"{reason} {number}" for reason, number in reasons.most_common())
        _LOG.warning("cannot be used, and will be rejected: %s", counts)
    for reason, _ in reasons.most_common():
        for error in shown[reason]:
            _LOG.warning("%s", error)


def write_manifest(
    out: str,
    root: str | None,
    pairs: Iterable[Pair],
    json_: bool,
    total: int | None = None,
    captions: bool = False,
) -> None:
    """Write the manifest ``out`` of ``pairs``, relative to ``root``, and print what it holds.

    ``total`` is the expected number of pairs, None where it is not known. ``captions`` writes the columns of words.
    """
    from covray.pairs.manifest import ManifestWriter
    from covray.pairs.manifest_reading import check_manifest

    with ManifestWriter(out, root, captions) as writer:
        for pair in _shown(pairs, total):
            writer.add(pair)
    # Read back as a build reads it: what that would refuse is said now.
    with stage(f"checking {out}"):
        info = check_manifest(out, captions)
    result = {
        "out": out,
        "pairs": info.rows,
        "per_task": info.per_task,
        "splits": info.splits,
        "duplicates": writer.duplicates,
    }
    if json_:
        print(json.dumps(result))
        return
    table = Table("task", "pairs", box=None, pad_edge=False)
    for name, rows in info.per_task.items():
        table.add_row(name, str(rows))
    console.print(table)
    note = f", {writer.duplicates} duplicates left out" if writer.duplicates else ""
    console.print(f"{info.rows} pairs in {escape(out)}{note}", soft_wrap=True)


def _shown(pairs: Iterable[Pair], total: int | None) -> Iterator[Pair]:
    """Yield ``pairs``; show how many there are so far, by a bar on a terminal."""
    if sys.stderr.isatty():
        from rich.progress import track

        with own_display():
            yield from track(pairs, "pairs", total=total, console=Console(stderr=True))
        return
    # In a file or a pipe a bar would be a line a step.
    yield from counted(pairs, "pairs made", total)
