"""What the tests of the datasets share: files to read, and what became of them."""

from __future__ import annotations

import json
import struct
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from covray.cli import app as cli
from covray.errors import PairError
from covray.io.images import Picture, decode, load_picture
from covray.pairs.manifest import Pair


def photo(seed: int, height_px: int = 16, width_px: int = 24) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)


def save(path: Path, pixels: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def bomb(path: Path) -> None:
    """A PNG of a few hundred bytes that says it has 81 million pixels."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 9_000, 9_000, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 10_000)))


def label_of(pair: Pair, root: Path) -> NDArray[np.uint8]:
    """The label's pixels, as the build will see them."""
    return decode(load_picture(pair.label, str(root)))


def reasons(pairs: Iterable[Pair], root: Path) -> dict[str, str]:
    """Why each bad pair is bad, by its image's URI; the build must be unable to use it, too."""
    found = {}
    for pair in pairs:
        if "error" in pair.meta:
            assert pair.label == Picture()
            with pytest.raises(PairError):
                load_picture(pair.label, str(root))
            assert pair.image.uri
            found[pair.image.uri] = pair.meta["error"].partition(": ")[0]
    return found


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """``covray pairs`` with these arguments and ``--json``: what it answers, and what it says on standard error."""

    def command(*arguments: object) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["covray", "pairs", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit, match="0"):
            cli.main()
        out, err = capsys.readouterr()
        return json.loads(out), err

    return command
