"""Scenes as pairs: an image and its exact label for each of the seven tasks, and the seeds of scenes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from covray.io.images import encode_png
from covray.pairs.manifest import Pair, Picture
from covray.pairs.scenes.geometry import CLASSES
from covray.pairs.scenes.render import View, render_scene
from covray.pairs.scenes.scene_words import scene_words
from covray.pairs.words import CAPTION_TASK
from covray.seeds import hash_number
from covray.tasks import TASKS, colorization, depth, edges, low_light, normals, pose, segmentation

SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}


def scene_seed(seed: int, split: str, index: int) -> int:
    """Return the seed of a scene: a function of (seed, split, index), so that splits share none."""
    return hash_number(f"covray scene\0{seed}\0{split}\0{index}", bits=64)


def labelled(view: View, task: str, generator: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return image and label of ``view`` for ``task``; ``generator`` draws the darkness of low light."""
    size = view.colour.shape[0]
    if task == "segmentation":
        return view.colour, segmentation.render(view.classes)
    if task == "pose":
        return view.colour, pose.render(view.keypoints, size, size)
    if task == "colorization":
        return colorization.grey(view.colour), view.colour
    if task == "normals":
        return view.colour, normals.render(view.normals)
    if task == "edges":
        return view.colour, edges.render(view.edges)
    if task == "depth":
        return view.colour, depth.render(view.depth_m)
    if task == "low_light":
        return low_light.darken(view.colour, generator), view.colour
    raise ValueError(f"no such task: {task}")


def scene_pairs(
    count: int,
    tasks: Iterable[str] = TASKS,
    size_px: int = 64,
    seed: int = 0,
    splits: dict[str, float] | None = None,
    captions: bool = False,
) -> Iterator[Pair]:
    """Yield the pairs of ``count`` scenes, one for every task; those of a scene follow each other.

    Args:
        count: scenes.
        tasks: names of tasks; ``caption`` gives a row with the scene's words and no label picture.
        size_px: side of the pictures.
        seed: of the whole set.
        splits: each split's share, ``SPLITS`` by default; a scene belongs to one split alone.
        captions: give every pair the scene's words.
    """
    tasks = tuple(tasks)
    shares = splits or SPLITS
    # Where the scenes of each split end, rounded to whole scenes; the last one ends at ``count``.
    bounds = np.rint(np.cumsum(list(shares.values())) / sum(shares.values()) * count).astype(int)
    start = 0
    for split, stop in zip(shares, bounds, strict=True):
        for index in range(start, stop):
            # Scene, labels and words each have random numbers of their own: one does not shift the others.
            number = scene_seed(seed, split, index)
            view = render_scene(number, size_px)[0]
            generator = np.random.default_rng([number, 1])
            words = None
            if captions or CAPTION_TASK in tasks:
                words = scene_words(view, np.random.default_rng([number, 2]))
            for task in tasks:
                if task == CAPTION_TASK:
                    meta = {"source": "scenes", "scene": index, "seed": seed}
                    yield Pair(task, split, Picture(bytes=encode_png(view.colour)), Picture(), meta, words)
                    continue
                image, label = labelled(view, task, generator)
                meta = {"source": "scenes", "scene": index, "seed": seed}
                if task == "segmentation":
                    meta["classes"] = ["sky", *CLASSES]
                pictures = Picture(bytes=encode_png(image)), Picture(bytes=encode_png(label))
                yield Pair(task, split, *pictures, meta, words if captions else None)
        start = stop
