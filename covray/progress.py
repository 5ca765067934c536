"""What a command is doing, for whoever waits: library code names its stages, the command line shows them.

Nothing is printed here. A program that uses covray as a library can ask ``current`` for the same words.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Stage:
    """A part of a command's work, such as "reading pairs.parquet"."""

    def __init__(self, text: str):
        """Begin with ``text``, which says what is done, in the form of "reading pairs.parquet"."""
        self.text = text

    def say(self, text: str) -> None:
        """Say how far the stage is, such as "300 pairs"; cheap enough for every item of a loop."""
        self.text = text


_stages: list[Stage] = []
_displays: list[None] = []


@contextmanager
def stage(text: str) -> Iterator[Stage]:
    """Name what the block does; the command line shows the innermost stage, at once and every ten seconds."""
    entered = Stage(text)
    _stages.append(entered)
    try:
        yield entered
    finally:
        _stages.remove(entered)


def counted(items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
    """Yield ``items`` in a stage that says how many there were, how fast they come, and how long the others take.

    Args:
        items: The items.
        what: What they are, such as "pairs made".
        total: How many there are; None where that is not known.
    """
    with stage(what) as counting:
        began = time.monotonic()
        for number, item in enumerate(items, 1):
            rate = number / max(time.monotonic() - began, 1e-3)
            text = f"{number} {what}, {rate:.1f}/s"
            if total is not None:
                text = f"{number} of {total} {what}, {rate:.1f}/s, {time_left((total - number) / rate)}"
            counting.say(text)
            yield item


@contextmanager
def own_display() -> Iterator[None]:
    """Mark a block that shows its progress itself, such as by a bar: stages are not shown meanwhile."""
    _displays.append(None)
    try:
        yield
    finally:
        _displays.pop()


def current() -> str | None:
    """Return what the innermost stage says; None outside of stages, and while a block shows its progress itself."""
    stages = list(_stages)  # another thread may change the list
    return None if _displays or not stages else stages[-1].text


def time_left(seconds: float) -> str:
    """Return ``seconds`` in the unit that a reader waits in."""
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"
