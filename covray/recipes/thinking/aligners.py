"""The aligners of the table: ThinkDiff's, those of its ablations, and two that learn from pictures instead of text."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from covray.config.think import AlignmentConfig, SplitConfig
from covray.models.aligner.aligner import Aligner, load_aligner, new_aligner, save_aligner
from covray.models.aligner.records import Norm
from covray.recipes.nano.loop import Run, train
from covray.recipes.nano.prior import new_scheduler
from covray.recipes.thinking.budget import Budget
from covray.recipes.thinking.family import Family
from covray.recipes.thinking.thoughts import Thoughts
from covray.thinking.alignment import Alignment, AlignmentBatch, collate
from covray.thinking.splits import SplitMode, SplitSeed
from covray.thinking.training import AlignerTraining, Batches, Caption, clip_batches, lvlm_batches

LONGEST = 96
"""Tokens of a text to write, at most."""
LEARNING_RATE = 1e-3
SAVE_EVERY_S = 120.0


@dataclass(frozen=True)
class Variant:
    """A kind of aligner: a row of the table."""

    name: str
    reads: Literal["generated", "prompt", "patches"] = "generated"
    """States of the generated text, of the prompt, or the picture's patches and class token."""
    split: SplitMode = "prefix"
    """Of generated texts that are learned by text."""
    norm: Norm = "encoder"
    loss: Literal["text", "diffusion", "none"] = "text"
    """Through the frozen decoder, through the frozen painter, or untrained."""

    @property
    def slug(self) -> str:
        """Return the name for files."""
        return self.name.lower().replace(" ", "-")


LVLM = Variant("ThinkDiff-LVLM")
CLIP = Variant("ThinkDiff-CLIP", reads="patches")
IP_ADAPTER = Variant("IP-Adapter-like", reads="patches", loss="diffusion")
COMPOSERS = (CLIP, IP_ADAPTER)
"""Those whose compositions are judged."""
VARIANTS = (
    LVLM,
    Variant("without masking", split="none"),
    Variant("masked by token", split="tokens"),
    Variant("norm weight 1", norm="ones"),
    Variant("no norm", norm="none"),
    Variant("input tokens", reads="prompt"),
    Variant("diffusion loss", loss="diffusion"),
    IP_ADAPTER,
    Variant("untrained aligner", loss="none"),
)


@dataclass(frozen=True)
class Lessons:
    """What aligners learn from: captions of single pictures, and no episode."""

    thoughts: Thoughts
    """One a picture, of two tokens or more."""
    patches: list[Tensor]
    """Class token and pooled patches of each picture, float32 [17, width]."""
    latents: Tensor
    """Of each picture, fp16 [n, 4, 16, 16]."""

    def features(self, variant: Variant) -> list[Tensor]:
        """Return what the variant reads."""
        by_name = {"generated": self.thoughts.generated, "prompt": self.thoughts.read, "patches": self.patches}
        return by_name[variant.reads]


def trained_aligner(
    folder: Path, variant: Variant, family: Family, lessons: Lessons, budget: Budget, seed: int
) -> Aligner:
    """Return the aligner of a variant and seed, trained if ``folder`` does not have it; a killed training continues.

    Args:
        folder: Of all aligners.
        variant: What it reads and learns.
        family: The nano parts.
        lessons: The captions.
        budget: Steps and batch.
        seed: Of its weights and batches.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"{variant.slug}-{seed}"
    if place.is_dir():
        return load_aligner(place, family.device)
    features = lessons.features(variant)
    aligner = new_aligner(
        features[0].shape[1], family.language.model, variant.norm, seed,
        vlm_fingerprint=family.vlm_fingerprint, language_fingerprint=family.language.fingerprint,
    )  # fmt: skip
    aligner.network.to(family.device)
    if variant.loss == "text":
        _learn_text(place, aligner, variant, family, lessons, _settings(budget, seed))
    # The painter is frozen, and what it finds wrong is the aligner's loss.
    elif variant.loss == "diffusion":
        loss = _DiffusionLoss(family, features, lessons.latents, budget.aligner_batch)
        run = Run(place.name, folder, budget.aligner_steps, seed, family.device, LEARNING_RATE)
        aligner = Aligner(train(aligner.network, loss, run), aligner.record)
    save_aligner(place, aligner)
    # Read back, as a programme that is continued reads it.
    return load_aligner(place, family.device)


def _settings(budget: Budget, seed: int) -> AlignmentConfig:
    """Return the authors' training, shortened, at a learning rate for so few steps."""
    return AlignmentConfig(
        steps=budget.aligner_steps,
        batch=budget.aligner_batch,
        learning_rate=LEARNING_RATE,
        warmup_steps=min(100, budget.aligner_steps // 10),
        warmup_from=LEARNING_RATE / 100,
        final=LEARNING_RATE / 50,
        cosine_steps=budget.aligner_steps,
        seed=seed,
    )


def _learn_text(
    place: Path, aligner: Aligner, variant: Variant, family: Family, lessons: Lessons, settings: AlignmentConfig
) -> None:
    """Train an aligner by the text that the frozen decoder writes."""
    language, thoughts = family.language, lessons.thoughts
    if variant.reads == "generated":
        captions = [Caption(own, ids) for own, ids in zip(thoughts.generated, thoughts.ids, strict=True)]
        split = SplitConfig(mode=variant.split)
        batches = lvlm_batches(captions, split, family.vlm.prompter.text, language.tokenizer, LONGEST)
    elif variant.reads == "patches":
        pairs = zip(lessons.patches, thoughts.ids, thoughts.texts, strict=True)
        captions = [Caption(own, ids, text) for own, ids, text in pairs]
        batches = clip_batches(captions, language.tokenizer, LONGEST)
    else:
        batches = _whole_texts(lessons.features(variant), thoughts.texts, language.tokenizer)
    training = AlignerTraining(Alignment(aligner.network, language.model), batches, len(thoughts.ids), settings)
    # Saved every two minutes: a killed training goes on from there.
    kept = place.with_suffix(".state.pt")
    if kept.exists():
        training.load_state(torch.load(kept, map_location=family.device, weights_only=True))
    saved = time.monotonic()
    while not training.is_done:
        loss = training.run_step()
        if training.step % 100 == 0:
            print(f"{place.name}: step {training.step}/{settings.steps}  loss {loss:.3f}", flush=True)
        if time.monotonic() - saved > SAVE_EVERY_S:
            aside = kept.with_suffix(".part")
            torch.save(training.state(), aside)
            os.replace(aside, kept)
            saved = time.monotonic()


def _whole_texts(features: Sequence[Tensor], texts: Sequence[str], tokenizer: Any) -> Batches:
    """Return what makes batches whose target is the whole text."""

    def make(seeds: Sequence[SplitSeed]) -> AlignmentBatch:
        own_features, targets = [], []
        for seed in seeds:
            own_features.append(features[seed.index])
            targets.append(texts[seed.index])
        return collate(own_features, targets, tokenizer, LONGEST)

    return make


class _DiffusionLoss:
    """The error of the noise that the frozen painter finds in a picture's latents, given its aligned features."""

    def __init__(self, family: Family, features: Sequence[Tensor], latents: Tensor, batch: int):
        unet: Any = UNet2DConditionModel.from_pretrained(family.folder / "painter" / "unet", use_safetensors=True)
        self._unet = unet.float().to(family.device).requires_grad_(False).eval()
        self._features, self._latents, self._batch, self._device = features, latents, batch, family.device
        self._alphas = new_scheduler().alphas_cumprod.to(family.device)

    def __call__(self, aligner: Any, _: int, generator: torch.Generator) -> Tensor:
        """Return the loss of a batch that ``generator`` draws."""
        index = torch.randint(len(self._features), (self._batch,), generator=generator)
        own = [self._features[number] for number in index.tolist()]
        # Padded to the longest; the mask keeps the painter from reading the padding.
        rows = nn.utils.rnn.pad_sequence(own, batch_first=True).to(self._device)
        lengths = torch.tensor([len(features) for features in own], device=self._device)
        mask = torch.arange(rows.shape[1], device=self._device) < lengths[:, None]
        # The painter was trained on these 1000 steps of noise.
        timesteps = torch.randint(1000, (self._batch,), generator=generator).to(self._device)
        clean = self._latents[index].to(self._device).float()
        noise = torch.randn(clean.shape, generator=generator).to(self._device)
        # Noise is added as DDPM does: alpha is the share of the signal's variance.
        alpha = self._alphas[timesteps].reshape(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        answer = self._unet(noisy, timesteps, aligner(rows), encoder_attention_mask=mask).sample
        return F.mse_loss(answer.float(), noise)
