"""Recipe of the judge: it learns what portraits show, also through the VAE and under slight noise.

A picture teaches the object in every theme, and the detail of the themes that its style does not hide.

The judge measures other models and is not measured itself. So it also learns the cells that are held out from them,
from portraits of a second seed, and meets a held-out cell about as often as another. A judge that had never seen these
cells learned that they do not exist, and called right answers wrong: it named 16% of their textures, and 61% of others.
One that had seen them nine times less often than others named 42%, and 76% of others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from covray.io import storage
from covray.io.tensor_files import new_folder
from covray.pairs.scenes.portrait_values import OBJECTS, held_out, hidden_themes
from covray.pairs.scenes.portraits import HELD_OUT_SPLIT, Portrait
from covray.recipes.nano.loop import Run, new_part, train
from covray.recipes.nano.portrait_data import SIZE_PX, Portraits, PortraitVae, portrait_manifest, read_portraits
from covray.thinking.episodes import PORTRAITS
from covray.thinking.judge import JudgeNetwork, JudgeRecord, save_judge

STEPS = 6000
BATCH = 64
WIDTHS = (32, 64, 96, 128)
THROUGH_VAE = 0.5
"""Share of the pictures that are decoded latents: what a painter draws has lost the detail that the VAE loses."""
SHIFT_PX = 3
"""How far a picture is moved at most, down or up and to a side."""
NOISE = 0.04
"""Highest standard deviation of the noise on pixels in [0, 1]."""
UNKNOWN = -100
"""Label of a detail that cannot be seen, PyTorch's own."""
ACCURACIES = "accuracy.json"
_MEASURED = 1000
"""Validation pictures, at most, that are judged at every save."""


@dataclass(frozen=True)
class Lessons:
    """Pictures of one solid with their labels."""

    pictures: Tensor
    """uint8 [n, 64, 64, 3], as rendered."""
    decoded: Tensor
    """The same through the VAE."""
    labels: Tensor
    """int64 [n, themes, 2 sides]; ``UNKNOWN`` where the style hides a detail."""


def train_judge(out: Path, steps: int | None, portraits: int, seed: int, device: torch.device) -> None:
    """Train the judge and save it, with its accuracies, as ``out``/judge; a killed training continues.

    Args:
        out: Folder of the family. Portraits are rendered once and kept in ``out``/data.
        steps: Steps; None: the recipe's.
        portraits: Portraits to render, a fifth of them for validation and test, and of a second seed, all to learn
            held-out cells from.
        seed: Of portraits, weights and order. Validation and test are of its portraits.
        device: Where the judge is trained.

    Raises:
        ConfigError: ``out``/judge exists.
    """
    result = new_part(out, "judge")
    lessons = lessons_of(PortraitVae(out, device), out, portraits, seed)
    learned = lessons["train"]
    torch.manual_seed(seed)

    def loss_of(model: JudgeNetwork, _: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(learned.labels), (BATCH,), generator=generator)
        decoded = torch.rand(BATCH, generator=generator) < THROUGH_VAE
        # Half as rendered, half as the VAE returns them: painted pictures come through the VAE.
        chosen = torch.where(decoded[:, None, None, None], learned.decoded[index], learned.pictures[index])
        # A mirrored solid has the same labels: twice as many pictures. None of them speaks of left and right.
        mirrored = torch.rand(BATCH, generator=generator) < 0.5
        chosen = torch.where(mirrored[:, None, None, None], chosen.flip(2), chosen)
        pixels = shifted(chosen.permute(0, 3, 1, 2).float() / 255, generator)
        spread = NOISE * torch.rand((BATCH, 1, 1, 1), generator=generator)
        noisy = (pixels + spread * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)
        logits = model(noisy.to(device, memory_format=torch.channels_last)).float()
        return F.cross_entropy(logits.flatten(0, 2), learned.labels[index].flatten().to(device), ignore_index=UNKNOWN)

    def measure(average: JudgeNetwork) -> str:
        asked = lessons["val"]
        return described(accuracies(_judged_by(average), asked.decoded[:_MEASURED], asked.labels[:_MEASURED]))

    network = JudgeNetwork(len(PORTRAITS), WIDTHS)
    model = train(network, loss_of, Run("judge", out, steps or STEPS, seed, device, 1e-3), measure=measure)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for split in ("val", HELD_OUT_SPLIT):
        for name, pictures in (("rendered", lessons[split].pictures), ("decoded", lessons[split].decoded)):
            shares = table[f"{split}, {name}"] = accuracies(_judged_by(model), pictures, lessons[split].labels)
            print(f"judge: {split}, {name}: {described(shares)}", flush=True)
    record = JudgeRecord(
        size_px=SIZE_PX,
        widths=list(WIDTHS),
        details={theme.name: list(theme.details) for theme in PORTRAITS},
        objects={theme.name: list(theme.objects) for theme in PORTRAITS},
    )
    with new_folder(result) as folder:
        save_judge(folder, model, record)
        storage.write_json(str(folder / ACCURACIES), table)


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures [B, 3, s, s], each moved by up to ``SHIFT_PX``; its edge is repeated where it left."""
    size = pixels.shape[-1]
    padded = F.pad(pixels, (SHIFT_PX,) * 4, mode="replicate")
    moves = torch.randint(2 * SHIFT_PX + 1, (len(pixels), 2), generator=generator)
    moved = []
    for picture, (top, left) in zip(padded, moves.tolist(), strict=True):
        moved.append(picture[:, top : top + size, left : left + size])
    return torch.stack(moved)


@torch.inference_mode()
def accuracies(logits_of: Callable[[Tensor], Tensor], pictures: Tensor, labels: Tensor) -> dict[str, dict[str, float]]:
    """Return the share of right choices by theme: ``detail``, ``object``, and ``both`` where the detail is visible.

    Args:
        logits_of: Returns logits [n, themes, 2 sides, 10] of some of the pictures.
        pictures: uint8 [n, s, s, 3].
        labels: int64 [n, themes, 2].
    """
    right = torch.cat([logits_of(batch).argmax(-1).cpu() for batch in pictures.split(256)]) == labels
    table = {}
    for number, theme in enumerate(PORTRAITS):
        # Where the style hides the detail, there is nothing to be right about.
        own = right[labels[:, number, 0] != UNKNOWN, number]
        if not len(own):
            continue
        shares = (own[:, 0], own[:, 1], own.all(1))
        values = [round(float(share.float().mean()), 4) for share in shares]
        table[theme.name] = dict(zip(("detail", "object", "both"), values, strict=True))
    return table


def labels_of(portrait: Portrait, only_held_out: bool = False) -> list[list[int]]:
    """Return the numbers of detail and object for each theme; ``UNKNOWN`` for a detail that cannot be seen.

    Args:
        portrait: A portrait of one solid.
        only_held_out: Also leave out the themes whose own cell is not held out.
    """
    (solid,) = portrait.solids
    thing = list(OBJECTS).index(solid.thing)
    values = {
        "colour": solid.colour,
        "texture": solid.texture,
        "background": portrait.background,
        "style": portrait.style,
        "arrangement": portrait.arrangement,
    }
    labels = []
    for theme in PORTRAITS:
        value = values[theme.name]
        hidden = theme.name in hidden_themes(portrait.style)
        left_out = hidden or (only_held_out and not held_out(theme.name, value, solid.thing))
        labels.append([UNKNOWN if left_out else theme.details.index(value), thing])
    return labels


def labelled(portraits: Portraits, only_held_out: bool = False) -> tuple[list[int], Tensor]:
    """Return which portraits show one solid, and their labels, int64 [n, themes, 2 sides]; see ``labels_of``."""
    single = [number for number, portrait in enumerate(portraits.contents) if len(portrait.solids) == 1]
    return single, torch.tensor([labels_of(portraits.contents[number], only_held_out) for number in single])


def lessons_of(vae: PortraitVae, out: Path, portraits: int, seed: int) -> dict[str, Lessons]:
    """Return what the judge learns and what it is asked, by split; see ``train_judge``."""
    own = _lessons_by_split(vae, portrait_manifest(out, portraits, seed), only_held_out=True)
    # Every picture of this split has a held-out cell, and other cells in its other themes.
    second = portrait_manifest(out, portraits, seed + 1, only_held_out=True)
    others = _lessons_by_split(vae, second, only_held_out=False)
    learned = [own["train"], others[HELD_OUT_SPLIT]]
    together = Lessons(
        pictures=torch.cat([lessons.pictures for lessons in learned]),
        decoded=torch.cat([lessons.decoded for lessons in learned]),
        labels=torch.cat([lessons.labels for lessons in learned]),
    )
    return own | {"train": together}


def _lessons_by_split(vae: PortraitVae, manifest: Path, only_held_out: bool) -> dict[str, Lessons]:
    """Return what the portraits of one solid teach, or ask; with ``only_held_out`` the test split asks that alone."""
    by_split = {}
    for split, portraits in read_portraits(manifest).items():
        name = f"{manifest.stem}-{split}"
        decoded = vae.pictures(name, vae.latents(name, portraits.pictures))
        single, labels = labelled(portraits, only_held_out and split == HELD_OUT_SPLIT)
        pictures = torch.from_numpy(portraits.pictures[single])
        by_split[split] = Lessons(pictures, torch.from_numpy(decoded[single]), labels)
    return by_split


def _judged_by(model: JudgeNetwork) -> Callable[[Tensor], Tensor]:
    """Return a function from uint8 pictures [n, s, s, 3] to the logits of ``model``."""
    model.eval()
    device = next(model.parameters()).device
    return lambda batch: model(batch.to(device).permute(0, 3, 1, 2).float() / 255)


def described(table: dict[str, dict[str, float]]) -> str:
    """Return accuracies in one line, ``theme detail/object``."""
    shown = []
    for theme, shares in table.items():
        shown.append(f"{theme} {shares['detail']:.3f}/{shares['object']:.3f}")
    return "right: " + ", ".join(shown)
