"""What the nano family is trained on: rendered scenes with all seven tasks' labels, and crops of photographs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from covray.io.images import square
from covray.pairs.scenes import labelled, render_scene, scene_seed
from covray.progress import counted
from covray.tasks import TASKS, colorization, low_light

SIZE_PX = 64
KINDS = ("colour", "grey", "dark", "segmentation", "pose", "normals", "edges", "depth")
"""The eight pictures of a scene, in the order of ``scene_pictures``; a photograph has the first three."""
CROPS = 3000
"""Crops of photographs to train on, three pictures each."""
VIEWS = 4
PART_SCENES = 500
"""Scenes that are rendered into one file. A kill costs at most the scenes of one file: 20 s of one core."""
PHOTOGRAPHS = (
    "skimage/astronaut.png", "skimage/coffee.png", "skimage/hubble_deep_field.jpg", "skimage/retina.jpg",
    "skimage/ihc.png", "skimage/camera.png", "skimage/coins.png", "skimage/moon.png", "skimage/clock_motion.png",
    "skimage/brick.png", "skimage/grass.png", "skimage/gravel.png", "skimage/motorcycle_left.png",
    "sklearn/china.jpg", "sklearn/flower.jpg",
)  # fmt: skip
HELD_OUT_PHOTOGRAPHS = ("skimage/chelsea.png", "skimage/rocket.jpg", "skimage/cell.png", "skimage/horse.png")
_FOLDERS = {"skimage": ("skimage", "data"), "sklearn": ("sklearn", "datasets/images")}


def photograph_path(name: str) -> Path:
    """Return where the photograph ``name`` (``package/file``) was installed with scikit-image or scikit-learn."""
    package, file = name.split("/")
    module, folder = _FOLDERS[package]
    return Path(str(files(module))) / folder / file


def scene_pictures(split: str, scenes: Iterable[int], seed: int) -> Iterator[NDArray[np.uint8]]:
    """Yield eight pictures of each of the ``scenes``, uint8 [8, 64, 64, 3]: colour, grey, dark and five labels."""
    for index in scenes:
        number = scene_seed(seed, split, index)
        view = render_scene(number, SIZE_PX)[0]
        # A generator of its own, so that the pictures of a scene do not depend on those before it.
        generator = np.random.default_rng([number, 1])
        sources = [labelled(view, task, generator)[0] for task in ("colorization", "low_light")]
        labels = [labelled(view, task, generator)[1] for task in TASKS if task not in ("colorization", "low_light")]
        yield np.stack([view.colour, *sources, *labels])


def photo_pictures(crops: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Yield three pictures of every random crop of a photograph, uint8 [3, 64, 64, 3]: colour, grey, dark."""
    rng = np.random.default_rng([seed, 2])
    photographs = [np.array(Image.open(photograph_path(name)).convert("RGB")) for name in PHOTOGRAPHS]
    for index in range(crops):
        photograph = photographs[index % len(photographs)]
        # Larger than a picture: crops are made smaller, never larger.
        side = int(rng.integers(96, min(photograph.shape[:2]) + 1))
        top, left = (int(rng.integers(0, length - side + 1)) for length in photograph.shape[:2])
        crop = square(photograph[top : top + side, left : left + side], SIZE_PX, "stretch", "bicubic")
        crop = crop[:, ::-1] if rng.random() < 0.5 else crop
        yield np.stack([crop, colorization.grey(crop), low_light.darken(crop, rng)])


@dataclass(frozen=True)
class Pictures:
    """The training pictures by scene and by crop; views of the array of ``pictures``."""

    scenes: NDArray[np.uint8]
    """[scenes, 8 kinds, 64, 64, 3], in the order of ``KINDS``."""
    crops: NDArray[np.uint8]
    """[crops, 3 kinds, 64, 64, 3]: colour, grey, dark."""

    @classmethod
    def of(cls, flat: NDArray[np.uint8], crops: int) -> Pictures:
        """Return the views of ``flat``, uint8 [scenes * 8 + crops * 3, h, w, 3]."""
        scenes, photographs = flat[: len(flat) - 3 * crops], flat[len(flat) - 3 * crops :]
        size = flat.shape[1:]
        return cls(scenes.reshape(-1, len(KINDS), *size), photographs.reshape(-1, 3, *size))

    def batch(self, size: int, generator: torch.Generator, device: torch.device) -> Tensor:
        """Return random pictures in [0, 1], float [size, 3, h, w].

        Args:
            size: Pictures in the batch. Three in eight are inputs of scenes (colour as often as grey and dark
                together), four in eight are labels of scenes, the rest are crops of photographs of any kind.
            generator: Source of all randomness.
            device: Where the tensor is wanted.
        """
        inputs, labels = 3 * size // 8, size // 2
        chosen = []
        for number in range(size):
            if number < inputs:
                scene = self.scenes[_draw(len(self.scenes), generator)]
                chosen.append(scene[INPUT_KINDS[_draw(len(INPUT_KINDS), generator)]])
            elif number < inputs + labels or not len(self.crops):
                scene = self.scenes[_draw(len(self.scenes), generator)]
                chosen.append(scene[3 + _draw(len(KINDS) - 3, generator)])
            else:
                chosen.append(self.crops[_draw(len(self.crops), generator), _draw(3, generator)])
        # Strides of channels last.
        return torch.from_numpy(np.stack(chosen)).to(device).movedim(-1, -3).float().div_(255)


INPUT_KINDS = (0, 0, 1, 2)
"""Of ``KINDS``, what a task's input is drawn from: colour twice, grey, dark."""


def _draw(population: int, generator: torch.Generator) -> int:
    return int(torch.randint(population, (), generator=generator))


def pictures(folder: Path, split: str, scenes: int, crops: int, seed: int) -> NDArray[np.uint8]:
    """Return all pictures of a split, uint8 [scenes * 8 + crops * 3, 64, 64, 3], mapped from a file in ``folder``.

    They are rendered once. A rendering that was stopped resumes after its last complete part.

    Args:
        folder: Where the file and its parts are kept.
        split: Split of the scenes: train, val or test.
        scenes: Rendered scenes, eight pictures each.
        crops: Crops of photographs, three pictures each.
        seed: Seed of scenes and crops.
    """
    path = folder / f"{split}-{scenes}-{crops}-{seed}.npy"
    # Parts are written to their own files, so that a killed rendering loses only the part under way.
    if not path.exists():
        parts = []
        for first in range(0, scenes, PART_SCENES):
            last = min(first + PART_SCENES, scenes)
            part = folder / f"{split}-{seed}-scenes-{first:06d}-{last:06d}.npy"
            parts.append(kept(part, scene_pictures(split, range(first, last), seed), last - first))
        if crops:
            parts.append(kept(folder / f"crops-{crops}-{seed}.npy", photo_pictures(crops, seed), crops))
        # Another training in the folder may have joined them, and deleted some, in the meantime.
        if not path.exists():
            _join(path, parts)
        for part in parts:
            part.unlink(missing_ok=True)
    return _mapped(path)


def views(folder: Path, scenes: int, seed: int) -> NDArray[np.uint8]:
    """Return pictures of ``scenes`` training scenes from VIEWS places each, uint8 [scenes * VIEWS, 64, 64, 3]."""
    blocks = (_views_of(scene_seed(seed, "train", index)) for index in range(scenes))
    return _mapped(kept(folder / f"views-{scenes}-{seed}.npy", blocks, scenes))


def _views_of(scene: int) -> NDArray[np.uint8]:
    """Return the colour pictures of the scene of a seed, uint8 [VIEWS, 64, 64, 3]."""
    return np.stack([view.colour for view in render_scene(scene, SIZE_PX, VIEWS)])


def kept(path: Path, blocks: Iterable[NDArray[Any]], total: int) -> Path:
    """Write ``blocks``, joined along their first axis, to the file ``path`` unless it exists, and return ``path``.

    Args:
        path: A file of NumPy, ``.npy``.
        blocks: The arrays; an iterator is not asked for any if the file exists.
        total: Number of blocks.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rendered = list(counted(blocks, f"blocks of {path.stem}", total))
        with whole_file(path) as aside:
            np.save(aside, np.concatenate(rendered))
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a file beside ``path`` that is renamed to ``path`` at the end, and deleted after an exception.

    Its name has the number of this process: two trainings in one folder may make the same file at the same time.
    """
    aside = path.with_suffix(f".{os.getpid()}.part{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _join(path: Path, parts: Sequence[Path]) -> None:
    """Write the arrays of ``parts`` as one to ``path``, a part at a time in memory."""
    arrays = [np.load(part, mmap_mode="r") for part in parts]
    rows = sum(len(array) for array in arrays)
    with whole_file(path) as aside:
        joined = np.lib.format.open_memmap(aside, "w+", np.uint8, (rows, *arrays[0].shape[1:]))
        first = 0
        for array in arrays:
            joined[first : first + len(array)] = array
            first += len(array)
        joined.flush()


def _mapped(path: Path) -> NDArray[np.uint8]:
    # Copy on write: torch warns of arrays that it could not write to.
    return np.asarray(np.load(path, mmap_mode="c"))
