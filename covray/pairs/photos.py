"""Pairs from any folder of photographs, which are their own labels: colorization, edges, low light."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from skimage.feature import canny
from skimage.morphology import dilation, disk

from covray.errors import ConfigError, PairError
from covray.io.images import decode, encode_png, load_picture, resize
from covray.pairs.manifest import Pair, Picture
from covray.pairs.photographs import find_photographs
from covray.pairs.sources import draw
from covray.pairs.work import MOST_ITEMS_PER_BLOCK, PairWork, one_by_one
from covray.seeds import hash_number
from covray.tasks import colorization, edges, low_light

PHOTO_TASKS = ("colorization", "edges", "low_light")
SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}

EDGE_CONTRAST = (0.06, 0.15)
"""Canny's hysteresis: a line starts at a step of the upper contrast (of black to white), and goes on to the lower."""


def photo_pairs(
    folder: str | os.PathLike[str] | Sequence[str],
    tasks: Iterable[str] = PHOTO_TASKS,
    size_px: int = 512,
    splits: Mapping[str, float] | None = None,
    seed: int = 0,
    count: int | None = None,
) -> PairWork:
    """Return a pair for every photograph below ``folder`` (on any storage) and every task, in the order of the paths.

    The pairs of a photograph follow each other, so that a build inverts it once. Pictures are PNG bytes; both ends have
    the same size.

    - colorization: image = the grey photograph, label = the photograph;
    - edges: image = the photograph, label = its edge map (``edge_map``);
    - low_light: image = the photograph taken in the dark (``covray.tasks.low_light``), label = the photograph. How
      dark and how noisy depends on ``seed`` and the photograph, and is kept in ``meta``.

    A photograph that cannot be used gives its pairs too, with its path as the image's URI, no label, and the reason as
    ``meta["error"]``: the build, given ``folder`` as the manifest's root, records it as rejected.

    Args:
        folder: hidden files and folders are left out, links to folders not followed. Several places, folders or glob
            patterns, are below one root: see ``covray.pairs.photographs``.
        tasks: of ``PHOTO_TASKS``.
        size_px: photographs are shrunk so that the shorter side is at most this, and never enlarged.
        splits: each split's share, by default ``SPLITS``. A photograph, known by the SHA-256 of its file, belongs to
            one split whatever its name, order or neighbours.
        seed: of the sample and of the dark.
        count: only so many photographs are used, sampled by ``seed`` and their paths.

    Raises:
        ConfigError: unknown tasks and impossible values.
        ManifestError: the folder holds no photographs.
    """
    places = [os.fspath(folder)] if isinstance(folder, str | os.PathLike) else list(folder)
    # A task that is named twice gives its pairs once.
    tasks = tuple(dict.fromkeys(tasks))
    shares = dict(SPLITS if splits is None else splits)
    unknown = ", ".join(sorted(set(tasks) - set(PHOTO_TASKS)))
    if unknown or not tasks:
        problem = f"cannot label {unknown}" if unknown else "none asked for"
        raise ConfigError(f"tasks: {problem}; photographs give {', '.join(PHOTO_TASKS)}")
    if size_px < 2:
        raise ConfigError(f"size_px: must be at least 2 (got {size_px})")
    if not all(0 <= share < math.inf for share in shares.values()) or not sum(shares.values()) > 0:
        raise ConfigError(f"splits: shares must be at least 0, and not all 0 (got {shares})")
    root, names = find_photographs(places)
    # What decides the pairs.
    recipe = _Recipe(root, tasks, size_px, shares, seed)
    settings = {"source": "photos", **asdict(recipe), "tasks": list(tasks)}
    items = [(name, None) for name in draw(names, count, seed)]
    # Blocks hold about as many pixels, whatever size is asked for.
    most_items = max(1, min(MOST_ITEMS_PER_BLOCK, _PIXELS_PER_BLOCK // size_px**2))
    load = functools.partial(one_by_one, functools.partial(_pairs_of_photo, recipe))
    return PairWork(items, load, settings, unit="photographs", items_per_block=most_items)


def edge_map(photo: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return the edges of a photograph [h, w, 3] as bool [h, w]: Canny's, widened.

    Smoothing (sigma 4 px at a shorter side of 512) and line width (9 px there) grow with the picture, so that what
    is drawn is the same at every size, and a line is still a pixel wide when the picture is shrunk to 64 px.
    """
    short_px = min(photo.shape[:2])
    sigma_px = max(1.0, short_px / 128)
    # A step of contrast c, smoothed by sigma, has the slope c / (sigma sqrt(2 pi)); the Sobel sums weigh a slope by 8.
    low, high = (8 * contrast / (sigma_px * math.sqrt(2 * math.pi)) for contrast in EDGE_CONTRAST)
    lines = canny(colorization.grey(photo)[..., 0] / 255.0, sigma_px, low, high)
    radius_px = round(short_px / 128)
    if radius_px:
        lines = dilation(lines, disk(radius_px, decomposition="sequence"))
    return np.asarray(lines, dtype=bool)


_PIXELS_PER_BLOCK = 32 * 2**20
"""Of the square photographs that an actor makes pairs of at a time: six pictures of each are in memory together."""


@dataclass(frozen=True)
class _Recipe:
    """How photographs become pairs."""

    root: str
    tasks: tuple[str, ...]
    size_px: int
    shares: dict[str, float]
    seed: int


def _pairs_of_photo(recipe: _Recipe, name: str, _: None) -> list[Pair]:
    """Return the pairs of the photograph ``name``, one for each task."""
    meta = {"source": "photos", "photo": name}
    identity = f"uri:{name}"
    try:
        data = load_picture(Picture(uri=name), recipe.root)
        # By its bytes: a copy under another name belongs to the same split.
        identity = hashlib.sha256(data).hexdigest()
        photo = shrunk(decode(data), recipe.size_px)
    except PairError as error:
        split, meta = split_of(identity, recipe.shares), meta | {"error": str(error)}
        return [Pair(task, split, Picture(uri=name), Picture(), meta) for task in recipe.tasks]
    split = split_of(identity, recipe.shares)
    stored = Picture(bytes=encode_png(photo))
    pairs = []
    for task in recipe.tasks:
        if task == "colorization":
            pairs.append(Pair(task, split, Picture(bytes=encode_png(colorization.grey(photo))), stored, meta))
        elif task == "edges":
            pairs.append(Pair(task, split, stored, Picture(bytes=encode_png(edges.render(edge_map(photo)))), meta))
        else:
            generator = np.random.default_rng(hash_number(f"low_light {recipe.seed} {identity}"))
            exposure = low_light.Exposure.sample(generator)
            dark = Picture(bytes=encode_png(low_light.darken(photo, generator, exposure)))
            pairs.append(Pair(task, split, dark, stored, meta | {"seed": recipe.seed, **vars(exposure)}))
    return pairs


def shrunk(photo: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """Return ``photo`` [h, w, 3] with a shorter side of at most ``size_px``."""
    height_px, width_px = photo.shape[:2]
    scale = min(1.0, size_px / min(height_px, width_px))
    return resize(photo, round(height_px * scale), round(width_px * scale))


def split_of(identity: str, shares: dict[str, float]) -> str:
    """Return the split that a photograph belongs to, by its own hash alone."""
    # A place between 0 and the sum of the shares, of which each split takes the next part.
    place = hash_number(f"split {identity}") / 2**256 * sum(shares.values())
    used = {split: share for split, share in shares.items() if share > 0}
    for split, share in used.items():
        place -= share
        if place < 0:
            return split
    return split  # rounding of the shares left nothing
