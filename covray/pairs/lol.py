"""LOL: scenes photographed in the dark and in good light.

Wei et al., "Deep Retinex Decomposition for Low-Light Enhancement", BMVC 2018.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from covray.errors import ConfigError
from covray.io.images import decode, load_picture
from covray.pairs.manifest import Pair, Picture
from covray.pairs.sources import Entry, labelled, list_below

FOLDERS = {"train": "our485", "test": "eval15"}
SPLITS = tuple(FOLDERS)


def lol_pairs(
    root: str | os.PathLike[str], split: str = "train", count: int | None = None, seed: int = 0
) -> Iterator[Pair]:
    """Low-light pairs of LOL below ``root``: 485 of split train, 15 of test, or ``count`` drawn by ``seed``.

    ``our485/low/N.png`` and ``our485/high/N.png`` are a pair, in ``eval15`` alike. Both stay where they are. A
    photograph without the other is a pair that cannot be used: see ``covray.pairs.sources.labelled``. Raises
    ConfigError for an unknown split, ManifestError where a folder is missing or empty.
    """
    root = os.fspath(root)
    if split not in SPLITS:
        raise ConfigError(f"split: LOL gives {' and '.join(SPLITS)} (got {split})")
    low, high = f"{FOLDERS[split]}/low/", f"{FOLDERS[split]}/high/"
    names = {
        uri.removeprefix(folder)
        for folder in (low, high)
        for uri in list_below(root, folder.rstrip("/"), "give the folder LOLdataset.zip was unpacked in")
    }
    entries = {
        low + name: Entry(functools.partial(_read, root, high + name), {"source": "lol"}, high + name) for name in names
    }
    return labelled("low_light", split, root, entries, count, seed)


def _read(root: str, uri: str) -> NDArray[np.uint8]:
    return decode(load_picture(Picture(uri=uri), root))
