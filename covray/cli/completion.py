"""What a shell completes: tasks, metrics and other known values of options, keys of ``--set``, shipped files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin

import typer

from covray.config import Section
from covray.config.fields import AddedMetric, ChainMethod, FrameMethod, TaskName
from covray.config.reference import STEPS, all_keys, key_field, key_text
from covray.config.shipped import shipped_files

Completion = Callable[[str], list[str]]
"""Returns the values that what is typed so far can become."""


def complete_tasks(incomplete: str) -> list[str]:
    """Return what the last task of a comma-separated list can become."""
    from covray.tasks import TASKS  # here: the tasks import SciPy

    return _listed(tuple(TASKS), incomplete)


def complete_metrics(incomplete: str) -> list[str]:
    """Return what the last of comma-separated metrics of other packages can become."""
    from covray.tasks.metrics import added_metrics  # here: the tasks import SciPy

    return _listed(added_metrics(), incomplete)


def complete_frame_methods(incomplete: str) -> list[str]:
    """Return what the last of comma-separated ways to make frames can become."""
    from covray.methods import frame_makers

    return _listed(frame_makers().names, incomplete)


def complete_methods(incomplete: str) -> list[str]:
    """Return what the last of comma-separated methods of chains can become."""
    from covray.methods import NO_FRAMES, frame_makers

    return _listed((*frame_makers().names, NO_FRAMES), incomplete)


def complete_steps_and_files(incomplete: str) -> list[str]:
    """Return the steps and the shipped files whose names begin with ``incomplete``."""
    return [name for name in (*STEPS, *shipped_files()) if name.startswith(incomplete)]


def complete_config_files(incomplete: str) -> list[str]:
    """Return the shipped configurations whose names begin with ``incomplete``."""
    names = [name for name in shipped_files() if not name.startswith("cluster/")]
    return [name for name in names if name.startswith(incomplete)]


def complete_keys(context: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    """Return the keys of the command's configuration that begin with ``incomplete``, each with its meaning."""
    model = STEPS.get(context.info_name or "")
    if model is None:
        return []
    return [(f"{key}=", key_text(model, key)) for key in all_keys(model) if key.startswith(incomplete)]


def completion_of(model: type[Section], key: str) -> Completion | None:
    """Return what completes the values of a dotted key; None where any value may be."""
    annotation = key_field(model, key).annotation
    if _has(annotation, TaskName):
        return complete_tasks
    if _has(annotation, AddedMetric):
        return complete_metrics
    if _has(annotation, ChainMethod):
        return complete_methods
    if _has(annotation, FrameMethod):
        return complete_frame_methods
    values = tuple(_fixed_values(annotation))
    if not values:
        return None

    def complete(incomplete: str) -> list[str]:
        return _listed(values, incomplete)

    return complete


def _has(annotation: Any, kind: Any) -> bool:
    """Return whether a field holds a ``kind`` of value, alone or several."""
    return annotation == kind or any(_has(part, kind) for part in get_args(annotation))


def _fixed_values(annotation: Any) -> Iterator[str]:
    """Yield the words of all ``Literal`` in an annotation."""
    if get_origin(annotation) is Literal:
        yield from map(str, get_args(annotation))
        return
    for part in get_args(annotation):
        yield from _fixed_values(part)


def _listed(values: Sequence[str], incomplete: str) -> list[str]:
    """Return what a comma-separated list becomes with each of ``values`` that its last part can be."""
    before, comma, last = incomplete.rpartition(",")
    named = before.split(",")
    # What the list names already is not offered again.
    return [f"{before}{comma}{value}" for value in values if value.startswith(last) and value not in named]
