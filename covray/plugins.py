"""Plug-ins: what installed packages add to covray by entry points, each checked before it is used.

A plug-in that cannot be used is left out with one line in the log, and everything else works. ``covray plugins`` lists
all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from covray.errors import one_line

TASKS_GROUP = "covray.tasks"
"""Tasks: objects with the attributes of ``covray.tasks.base.Task``."""
PAIRS_GROUP = "covray.pairs"
"""Sources of pairs: functions as ``covray.pairs.plugin_sources.PairSource``."""

_LOG = logging.getLogger("covray")


class Refused(Exception):
    """A plug-in that is not used; the text says why, after its name."""


@dataclass(frozen=True)
class Plugin:
    """One entry point of an installed package."""

    group: str
    name: str
    """What covray calls it: of a task its own name, else that of the entry point."""
    target: str
    """The module, or the object in it, that the entry point names."""
    package: str
    version: str
    problem: str = ""
    """Why it is not used; empty if it is."""


def load_plugins(group: str, register: Callable[[str, Any], str]) -> list[Plugin]:
    """Load the plug-ins of a group, and log those that cannot be used.

    Args:
        group: The group of the entry points.
        register: Takes an entry point's name and its object, makes it known, and returns what covray calls it; raises
            Refused, with the reason, for an object that is none of its kind or whose name is taken.
    """
    plugins = []
    for point in entry_points(group=group):
        plugin = _load(point, group, register)
        if plugin.problem:
            _LOG.warning(
                "%s %s: its %s %s %s; fix or uninstall the package",
                plugin.package, plugin.version, group, plugin.name, plugin.problem,
            )  # fmt: skip
        plugins.append(plugin)
    return plugins


def _load(point: EntryPoint, group: str, register: Callable[[str, Any], str]) -> Plugin:
    """Return the plug-in of an entry point after registering it, or with the reason why it is not."""
    name, problem = point.name, ""
    try:
        name = register(point.name, point.load())
    except Refused as error:
        problem = one_line(error)
    except Exception as error:  # noqa: BLE001 - a plug-in may raise anything
        problem = f"cannot be loaded ({one_line(error)})"
    package, version = "an unknown package", ""
    if point.dist is not None:
        package, version = point.dist.name, point.dist.version
    return Plugin(group, name, point.value, package, version, problem)
