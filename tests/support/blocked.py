"""Packages that are as good as not installed, in a process and in all that it starts."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

_SITE = """
import importlib.machinery

_find = importlib.machinery.PathFinder.find_spec


def _find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {blocked!r} else _find(name, path, target)


importlib.machinery.PathFinder.find_spec = staticmethod(_find_spec)  # instances, too, are asked
"""


def block(folder: Path, packages: Iterable[str]) -> str:
    """Write what keeps ``packages`` from being found; return the folder, for the front of a PYTHONPATH."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(_SITE.format(blocked=tuple(packages)))
    return str(folder)
