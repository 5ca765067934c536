"""Pictures and words in, a drawn answer out: ThinkDiff at work, loaded once and used often.

    variant lvlm    prompt -> text and its states -> aligner -> painter
    variant clip    pictures -> patches -> aligner -> [aligned, encoded words] -> painter

An aligner's folder says between which models it stands; what is given otherwise must be the same models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from covray.config.think import LanguageModelConfig, ThinkModelsConfig, ThoughtConfig
from covray.config.vlm import VlmModelConfig
from covray.errors import ConfigError, WeightsError, one_line
from covray.io.device import resolve_device
from covray.io.model_folders import fingerprint_folder, local_path
from covray.models.aligner.aligner import WEIGHTS, Aligner, load_aligner
from covray.models.aligner.language import LanguageModel, language_facts, load_language_model
from covray.models.aligner.records import AlignerRecord, FeaturesOrigin
from covray.models.vlm.checkpoint import LoadedVlm, load_vlm, vlm_facts
from covray.models.vlm.prompts import Prompt
from covray.thinking.features import Places, Thought, think
from covray.thinking.painters import Painter, load_painter, painter_width
from covray.thinking.towers import Tower, tower_facts
from covray.training.checkpoints import EXPORT
from covray.training.records import TrainResult

WORD_TOKENS = 128
"""Tokens of words for an encoder, at most."""


@dataclass(frozen=True)
class AlignerFolder:
    """An aligner's folder, and what it says; its weights are not read yet."""

    path: Path
    record: AlignerRecord
    fingerprint: str
    """SHA-256 (hex) of its files."""

    @property
    def features(self) -> FeaturesOrigin:
        """How its features are taken; as by default where its folder does not say."""
        return self.record.features or FeaturesOrigin()

    @property
    def variant(self) -> str:
        """Whose features it reads: ``lvlm`` or ``clip``."""
        return self.features.variant

    @property
    def places(self) -> Places:
        """Whose states its features are."""
        return "prompt" if self.features.places == "prompt" else "text"

    @property
    def patches(self) -> int:
        """How many times smaller the grid of patches is made."""
        return self.features.patches


@dataclass(frozen=True)
class ModelsAround:
    """The models that an aligner stands between."""

    vlm: VlmModelConfig
    language_model: LanguageModelConfig | None
    thought: ThoughtConfig


def open_aligner(path: str) -> AlignerFolder:
    """Return the aligner of a finished run of ``covray think train``, or of a folder of its own.

    Raises:
        WeightsError: There is none.
    """
    folder = local_path(path)
    if not (folder / AlignerRecord.FILE).is_file():
        # A finished run has its aligner in a folder of its own.
        folder = folder / EXPORT
        if not (local_path(path) / TrainResult.FILE).is_file():
            raise WeightsError(
                f"{path}: is neither a finished run of covray think train nor the folder of an aligner; give one"
            )
    record = AlignerRecord.read(str(folder))
    return AlignerFolder(folder, record, fingerprint_folder(folder, (AlignerRecord.FILE, WEIGHTS)))


def models_around(config: ThinkModelsConfig, aligner: AlignerFolder) -> ModelsAround:
    """Return the models around an aligner: those of the configuration, else those of its training.

    Raises:
        ConfigError: Neither names the model that the features are of.
        WeightsError: What the aligner's folder says of its training cannot be read.
    """
    features = aligner.features
    vlm, language_model, thought = config.vlm, config.language_model, config.thought
    if vlm is None and features.vlm is None:
        raise ConfigError(f"{aligner.path}: does not say which model its features are of; give it as --vlm")
    try:
        if vlm is None:
            vlm = VlmModelConfig.model_validate(features.vlm)
        if language_model is None and aligner.record.trained_through is not None:
            language_model = LanguageModelConfig.model_validate(aligner.record.trained_through)
        if thought is None:
            thought = ThoughtConfig.model_validate(features.thought or {})
    # The record takes any configurations: they may be of a newer covray, or written by hand.
    except ValidationError as error:
        raise WeightsError(
            f"{aligner.path / AlignerRecord.FILE}: describes its models in another way than this version "
            f"({one_line(error)}); {AlignerRecord.FIX}"
        ) from error
    return ModelsAround(vlm, language_model, thought)


@dataclass(frozen=True)
class FeatureSource:
    """What features are of."""

    name: str
    """What it is called in messages."""
    width: int
    """Numbers of a feature."""
    fingerprint: str
    """Of the model."""


def feature_source(config: ThinkModelsConfig, aligner: AlignerFolder) -> FeatureSource:
    """Return the model whose features an aligner reads, without loading weights. Raises CovrayError."""
    vlm = models_around(config, aligner).vlm
    if aligner.variant == "clip":
        tower = tower_facts(vlm)
        return FeatureSource(vlm.path, tower.width, tower.fingerprint)
    facts = vlm_facts(vlm)
    return FeatureSource(vlm.path, int(facts.config.get_text_config().hidden_size), facts.fingerprint)


def require_models(
    config: ThinkModelsConfig, aligner: AlignerFolder, *, words: bool, source: FeatureSource | None = None
) -> dict[str, str]:
    """Check that the models fit the aligner, without loading weights; return their fingerprints.

    Args:
        config: The models.
        aligner: The aligner between them.
        words: Whether the encoder of the language model is needed.
        source: What the features are of; None: the model of the configuration.

    Raises:
        CovrayError: A model cannot be used, or is not the one that the aligner was trained with.
    """
    around, record, where = models_around(config, aligner), aligner.record, str(aligner.path)
    source = source or feature_source(config, aligner)
    fingerprints = {"vlm": source.fingerprint, "aligner": aligner.fingerprint}
    if words:
        if around.language_model is None:
            raise ConfigError(f"{where}: does not say which language model it was trained with; give --language-model")
        fingerprints["language_model"] = language_facts(around.language_model).fingerprint
    # Without weights: only the sizes and the fingerprints are compared.
    Aligner(torch.nn.Sequential(), record).require_fit(
        where, vlm=source.fingerprint, language_model=fingerprints.get("language_model")
    )
    if source.width != record.input_width:
        raise WeightsError(
            f"{source.name}: its features are {source.width} wide, {where} reads {record.input_width}; give the model "
            "that it was trained with"
        )
    # What the aligner writes is what the painter reads in place of encoded words.
    drawn = painter_width(config.painter)
    if drawn != record.width:
        raise WeightsError(
            f"{config.painter.path}: reads features {drawn} wide, {where} writes {record.width}; give a painter of the "
            "same text encoder"
        )
    return fingerprints


class Thinker:
    """The models around aligners, loaded once."""

    def __init__(self, config: ThinkModelsConfig, aligner: AlignerFolder, *, words: bool, features: bool = True):
        """Load the models.

        Args:
            config: The models.
            aligner: The aligner that says which they are by default.
            words: Whether the language model is loaded, for its encoder.
            features: Whether the model is loaded that features are of.

        Raises:
            CovrayError: A model or the device cannot be used.
        """
        around = models_around(config, aligner)
        device, dtype = resolve_device(config.engine)
        self._device = device
        self.thought = around.thought
        """How texts are written."""
        self.vlm: LoadedVlm | None = None
        self.tower: Tower | None = None
        if features and aligner.variant == "clip":
            self.tower = Tower(tower_facts(around.vlm), dtype, device)
        elif features:
            self.vlm = load_vlm(vlm_facts(around.vlm), dtype, device)
        self.language: LanguageModel | None = None
        # Words are encoded by the language model that the aligner was trained through.
        if words and around.language_model is not None:
            self.language = load_language_model(around.language_model, dtype, device)
        self.painter: Painter = load_painter(config.painter, config.engine)

    def load(self, aligner: AlignerFolder) -> Aligner:
        """Return an aligner on the device. Raises WeightsError."""
        return load_aligner(aligner.path, self._device)

    def think(self, prompt: Prompt, places: Places = "text") -> Thought:
        """Return what the vision-language model writes for a prompt, with its features."""
        assert self.vlm is not None
        (thought,) = think(self.vlm, [prompt], self.thought, places)
        return thought

    @torch.no_grad()
    def align(self, aligner: Aligner, features: Tensor) -> Tensor:
        """Return aligned features, float32 [n, width]."""
        aligned: Tensor = aligner.network(features.to(self._device, torch.float32))
        return aligned

    @torch.no_grad()
    def align_pictures(self, aligner: Aligner, pictures: Sequence[NDArray[np.uint8]], patches: int) -> Tensor:
        """Return the aligned features of pictures, one after another, float32 [n, width]."""
        assert self.tower is not None
        parts = []
        for picture in pictures:
            parts.append(self.align(aligner, self.tower.features([picture], patches)[0]))
        return torch.cat(parts)

    def encode(self, text: str) -> Tensor:
        """Return the states of a text of the language model's encoder, float32 [n, width]."""
        assert self.language is not None
        (states,) = self.language.encode([text], WORD_TOKENS)
        return states

    def paint(self, features: Sequence[Tensor]) -> list[NDArray[np.uint8]]:
        """Return the first frame that is drawn of each of ``features``, uint8 [h, w, 3]."""
        return [frames[0] for frames in self.painter.paint(features)]
