"""Which facts of a portrait a caption states, read by the words that captions of portraits are made of."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from covray.pairs.scenes.portrait_values import (
    ARRANGEMENTS,
    BACKGROUNDS,
    BESIDE,
    COLOURS,
    OBJECTS,
    OTHER_COLOURS,
    STYLES,
    TEXTURES,
)  # fmt: skip

_BESIDE = ("to the left of", "on the right and", "comes first", "from left to right")


@functools.cache
def _phrases() -> dict[str, dict[str, tuple[str, ...]]]:
    """Return the phrases of every value, by theme, as ``_plain`` writes them."""
    phrases: dict[str, dict[str, tuple[str, ...]]] = {
        "object": {name: (name, other) for name, other in OBJECTS.items()},
        "colour": {name: (name, other) for name, other in OTHER_COLOURS.items() if name in COLOURS},
    }
    # The other themes have a class for their two phrases.
    named = {"texture": TEXTURES, "background": BACKGROUNDS, "style": STYLES, "arrangement": ARRANGEMENTS}
    for theme, values in named.items():
        phrases[theme] = {name: (phrase.first, phrase.other) for name, phrase in values.items()}
    phrases["arrangement"][BESIDE] = _BESIDE
    for by_name in phrases.values():
        for name, alternatives in by_name.items():
            by_name[name] = tuple(map(_plain, alternatives))
    return phrases


def stated(caption: str) -> dict[str, set[str]]:
    """Return the values that a caption states, by theme."""
    text = _plain(caption)
    values: dict[str, set[str]] = {}
    for theme, by_name in _phrases().items():
        values[theme] = set()
        for name, phrases in by_name.items():
            # Both have a blank at either end, so that "red" is not found in "covered".
            if any(phrase in text for phrase in phrases):
                values[theme].add(name)
    return values


def _plain(text: str) -> str:
    """Return the words of a text in small letters, a blank before and behind each."""
    return f" {' '.join(re.findall('[a-z-]+', text.lower()))} "


def right_facts(caption: str, attributes: Mapping[str, Any]) -> dict[str, bool]:
    """Return for every visible theme whether a caption states just what the portrait shows.

    Args:
        caption: The caption to judge.
        attributes: Of the portrait, as its manifest has them.
    """
    expected: dict[str, set[str]] = {}
    for theme in ("object", "colour", "texture"):
        expected[theme] = {solid[theme] for solid in attributes["solids"]}
    for theme in ("background", "style", "arrangement"):
        expected[theme] = {attributes[theme]}
    # What cannot be seen is not asked for: themes that are not visible have no entry.
    values = stated(caption)
    right = {}
    for theme, shown in expected.items():
        if theme in attributes["visible"]:
            right[theme] = values[theme] == shown
    return right
