"""The file that says what a pool of actors makes pairs of."""

from __future__ import annotations

from typing import ClassVar

from covray.config import JsonObject
from covray.errors import ManifestError
from covray.io.records import Record


class PairsRecord(Record):
    """``_pairs.json``: what was begun in the folder beside a manifest that is being made."""

    FILE = "_pairs.json"
    FIX = "delete the folder, and run the same command again"
    ERROR: ClassVar[type[ManifestError]] = ManifestError

    settings: JsonObject
    """What decides the pairs beside the items: the source and its options."""
    items: int
    """Photographs, or rows of a list, that pairs are made of."""
    names_sha256: str
    """SHA-256 (hex) over the names of the items in their order."""
