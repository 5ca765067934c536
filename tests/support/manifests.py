"""Manifests written from pairs, and refusals of manifests and lists."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from covray.errors import ManifestError
from covray.pairs.manifest import ManifestWriter, Pair


def write(path: Path | str, pairs: Iterable[Pair], root: str | None = None) -> ManifestWriter:
    with ManifestWriter(path, root) as writer:
        for each in pairs:
            writer.add(each)
    return writer


def refused(action: Any, *arguments: Any, **options: Any) -> str:
    def whole() -> None:
        result = action(*arguments, **options)
        if isinstance(result, Iterator):
            list(result)

    with pytest.raises(ManifestError) as caught:
        whole()
    text = str(caught.value)
    assert "\n" not in text
    return text
