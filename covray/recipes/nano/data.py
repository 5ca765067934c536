"""What the nano family is trained on: rendered scenes with all seven tasks' labels, and crops of photographs."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import track
from torch import Tensor

from covray.io.images import square
from covray.pairs.scenes import labelled, render_scene, scene_seed
from covray.tasks import TASKS, colorization, low_light

SIZE_PX = 64
KINDS = ("colour", "grey", "dark", "segmentation", "pose", "normals", "edges", "depth")
"""The eight pictures of a scene, in the order of ``scene_pictures``; a photograph has the first three."""
CROPS = 3000
"""Crops of photographs to train on, three pictures each."""
VIEWS = 4
PHOTOGRAPHS = (
    "skimage/astronaut.png", "skimage/coffee.png", "skimage/hubble_deep_field.jpg", "skimage/retina.jpg",
    "skimage/ihc.png", "skimage/camera.png", "skimage/coins.png", "skimage/moon.png", "skimage/clock_motion.png",
    "skimage/brick.png", "skimage/grass.png", "skimage/gravel.png", "skimage/motorcycle_left.png",
    "sklearn/china.jpg", "sklearn/flower.jpg",
)  # fmt: skip
HELD_OUT_PHOTOGRAPHS = ("skimage/chelsea.png", "skimage/rocket.jpg", "skimage/cell.png", "skimage/horse.png")
_FOLDERS = {"skimage": ("skimage", "data"), "sklearn": ("sklearn", "datasets/images")}


def photograph_path(name: str) -> Path:
    """Where the photograph ``name`` (``package/file``) was installed with scikit-image or scikit-learn."""
    package, file = name.split("/")
    module, folder = _FOLDERS[package]
    return Path(str(files(module))) / folder / file


def scene_pictures(split: str, scenes: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Eight pictures of every scene, uint8 [8, 64, 64, 3]: colour, grey, dark, and the five drawn labels."""
    for index in range(scenes):
        number = scene_seed(seed, split, index)
        view = render_scene(number, SIZE_PX)[0]
        generator = np.random.default_rng([number, 1])
        sources = [labelled(view, task, generator)[0] for task in ("colorization", "low_light")]
        labels = [labelled(view, task, generator)[1] for task in TASKS if task not in ("colorization", "low_light")]
        yield np.stack([view.colour, *sources, *labels])


def photo_pictures(crops: int, seed: int) -> Iterator[NDArray[np.uint8]]:
    """Three pictures of every random crop of a photograph, uint8 [3, 64, 64, 3]: colour, grey, dark."""
    rng = np.random.default_rng([seed, 2])
    photographs = [np.array(Image.open(photograph_path(name)).convert("RGB")) for name in PHOTOGRAPHS]
    for index in range(crops):
        photograph = photographs[index % len(photographs)]
        side = int(rng.integers(96, min(photograph.shape[:2]) + 1))
        top, left = (int(rng.integers(0, length - side + 1)) for length in photograph.shape[:2])
        crop = square(photograph[top : top + side, left : left + side], SIZE_PX, "stretch", "bicubic")
        crop = crop[:, ::-1] if rng.random() < 0.5 else crop
        yield np.stack([crop, colorization.grey(crop), low_light.darken(crop, rng)])


@dataclass(frozen=True)
class Pictures:
    """The training pictures: eight of every scene, three of every crop of a photograph.

    ``kinds`` may stand in files that are mapped into memory: only what a batch takes is read.
    """

    scenes: Sequence[NDArray[np.uint8]]
    """Blocks of scenes, each [n, 8 kinds, 64, 64, 3]."""
    crops: NDArray[np.uint8]
    """[n, 3 kinds, 64, 64, 3]: colour, grey, dark."""

    def batch(self, size: int, generator: torch.Generator, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return random pictures and the labels of those that are inputs of a scene's tasks.

        Args:
            size: Pictures in the batch: 3 in 8 are inputs of scenes (colour as often as grey and dark together), 4 in 8
                labels of scenes, the rest crops of photographs of any kind.
            generator: Source of all randomness.
            device: Where the tensors are wanted.

        Returns:
            Pictures in [0, 1], float [size, 3, h, w], inputs of scenes first; and the pictures of ``LABELS_OF`` for
            each of those inputs, float [inputs, 6, 3, h, w].
        """
        inputs, labels = 3 * size // 8, size // 2
        pictures, read = [], []
        for number in range(size):
            if number < inputs:
                scene = self._scene(generator)
                kind = (0, 0, 1, 2)[_draw(4, generator)]
                pictures.append(scene[kind])
                read.append(scene[list(LABEL_KINDS)])
            elif number < inputs + labels:
                pictures.append(self._scene(generator)[3 + _draw(5, generator)])
            else:
                pictures.append(self.crops[_draw(len(self.crops), generator), _draw(3, generator)])
        return _floats(np.stack(pictures), device), _floats(np.stack(read), device)

    def _scene(self, generator: torch.Generator) -> NDArray[np.uint8]:
        block = self.scenes[_draw(len(self.scenes), generator)]  # blocks are of one size
        return block[_draw(len(block), generator)]


LABEL_KINDS = (0, 3, 4, 5, 6, 7)
"""Of ``KINDS``: colour and the five drawn labels."""


def _draw(population: int, generator: torch.Generator) -> int:
    return int(torch.randint(population, (), generator=generator))


def _floats(pictures: NDArray[np.uint8], device: torch.device) -> Tensor:
    """uint8 [..., h, w, 3] -> float [..., 3, h, w] in [0, 1]; batches of pictures are channels last."""
    moved = torch.from_numpy(pictures).to(device).movedim(-1, -3).float().div_(255)
    return moved


def pictures(folder: Path, split: str, scenes: int, crops: int, seed: int) -> NDArray[np.uint8]:
    """All training (or held-out) pictures, uint8 [n, 64, 64, 3], made once and kept in ``folder``."""
    blocks = itertools.chain(scene_pictures(split, scenes, seed), photo_pictures(crops, seed))
    return _kept(folder / f"{split}-{scenes}-{crops}-{seed}.npy", blocks, scenes + crops)


def views(folder: Path, scenes: int, seed: int) -> NDArray[np.uint8]:
    """Pictures of ``scenes`` training scenes from VIEWS places each, uint8 [scenes * VIEWS, 64, 64, 3]."""
    blocks = (
        np.stack([view.colour for view in render_scene(scene_seed(seed, "train", index), SIZE_PX, VIEWS)])
        for index in range(scenes)
    )
    return _kept(folder / f"views-{scenes}-{seed}.npy", blocks, scenes)


def _kept(path: Path, blocks: Iterable[NDArray[np.uint8]], total: int) -> NDArray[np.uint8]:
    """The ``blocks`` one after another, from the file ``path``, which is made where it is not there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = list(track(blocks, f"rendering {path.stem}", total=total, disable=not sys.stderr.isatty()))
        aside = path.with_suffix(".part.npy")
        np.save(aside, np.concatenate(made))
        aside.rename(path)
    return np.asarray(np.load(path, mmap_mode="c"))  # torch warns of arrays it could not write to
