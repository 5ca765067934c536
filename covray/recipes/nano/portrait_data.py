"""What the nano models of ThinkDiff are trained on: rendered portraits, their latents, and newly worded captions.

The nano vision-language model is trained on the same manifest, which is rendered once. No picture of its splits
``train`` and ``val`` shows a held-out cell; every picture of ``test`` does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor

from covray.io.images import decode, load_picture, picture_of
from covray.io.model_folders import NANO_FOLDER, fingerprint_folder
from covray.pairs.manifest import ManifestWriter
from covray.pairs.scenes.portrait_words import portrait_words
from covray.pairs.scenes.portraits import (
    HELD_OUT_SPLIT,
    SPLITS,
    Portrait,
    Solid,
    portrait_pairs,
    sample_portrait,
)
from covray.pairs.words import read_captioned
from covray.progress import counted
from covray.recipes.nano.autoencoders import batches
from covray.recipes.nano.data import kept
from covray.seeds import seed_of

SIZE_PX = 64
_FINGERPRINT_DIGITS = 12
"""Digits of the VAE's fingerprint in the names of files."""


@dataclass(frozen=True)
class Portraits:
    """The portraits of a split."""

    pictures: NDArray[np.uint8]
    """[n, 64, 64, 3]."""
    contents: list[Portrait]
    """What each shows."""


def portrait_manifest(out: Path, count: int, seed: int, *, only_held_out: bool = False) -> Path:
    """Return the manifest of portraits, which is written to ``out``/data unless it exists.

    Args:
        out: Folder of the family.
        count: Portraits.
        seed: Of the portraits.
        only_held_out: Whether all are of the split whose pictures show a held-out cell.
    """
    name, splits = f"portraits-{count}-{seed}", SPLITS
    if only_held_out:
        name, splits = f"{name}-held-out", {HELD_OUT_SPLIT: 1.0}
    path = out / "data" / f"{name}.parquet"
    if not path.exists():
        with ManifestWriter(path, captions=True) as writer:
            for pair in counted(portrait_pairs(count, SIZE_PX, seed, splits), "portraits rendered", count):
                writer.add(pair)
    return path


def read_portraits(manifest: Path) -> dict[str, Portraits]:
    """Return the portraits of a manifest by split."""
    pictures: dict[str, list[NDArray[np.uint8]]] = {}
    contents: dict[str, list[Portrait]] = {}
    for row, words in read_captioned(manifest):
        split = str(row["split"])
        pictures.setdefault(split, []).append(decode(load_picture(picture_of(row["image"]), None)))
        contents.setdefault(split, []).append(portrait_of(words.attributes))
    return {split: Portraits(np.stack(own), contents[split]) for split, own in pictures.items()}


def portrait_of(attributes: dict[str, Any]) -> Portrait:
    """Return the portrait that a manifest's ``attributes`` describe."""
    solids = [Solid(solid["object"], solid["colour"], solid["texture"]) for solid in attributes["solids"]]
    return Portrait(tuple(solids), attributes["background"], attributes["style"], attributes["arrangement"])


def numbers_of(generator: torch.Generator) -> np.random.Generator:
    """Return a NumPy generator whose numbers follow from ``generator``."""
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def describe(contents: list[Portrait], numbers: np.random.Generator) -> list[str]:
    """Return a caption for each portrait, worded by ``numbers``."""
    return [portrait_words(portrait, numbers).caption for portrait in contents]


def unseen_captions(count: int, seed: int) -> list[str]:
    """Return captions of portraits with held-out cells, which no training reads."""
    captions = []
    for number in range(count):
        numbers = np.random.default_rng(seed_of("nano captions", seed, number))
        captions.append(portrait_words(sample_portrait(numbers, unseen=True), numbers).caption)
    return captions


class PortraitVae:
    """The VAE of the family in ``out``, or else the shipped one, with the latents and pictures it makes of portraits.

    Latents and pictures are computed once and kept in ``out``/data, under the fingerprint of the VAE.
    """

    def __init__(self, out: Path, device: torch.device):
        """Load the VAE."""
        own = out / "vae"
        folder = own if own.is_dir() else NANO_FOLDER / "prior" / "vae"
        vae: Any = AutoencoderKL.from_pretrained(folder, use_safetensors=True)
        vae.register_to_config(_name_or_path="")  # a saved copy would name a folder of this machine
        self.model = vae.float().to(device)
        self._data, self._device = out / "data", device
        self._fingerprint = fingerprint_folder(folder, ("config.json", "*.safetensors"))[:_FINGERPRINT_DIGITS]

    def latents(self, name: str, pictures: NDArray[np.uint8]) -> Tensor:
        """Return the scaled means of the posterior, fp16 [n, 4, 16, 16], of uint8 pictures [n, 64, 64, 3].

        Args:
            name: Name of the pictures, with which the name of the file begins.
            pictures: The pictures.
        """

        def encoded() -> Iterator[NDArray[Any]]:
            for batch in batches(torch.from_numpy(pictures), self._device):
                with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16):
                    mean = self.model.encode(batch * 2 - 1).latent_dist.mean.float()
                yield (mean * self.model.config.scaling_factor).half().cpu().numpy()

        path = self._data / f"{name}-latents-{self._fingerprint}.npy"
        return torch.from_numpy(np.load(kept(path, encoded(), -(-len(pictures) // 64))))

    def pictures(self, name: str, latents: Tensor) -> NDArray[np.uint8]:
        """Return the pictures of scaled latents [n, 4, 16, 16], uint8 [n, 64, 64, 3]; ``name`` is the pictures'."""

        def decoded() -> Iterator[NDArray[Any]]:
            for batch in latents.split(64):
                with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16):
                    unscaled = batch.to(self._device).float() / self.model.config.scaling_factor
                    pixels = self.model.decode(unscaled).sample.float()
                levels = (pixels / 2 + 0.5).clamp(0, 1) * 255
                yield levels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()

        path = self._data / f"{name}-decoded-{self._fingerprint}.npy"
        return np.asarray(np.load(kept(path, decoded(), -(-len(latents) // 64))), np.uint8)
