"""NYU Depth v2: depth in the layout of BTS and Painter, surface normals in that of DSINE.

Silberman et al., "Indoor Segmentation and Support Inference from RGBD Images", ECCV 2012.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from covray.errors import ConfigError, PairError
from covray.io.images import decode, decode_levels, load_picture
from covray.pairs.manifest import Pair, Picture
from covray.pairs.sources import Entry, labelled, list_below
from covray.tasks import depth

TASKS = ("depth", "normals")
DEPTH_FOLDERS = {"train": "sync", "test": "official_splits/test"}
SPLITS = tuple(DEPTH_FOLDERS)


def nyuv2_pairs(
    root: str | os.PathLike[str], task: str, split: str = "train", count: int | None = None, seed: int = 0
) -> Iterator[Pair]:
    """Pairs of NYU Depth v2 below ``root``, ``count`` of them drawn by ``seed`` and the image's name (all by default).

    - depth: ``sync/<scene>/rgb_00000.jpg`` and ``sync_depth_00000.png`` for train, ``official_splits/test/<scene>/``
      for test; 16 bits of millimetres along the optical axis, 0 where there is none, drawn by ``covray.tasks.depth``;
    - normals: ``<split>/000000_img.png`` and ``000000_normal.png``, rgb = (n + 1) / 2, black where there is none. There
      x points to the left; here as everywhere in covray to the right, so that the red channel v becomes 255 - v.

    A frame of which one half is absent is a pair that cannot be used: see ``covray.pairs.sources.labelled``. Raises
    ConfigError for an unknown task or split, ManifestError where the folder is missing or holds no frames.
    """
    root = os.fspath(root)
    for name, value, known in (("task", task, TASKS), ("split", split, SPLITS)):
        if value not in known:
            raise ConfigError(f"{name}: NYUv2 gives {' and '.join(known)} (got {value})")
    entries = _depths(root, DEPTH_FOLDERS[split]) if task == "depth" else _normals(root, split)
    return labelled(task, split, root, entries, count, seed)


def _depths(root: str, folder: str) -> dict[str, Entry]:
    hint = f"depth is expected as {folder}/<scene>/rgb_00000.jpg and sync_depth_00000.png"
    frames = _frames(list_below(root, folder, hint), r"rgb_(\d+)\.jpg", r"sync_depth_(\d+)\.png")
    return {
        f"{place}rgb_{number}.jpg": Entry(
            functools.partial(_draw_depth, root, f"{place}sync_depth_{number}.png"), {"source": "nyuv2 depth"}
        )
        for place, number in frames
    }


def _frames(uris: list[str], *patterns: str) -> set[tuple[str, str]]:
    """Folder, with its slash, and number of every frame of which one of the files is there."""
    found = [re.fullmatch(f"(.*/){pattern}", uri) for pattern in patterns for uri in uris]
    return {(match[1], match[2]) for match in found if match}


def _draw_depth(root: str, uri: str) -> NDArray[np.uint8]:
    levels_mm = decode_levels(load_picture(Picture(uri=uri), root))
    if levels_mm.dtype != np.uint16:
        raise PairError("unsupported", f"{uri}: 8 bits, where 16 bits of millimetres are expected")
    return depth.render(levels_mm / 1000)


def _normals(root: str, folder: str) -> dict[str, Entry]:
    hint = f"normals are expected as {folder}/000000_img.png and 000000_normal.png"
    frames = _frames(list_below(root, folder, hint), r"(\d+)_img\.png", r"(\d+)_normal\.png")
    return {
        f"{place}{number}_img.png": Entry(
            functools.partial(_draw_normals, root, f"{place}{number}_normal.png"), {"source": "nyuv2 normals"}
        )
        for place, number in frames
    }


def _draw_normals(root: str, uri: str) -> NDArray[np.uint8]:
    picture = decode(load_picture(Picture(uri=uri), root))
    valid = picture.any(axis=2)
    picture[valid, 0] = 255 - picture[valid, 0]
    return picture
