"""Plug-ins: what installed packages add to covray by entry points, each checked before it is used.

A ``Registry`` holds everything of one kind by name, covray's own and that of other packages. A plug-in that cannot be
used is left out with one line in the log, and everything else works. ``covray plugins`` lists all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, PackageNotFoundError, entry_points, version
from typing import Any, Generic, TypeVar

from covray.errors import ConfigError, one_line

TASKS_GROUP = "covray.tasks"
"""Tasks: objects with the attributes of ``covray.tasks.base.Task``."""
METRICS_GROUP = "covray.metrics"
"""Metrics of tasks: objects as ``covray.tasks.metrics.TaskMetric``."""
PAIRS_GROUP = "covray.pairs"
"""Sources of pairs: functions as ``covray.pairs.plugin_sources.PairSource``."""
PRIORS_GROUP = "covray.priors"
"""Interpolations between two pictures: objects as ``covray.methods.FrameMaker``."""
TRACKERS_GROUP = "covray.trackers"
"""Trackers of experiments: classes as ``covray.distributed.trackers.base.Tracker``."""

_OWN = "covray"
_covray = import_module(_OWN)  # not by a statement: to import-linter the package is all that its lazy names import
_LOG = logging.getLogger("covray")

T = TypeVar("T")


class Refused(Exception):
    """A plug-in that is not used; the text says why, after its name."""


@dataclass(frozen=True)
class Plugin:
    """What was found of one entry, of an installed package or of covray itself."""

    group: str
    name: str
    """What covray calls it: of a task its own name, else that of the entry point."""
    target: str
    """The module, or the object in it, that the entry point names."""
    package: str
    version: str
    problem: str = ""
    """Why it is not used; empty if it is."""


@dataclass(frozen=True)
class Entry:
    """Something to register that is not loaded yet."""

    name: str
    target: str
    package: str
    version: str
    load: Callable[[], Any]


def own_entry(name: str, target: str) -> Entry:
    """Return the entry of something of covray's own, of which ``target`` names the module, or ``module:object``."""
    return Entry(name, target, _OWN, str(_covray.__version__), EntryPoint(name, target, "").load)


def _installed_entry(point: EntryPoint) -> Entry:
    if point.dist is None:
        return Entry(point.name, point.value, "an unknown package", "", point.load)
    return Entry(point.name, point.value, point.dist.name, point.dist.version, point.load)


class Registry(Generic[T]):
    """Everything of one kind, by name.

    covray's own come first, then those of other packages in the order of the packages' names, so that every machine
    with the same packages has the same registry. Of two with one name the first is used.
    """

    def __init__(
        self,
        group: str,
        noun: str,
        own: Iterable[Entry],
        check: Callable[[Any], None],
        name_of: Callable[[str, T], str] = lambda entry_name, _: entry_name,
    ):
        """Prepare a registry; nothing is loaded yet.

        Args:
            group: The group of the entry points.
            noun: What messages call one of the kind.
            own: covray's own.
            check: Raises Refused, with the reason, for an object that is none of the kind.
            name_of: Returns the name of an object, given the name of its entry.
        """
        self.noun = noun
        self.objects: dict[str, T] = {}
        """What was loaded, by name."""
        self._group, self._check, self._name_of = group, check, name_of
        installed = [_installed_entry(point) for point in entry_points(group=group)]
        self._entries = [*own, *sorted(installed, key=lambda entry: (entry.package, entry.name))]
        self._plugins: dict[int, Plugin] = {}  # what was loaded, by the place of its entry

    @property
    def names(self) -> list[str]:
        """Return the names of all that can be used, of those that are not loaded yet the names of their entries."""
        names = []
        for place, entry in enumerate(self._entries):
            plugin = self._plugins.get(place)
            if plugin is None or not plugin.problem:
                names.append(entry.name if plugin is None else plugin.name)
        return list(dict.fromkeys(names))

    def load_all(self) -> list[Plugin]:
        """Load what is not loaded yet; return all, also those that cannot be used."""
        for place in range(len(self._entries)):
            self._load(place)
        return [self._plugins[place] for place in range(len(self._entries))]

    def find(self, name: str) -> T:
        """Return the object called ``name``, loading no other. Raises ConfigError where it cannot be used."""
        if name not in self.objects:
            for place, entry in enumerate(self._entries):
                if entry.name == name:
                    self._load(place)
        if name in self.objects:
            return self.objects[name]
        for plugin in self._plugins.values():
            if plugin.name == name:
                raise ConfigError(f"{name}: the {self.noun} of {plugin.package} {plugin.version} {plugin.problem}")
        raise ConfigError(f"{name}: no such {self.noun}; the known ones are {', '.join(self.names)} (covray plugins)")

    def packages(self, names: Iterable[str]) -> dict[str, str]:
        """Return which package each of the loaded ``names`` is of, without covray's own: what a description records."""
        wanted, packages = set(names), {}
        for plugin in self._plugins.values():
            if plugin.name in wanted and not plugin.problem and plugin.package != _OWN:
                packages[f"{self.noun} {plugin.name}"] = f"{plugin.package} {plugin.version}".strip()
        return packages

    def _load(self, place: int) -> None:
        """Load an entry once, and note it as a plug-in: registered, or with the reason why it is not."""
        if place in self._plugins:
            return
        entry = self._entries[place]
        name, problem = entry.name, ""
        try:
            loaded = entry.load()
            self._check(loaded)
            own_name = self._name_of(entry.name, loaded)
            self._require_free(own_name)
            self.objects[own_name] = loaded
            name = own_name
        except Refused as error:
            problem = one_line(error)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - a plug-in may raise anything
            problem = f"cannot be loaded ({one_line(error)})"
        if problem:
            _LOG.warning(
                "%s %s: its %s %s %s; fix or uninstall the package",
                entry.package, entry.version, self._group, name, problem,
            )  # fmt: skip
        self._plugins[place] = Plugin(self._group, name, entry.target, entry.package, entry.version, problem)

    def _require_free(self, name: str) -> None:
        """Raise Refused for a name that is taken."""
        for plugin in self._plugins.values():
            if plugin.name == name and name in self.objects:
                raise Refused(f"has the name of another {self.noun}, {name} of {plugin.package}")


def require_attributes(noun: str, attributes: Iterable[str]) -> Callable[[Any], None]:
    """Return a check that raises Refused for an object that lacks any of ``attributes``, which a ``noun`` has."""

    def check(loaded: Any) -> None:
        missing = [attribute for attribute in attributes if not hasattr(loaded, attribute)]
        if missing:
            raise Refused(f"is no {noun}: it lacks {', '.join(missing)}")

    return check


def missing_packages(recorded: Mapping[str, str]) -> list[str]:
    """Return a line for each plug-in of ``Registry.packages`` whose package, in its version, is not installed here."""
    lines = []
    for use, package in recorded.items():
        name, _, wanted = package.rpartition(" ")
        try:
            installed = version(name)
        except (PackageNotFoundError, ValueError):
            lines.append(f"the {use} is of {package}, which is not installed; pip install {name}=={wanted}")
            continue
        if installed != wanted:
            lines.append(
                f"the {use} is of {package}, and {name} {installed} is installed; pip install {name}=={wanted}"
            )
    return lines


def require_packages(recorded: Mapping[str, str] | None, folder: str) -> None:
    """Refuse to go on with ``folder`` where a plug-in that its description records is not installed.

    Raises:
        ConfigError: In one line that names the first.
    """
    missing = missing_packages(recorded or {})
    if missing:
        raise ConfigError(f"{folder}: {missing[0]}")
