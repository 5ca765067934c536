"""LOL: scenes photographed in the dark and in good light.

Wei et al., "Deep Retinex Decomposition for Low-Light Enhancement", BMVC 2018.
"""

from __future__ import annotations

import functools
import os

import numpy as np
from numpy.typing import NDArray

from covray.errors import ConfigError
from covray.io.images import decode, load_picture
from covray.pairs.manifest import Picture
from covray.pairs.sources import Entry, labelled, list_below
from covray.pairs.work import PairWork

FOLDERS = {"train": "our485", "test": "eval15"}
SPLITS = tuple(FOLDERS)


def lol_pairs(root: str | os.PathLike[str], split: str = "train", count: int | None = None, seed: int = 0) -> PairWork:
    """Return low-light pairs of LOL: 485 of split train, 15 of test.

    ``our485/low/N.png`` and ``our485/high/N.png`` are a pair, and likewise in ``eval15``. Both are photographs, each
    displayed as its own EXIF says, and stay where they are. A photograph without the other is a pair that cannot be
    used: see ``covray.pairs.sources.labelled``.

    Args:
        root: Folder of the dataset, on any storage.
        split: ``train`` or ``test``.
        count: How many pairs to sample, by ``seed`` and the image's name; None for all.
        seed: Seed of the sample.

    Raises:
        ConfigError: An unknown split.
        ManifestError: A folder is missing or empty.
    """
    root = os.fspath(root)
    if split not in SPLITS:
        raise ConfigError(f"split: LOL gives {' and '.join(SPLITS)} (got {split})")
    low, high = f"{FOLDERS[split]}/low/", f"{FOLDERS[split]}/high/"
    names: set[str] = set()
    for folder in (low, high):
        uris = list_below(root, folder.rstrip("/"), "give the folder LOLdataset.zip was unpacked in")
        # Names of both folders: a photograph without its other half is reported, not passed over.
        names.update(uri.removeprefix(folder) for uri in uris)
    entries = {}
    for name in names:
        label = functools.partial(_read, root, high + name)
        entries[low + name] = Entry(label, {"source": "lol"}, high + name, orientation="upright")
    return labelled("low_light", split, root, entries, count, seed)


def _read(root: str, uri: str) -> NDArray[np.uint8]:
    return decode(load_picture(Picture(uri=uri), root))
