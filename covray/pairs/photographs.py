"""Photographs of folders and glob patterns, all below one root."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence

from covray.errors import ConfigError, ManifestError
from covray.io import storage
from covray.pairs.sources import ENDINGS, list_pictures, path_below
from covray.pairs.values import absolute, reading

_WILDCARDS = re.compile(r"[*?\[]")
_TOKENS = re.compile(r"\*\*/|\*\*|\*|\?|\[[^\]/]+\]|.", re.DOTALL)
"""The parts of a pattern: what stands for several names, a set of characters, and single characters."""


def find_photographs(places: Sequence[str]) -> tuple[str, list[str]]:
    """Return the root of ``places``, and the paths of their photographs below it, sorted.

    Args:
        places: Folders, or patterns such as ``2024/**/*.jpg``, on any storage. A photograph of two places counts once.
            The root of one folder is that folder, as it is given; of several it is ``common_root``.

    Raises:
        ManifestError: A place holds no photographs, or cannot be read.
        ConfigError: The places have no common root, or one is no pattern.
    """
    folders = [_fixed_part(place) for place in places]
    root = _root(folders)
    names: set[str] = set()
    for place, folder in zip(places, folders, strict=True):
        pictures = list_pictures(folder)
        if folder != place:
            # "." stands for a pattern without a folder, of which it is no part: ".*" means hidden names.
            pattern = place if folder == "." and not place.startswith("./") else place.removeprefix(folder).lstrip("/")
            matches = _path_pattern(pattern).fullmatch
            pictures = [name for name in pictures if matches(name)]
        if not pictures:
            raise ManifestError(f"{place}: holds no photographs ({', '.join(ENDINGS)})")
        prefix = path_below(folder, root) if len(folders) > 1 else ""
        names.update(prefix + name for name in pictures)
    return root, sorted(names)


def root_of(places: Sequence[str]) -> str:
    """Return the root that ``find_photographs`` returns; no folder is listed."""
    return _root([_fixed_part(place) for place in places])


def _root(folders: Sequence[str]) -> str:
    """Return a single folder as it is given, of several their common root."""
    if len(folders) == 1:
        return folders[0]
    return common_root(folders)


def common_root(folders: Sequence[str]) -> str:
    """Return the nearest folder that holds all ``folders``.

    Raises:
        ConfigError: There is none: they lie on several storages.
    """
    schemes, paths = set(), []
    for folder in folders:
        scheme, separator, path = absolute(folder).rpartition("://")
        schemes.add(scheme + separator)
        paths.append(path.rstrip("/"))
    # Buckets are the first parts of their paths: two of them have nothing in common.
    common = posixpath.commonpath(paths) if len(schemes) == 1 else ""
    if not common:
        raise ConfigError(f"{', '.join(folders)}: lie on several storages; make a manifest of each")
    return schemes.pop() + common


def _fixed_part(place: str) -> str:
    """Return the folder that a pattern's first wildcard is below; a place without wildcards as it is."""
    first = _WILDCARDS.search(place)
    if first is None:
        return place
    with reading(place):
        if storage.exists(place):  # a folder may have such a name
            return place
    return place[: first.start()].rpartition("/")[0] or ("/" if place.startswith("/") else ".")


def _path_pattern(pattern: str) -> re.Pattern[str]:
    """Return a pattern of paths as a regular expression: ``**`` stands for any folders, ``*`` for no slash.

    Raises:
        ConfigError: It holds a set of characters that is none.
    """
    # Not by fnmatch, whose * crosses folders; glob would look at the disk, and knows no other storage.
    folders = "(?:[^/]+/)*"
    spelled = {"**/": folders, "**": ".*", "*": "[^/]*", "?": "[^/]"}
    expression = ""
    for token in _TOKENS.findall(pattern):
        if token in spelled:
            expression += spelled[token]
        elif len(token) > 2 and token.startswith("["):
            members = token[1:-1].replace("\\", r"\\")
            if members.startswith("!"):  # in patterns of paths it negates a set, as ^ does in regular expressions
                members = "^" + members[1:]
            expression += f"[{members}]"
        else:
            expression += re.escape(token)
    try:
        return re.compile(expression, re.DOTALL)
    except re.error as error:
        raise ConfigError(f"{pattern}: is no pattern ({error.msg}); write a set of characters as [a-z]") from error
