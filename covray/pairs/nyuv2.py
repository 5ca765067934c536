"""NYU Depth v2: depth in the layout of BTS and Painter, surface normals in that of DSINE.

Silberman et al., "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012.
"""

from __future__ import annotations

import functools
import os
import re

import numpy as np
from numpy.typing import NDArray

from covray.errors import ConfigError, PairError
from covray.io.images import load_picture
from covray.pairs.label_files import read_label_file, read_levels
from covray.pairs.manifest import Picture
from covray.pairs.sources import Entry, labelled, list_below
from covray.pairs.work import PairWork
from covray.tasks import depth

TASKS = ("depth", "normals")
DEPTH_FOLDERS = {"train": "sync", "test": "official_splits/test"}
SPLITS = tuple(DEPTH_FOLDERS)

NO_DEPTH_MM = (0, 1, 65535)
"""Levels without depth: 0, 1 (invalid values that were stored a level off; the literature counts depth above 1 mm),
and the largest of 16 bits, which is no distance that the camera measures (10 m at most)."""

LENGTH_RANGE = (0.5, 1.5)
"""Length of a stored normal. Others are no directions: a zero vector stored as grey 127 or 128, black that is a level
off. Rounding to 8 bits changes the length of a unit vector by less than 0.01."""


def nyuv2_pairs(
    root: str | os.PathLike[str], task: str, split: str = "train", count: int | None = None, seed: int = 0
) -> PairWork:
    """Return pairs of NYU Depth v2. Labels lie over the pixels of their images as stored.

    - depth: ``sync/<scene>/rgb_00000.jpg`` and ``sync_depth_00000.png`` for train, ``official_splits/test/<scene>/``
      for test; 16 bits of millimetres along the optical axis, without depth at the levels ``NO_DEPTH_MM``, drawn by
      ``covray.tasks.depth``;
    - normals: ``<split>/000000_img.png`` and ``000000_normal.png``, rgb = (n + 1) / 2, black where there is none. There
      x points to the left; here as everywhere in covray to the right, so that the red channel v becomes 255 - v.

    A frame of which one half is absent is a pair that cannot be used: see ``covray.pairs.sources.labelled``.

    Args:
        root: Folder of the dataset, on any storage.
        task: ``depth`` or ``normals``.
        split: ``train`` or ``test``.
        count: How many pairs to sample, by ``seed`` and the image's name; None for all.
        seed: Seed of the sample.

    Raises:
        ConfigError: An unknown task or split.
        ManifestError: The folder is missing or holds no frames.
    """
    root = os.fspath(root)
    for name, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            raise ConfigError(f"{name}: NYUv2 gives {' and '.join(known)} (got {value})")
    entries = _depths(root, DEPTH_FOLDERS[split]) if task == "depth" else _normals(root, split)
    return labelled(task, split, root, entries, count, seed)


depth_pairs = functools.partial(nyuv2_pairs, task="depth")
"""The pairs of depth, as a source of ``covray.pairs``."""
normals_pairs = functools.partial(nyuv2_pairs, task="normals")
"""The pairs of normals, as a source of ``covray.pairs``."""


def draw_depth(levels_mm: NDArray[np.unsignedinteger]) -> NDArray[np.uint8]:
    """Return NYUv2's depth [h, w], 16 bits of millimetres, drawn as a label [h, w, 3].

    Raises:
        PairError: ``unsupported`` for 8 bits.
    """
    if levels_mm.dtype != np.uint16:
        raise PairError("unsupported", "8 bits, where 16 bits of millimetres are expected")
    return depth.render(np.where(np.isin(levels_mm, NO_DEPTH_MM), 0, levels_mm) / 1000)


def only_directions(picture: NDArray[np.unsignedinteger]) -> NDArray[np.uint8]:
    """Return a picture of normals [h, w, 3], rgb = (n + 1) / 2, black where the stored vector is no direction."""
    length = np.linalg.norm(picture / 255 * 2 - 1, axis=2)
    valid = (length > LENGTH_RANGE[0]) & (length < LENGTH_RANGE[1])
    return np.where(valid[..., None], picture, 0).astype(np.uint8)


def _depths(root: str, folder: str) -> dict[str, Entry]:
    hint = f"depth is expected as {folder}/<scene>/rgb_00000.jpg and sync_depth_00000.png"
    entries = {}
    for place, number in _frames(list_below(root, folder, hint), r"rgb_(\d+)\.jpg", r"sync_depth_(\d+)\.png"):
        label = functools.partial(_read_depth, root, f"{place}sync_depth_{number}.png")
        entries[f"{place}rgb_{number}.jpg"] = Entry(label, {"source": "nyuv2 depth"})
    return entries


def _frames(uris: list[str], *patterns: str) -> set[tuple[str, str]]:
    """Return folder, with its slash, and number of every frame of which one of the files is there."""
    frames = set()
    for uri in uris:
        for pattern in patterns:
            match = re.fullmatch(f"(.*/){pattern}", uri)
            if match:
                frames.add((match[1], match[2]))
    return frames


def _read_depth(root: str, uri: str) -> NDArray[np.uint8]:
    try:
        return draw_depth(read_levels(load_picture(Picture(uri=uri), root)))
    except PairError as error:
        raise PairError(error.reason, f"{uri}: {str(error).partition(': ')[2]}") from error


def _normals(root: str, folder: str) -> dict[str, Entry]:
    """Return the labels of all frames by the picture's path; one half of a frame may be absent."""
    hint = f"normals are expected as {folder}/000000_img.png and 000000_normal.png"
    entries = {}
    for place, number in _frames(list_below(root, folder, hint), r"(\d+)_img\.png", r"(\d+)_normal\.png"):
        label = functools.partial(_read_normals, root, f"{place}{number}_normal.png")
        # A picture that EXIF turns would need other directions, not turned ones.
        entries[f"{place}{number}_img.png"] = Entry(label, {"source": "nyuv2 normals"}, orientation="fixed")
    return entries


def _read_normals(root: str, uri: str) -> NDArray[np.uint8]:
    picture = read_label_file(load_picture(Picture(uri=uri), root)).samples
    if picture.ndim != 3:
        raise PairError("unsupported", f"{uri}: one channel, where three of a direction are expected")
    if picture.dtype != np.uint8:
        raise PairError("unsupported", f"{uri}: 16 bits a channel, where 8 bits of a direction are expected")
    drawn = only_directions(picture)
    # DSINE's x points to the left: the red channel is mirrored, but black stays "no direction".
    valid = drawn.any(axis=2)
    drawn[valid, 0] = 255 - drawn[valid, 0]
    return drawn
