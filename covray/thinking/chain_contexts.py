"""What a prior reads beside the pictures of a pair: the ablation ``prior.context`` of ``covray build``.

    caption    the manifest's caption -> text encoder -> context
    aligned    the pair's image -> a vision-language model's text and states, or a tower's patches -> aligner -> context

The paper's chains are made with the empty prompt, so that they know nothing of their task; these two break that rule.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from covray.chains.build import ContextReader
from covray.chains.prepare import needs_prior
from covray.config import BuildConfig, EngineConfig, PriorConfig
from covray.config.think import LanguageModelConfig, PainterConfig, ThinkModelsConfig
from covray.errors import ManifestError, WeightsError
from covray.io.device import resolve_device
from covray.io.model_folders import fingerprint_folder
from covray.models.aligner.aligner import load_aligner
from covray.models.aligner.language import language_facts, load_language_model
from covray.models.diffusion.empty_prompt import ClipTextEncoder
from covray.models.diffusion.prior import TEXT_PATTERNS, find_prior, read_config
from covray.models.vlm.checkpoint import load_vlm, vlm_facts
from covray.pairs.manifest_reading import ManifestInfo
from covray.thinking.features import think
from covray.thinking.thinker import WORD_TOKENS, models_around, open_aligner, require_models
from covray.thinking.towers import Tower, tower_facts

_CLIP = "text_encoder"
"""Subfolder of a prior with its CLIP text encoder, beside its ``tokenizer``."""


def require_contexts(config: BuildConfig, info: ManifestInfo) -> None:
    """Check what the contexts of a build need, without loading weights.

    Raises:
        ManifestError: The prior reads captions, and the manifest has none.
        WeightsError: The text encoder or the aligner cannot be used, or its width is not the prior's.
    """
    prior = config.prior
    # Without frames of diffusion no prior is loaded, and nothing reads a context.
    if not needs_prior(config) or prior.context == "empty":
        return
    if prior.context == "aligned":
        _require_aligner(prior)
        return
    if not info.has_captions:
        raise ManifestError(
            f"{config.pairs}: has no captions, which prior.context: caption reads; write them with covray pairs scenes "
            "--captions"
        )
    folder = find_prior(prior)
    name, width = _text_encoder(prior, folder)
    expected = read_config(folder / "unet" / "config.json").get("cross_attention_dim")
    if width != expected:
        raise WeightsError(
            f"{name}: the text encoder is {width} wide, the UNet of {prior.path} reads {expected}; give "
            "prior.text_encoder the encoder that the prior was trained on"
        )


def load_context_reader(config: BuildConfig) -> ContextReader | None:
    """Load what makes the contexts of a build; None for the empty prompt. Raises WeightsError."""
    if not needs_prior(config) or config.prior.context == "empty":
        return None
    if config.prior.context == "aligned":
        return AlignedReader(config.prior, config.engine)
    if config.prior.text_encoder is None:
        return ClipReader(find_prior(config.prior))
    return T5Reader(config.prior.text_encoder, config.engine)


class T5Reader:
    """Reads captions by the encoder of a T5; what is longer than ``tokens`` is cut."""

    tokens = WORD_TOKENS

    def __init__(self, path: str, engine: EngineConfig):
        """Load it. Raises WeightsError."""
        device, dtype = resolve_device(engine)
        self._model = load_language_model(LanguageModelConfig(path=path), dtype, device)
        self.fingerprints = {"text_encoder": self._model.fingerprint}

    def read(self, text_or_image: str | np.ndarray) -> torch.Tensor:
        """Return the states of a caption, float32 [n, d]."""
        assert isinstance(text_or_image, str)
        (states,) = self._model.encode([text_or_image], self.tokens)
        return states


class ClipReader:
    """Reads captions by the CLIP text encoder in a prior's folder, padded as Stable Diffusion's are."""

    def __init__(self, folder: Path):
        """Load it. Raises WeightsError."""
        self._encoder = ClipTextEncoder(folder)
        self.tokens = self._encoder.positions
        self.fingerprints = {"text_encoder": fingerprint_folder(folder, TEXT_PATTERNS)}

    def read(self, text_or_image: str | np.ndarray) -> torch.Tensor:
        """Return the states of a caption, float32 [n, d]."""
        assert isinstance(text_or_image, str)
        return self._encoder.encode(text_or_image)[0]


class AlignedReader:
    """Reads an image as ThinkDiff does, through an aligner."""

    def __init__(self, prior: PriorConfig, engine: EngineConfig):
        """Load the aligner and the model that its features are of. Raises WeightsError."""
        assert prior.aligner is not None
        folder = open_aligner(prior.aligner)
        device, dtype = resolve_device(engine)
        around = models_around(_models(prior), folder)
        self._aligner = load_aligner(folder.path, device).network
        self._device, self._instruction = device, prior.instruction
        self._thought, self._patches = around.thought, folder.patches
        self._tower: Tower | None = None
        if folder.variant == "clip":
            facts = tower_facts(around.vlm)
            self._tower, self.tokens = Tower(facts, dtype, device), facts.count(folder.patches)
            fingerprint = facts.fingerprint
        else:
            known = vlm_facts(around.vlm)
            self._vlm, self.tokens = load_vlm(known, dtype, device), around.thought.max_tokens
            fingerprint = known.fingerprint
        self.fingerprints = {"aligner": folder.fingerprint, "vlm": fingerprint}

    @torch.inference_mode()
    def read(self, text_or_image: str | np.ndarray) -> torch.Tensor:
        """Return the aligned features of an image, float32 [n, d]."""
        assert isinstance(text_or_image, np.ndarray)
        # One image at a time: its context must not depend on the block that it comes in.
        if self._tower is not None:
            features = self._tower.features([text_or_image], self._patches)[0]
        else:
            prompt = self._vlm.prompter.prompt([text_or_image], self._instruction)
            features = think(self._vlm, [prompt], self._thought)[0].features
        # Aligners are float32, whatever the engine computes the models around them in.
        states: torch.Tensor = self._aligner(features.to(self._device, torch.float32))
        return states


def _text_encoder(prior: PriorConfig, folder: Path) -> tuple[str, int]:
    """Return the name and the width of what reads captions. Raises WeightsError where there is nothing."""
    if prior.text_encoder is not None:
        return prior.text_encoder, int(language_facts(LanguageModelConfig(path=prior.text_encoder)).config.d_model)
    file = folder / _CLIP / "config.json"
    if not file.is_file():
        raise WeightsError(
            f"{folder}: has no text encoder to read captions; give prior.text_encoder the T5 that the prior was "
            "trained on, or leave prior.context at empty"
        )
    return str(folder / _CLIP), int(str(read_config(file).get("hidden_size", 0)))


def _require_aligner(prior: PriorConfig) -> None:
    """Refuse an aligner that does not fit the prior. Raises CovrayError."""
    assert prior.aligner is not None
    folder = open_aligner(prior.aligner)
    if folder.places != "text":
        raise WeightsError(f"{prior.aligner}: reads the states of prompts; give an aligner of texts, or of patches")
    require_models(_models(prior), folder, words=False)


def _models(prior: PriorConfig) -> ThinkModelsConfig:
    """Return the models around an aligner, with the prior in the painter's place."""
    # A painter's checks are what a prior needs: its UNet must be as wide as what the aligner writes.
    return ThinkModelsConfig(painter=PainterConfig(kind="unet", path=prior.path, revision=prior.revision))
