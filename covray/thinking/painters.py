"""Diffusion models that draw from aligned features: features in, pictures out.

The features take the place of what a pipeline's T5 encoder returns (``prompt_embeds``). Every pipeline wants something
more:

    FLUX         the pooled CLIP embedding of a text, which is ""
    SD3          77 tokens of both CLIP encoders in front, and their pooled embeddings
    PixArt       the mask of the tokens
    CogVideoX    exactly as many tokens as it was trained with: T5's tokens of the words fill the rest

Pictures are drawn one by one from one noise, so that a picture depends on its features and the configuration only.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor

from covray.config import EngineConfig
from covray.config.think import PainterConfig
from covray.errors import ConfigError, WeightsError, one_line
from covray.io.device import resolve_device
from covray.io.model_folders import require_files, resolve_folder
from covray.thinking.unet_painter import UnetPainter, load_unet_painter, require_width

_Encoded = tuple[Tensor, Tensor]
"""States [1, n, width] and the mask of their tokens, int64 [1, n]."""
_PATTERNS = ("*.json", "*/*.json", "*/*.safetensors", "*/*.txt", "*/*.model")


class Painter(Protocol):
    """What draws."""

    @property
    def width(self) -> int:
        """Width of the features that it reads."""

    def paint(self, features: Sequence[Tensor], words: Sequence[str] | None = None) -> list[NDArray[np.uint8]]:
        """Return a picture, or a video, of each of ``features``.

        Args:
            features: Aligned features, [n, width] each.
            words: A text for each picture, whose T5 states stand after the features; "": none. None: none at all.

        Returns:
            Frames, uint8 [f, h, w, 3] each; a picture has one.

        Raises:
            WeightsError: The features are of another width.
            ConfigError: The painter takes no words, or no so many features.
        """


class PipelinePainter(ABC):
    """A pipeline of diffusers that takes ``prompt_embeds``."""

    def __init__(self, pipeline: Any, config: PainterConfig):
        """Take a loaded pipeline."""
        self._pipeline, self._config = pipeline, config
        pipeline.set_progress_bar_config(disable=True)

    @property
    @abstractmethod
    def width(self) -> int:
        """Width of the features that it reads."""

    @abstractmethod
    def _inputs(self, features: Tensor, words: str) -> dict[str, Any]:
        """Return the arguments of the pipeline that are its own.

        Args:
            features: [1, n, width], on the pipeline's device.
            words: The text after the features; "": none.
        """

    def paint(self, features: Sequence[Tensor], words: Sequence[str] | None = None) -> list[NDArray[np.uint8]]:
        """See ``Painter``."""
        require_width(features, self.width)
        texts = [""] * len(features) if words is None else words
        return [self._paint(own, text) for own, text in zip(features, texts, strict=True)]

    @torch.no_grad()
    def _paint(self, features: Tensor, words: str) -> NDArray[np.uint8]:
        config = self._config
        inputs = self._inputs(features[None].to(self._device, self._pipeline.transformer.dtype), words)
        if config.size_px is not None:
            inputs |= {"height": config.size_px, "width": config.size_px}
        output = self._pipeline(
            num_inference_steps=config.steps,
            guidance_scale=config.guidance,
            # On the CPU, so that every device begins with the same noise.
            generator=torch.Generator("cpu").manual_seed(config.seed),
            output_type="np",
            return_dict=False,
            **inputs,
        )[0]
        # [1, h, w, 3] of a picture, [1, frames, h, w, 3] of a video.
        frames = np.asarray(output, np.float32)
        frames = frames.reshape(-1, *frames.shape[-3:])
        pixels: NDArray[np.uint8] = np.rint(frames.clip(0, 1) * 255).astype(np.uint8)
        return pixels

    @property
    def _device(self) -> torch.device:
        device: torch.device = self._pipeline.transformer.device
        return device

    def _encode(self, tokenizer: Any, encoder: Any, words: str, length: int, masked: bool = False) -> _Encoded:
        """Return the T5 states of a text, padded to ``length`` tokens.

        Args:
            tokenizer: T5's.
            encoder: T5's.
            words: The text.
            length: Tokens.
            masked: Whether the encoder sees no padding; most of these models were trained with it in sight.

        Raises:
            ConfigError: The pipeline was loaded without its T5 encoder.
        """
        if encoder is None:
            raise ConfigError(
                f"painter.path: {self._config.path} has no T5 encoder, which words and guidance need; give a folder "
                "with it, or no words and painter.guidance=1"
            )
        tokens = tokenizer([words], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids, mask = tokens["input_ids"].to(encoder.device), tokens["attention_mask"].to(encoder.device)
        states = encoder(ids, attention_mask=mask if masked else None)[0]
        return states.to(self._device, self._pipeline.transformer.dtype), mask.to(self._device)


class FluxPainter(PipelinePainter):
    """FLUX; it has no second pass for guidance."""

    @property
    def width(self) -> int:
        """See ``Painter``."""
        return int(self._pipeline.transformer.config.joint_attention_dim)

    def _inputs(self, features: Tensor, words: str) -> dict[str, Any]:
        pipe = self._pipeline
        length = pipe.tokenizer_max_length
        tokens = pipe.tokenizer([words], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        pooled = pipe.text_encoder(tokens["input_ids"].to(pipe.text_encoder.device)).pooler_output
        if words:
            states, _ = self._encode(pipe.tokenizer_2, pipe.text_encoder_2, words, self._config.words)
            features = torch.cat((features, states), 1)
        return {"prompt_embeds": features, "pooled_prompt_embeds": pooled.to(features.device, features.dtype)}


class Sd3Painter(PipelinePainter):
    """Stable Diffusion 3; without its T5 encoder the empty prompt is zeros, as diffusers has it."""

    @property
    def width(self) -> int:
        """See ``Painter``."""
        return int(self._pipeline.transformer.config.joint_attention_dim)

    def _inputs(self, features: Tensor, words: str) -> dict[str, Any]:
        pipe = self._pipeline
        if words:
            states, _ = self._encode(pipe.tokenizer_3, pipe.text_encoder_3, words, self._config.words)
            features = torch.cat((features, states), 1)
        # diffusers wants both prompts equally long: as many T5 tokens as there are features.
        count = features.shape[1]
        text, _, pooled, _ = self._encode_clip(words, count)
        empty, _, empty_pooled, _ = self._encode_clip("", count)
        # The features take the place of the T5 tokens behind CLIP's.
        clip = text[:, : text.shape[1] - count]
        return {
            "prompt_embeds": torch.cat((clip.to(features), features), 1),
            "pooled_prompt_embeds": pooled.to(features),
            "negative_prompt_embeds": empty.to(features),
            "negative_pooled_prompt_embeds": empty_pooled.to(features),
        }

    def _encode_clip(self, words: str, count: int) -> Any:
        """Return diffusers' encodings of a text: CLIP's tokens, then ``count`` of T5."""
        return self._pipeline.encode_prompt(
            words, words, words, device=self._device, do_classifier_free_guidance=False, max_sequence_length=count
        )


class PixArtPainter(PipelinePainter):
    """PixArt-Alpha or PixArt-Sigma, also without its T5 encoder if there is no guidance."""

    @property
    def width(self) -> int:
        """See ``Painter``."""
        return int(self._pipeline.transformer.config.caption_channels)

    def _inputs(self, features: Tensor, words: str) -> dict[str, Any]:
        pipe = self._pipeline
        mask = torch.ones(features.shape[:2], dtype=torch.int64, device=features.device)
        if words:
            states, own = self._encode(pipe.tokenizer, pipe.text_encoder, words, self._config.words, masked=True)
            features, mask = torch.cat((features, states), 1), torch.cat((mask, own), 1)
        inputs = {
            "prompt_embeds": features,
            "prompt_attention_mask": mask,
            "negative_prompt": None,  # its default, an empty text, is refused beside embeddings
            "use_resolution_binning": False,
        }
        if self._config.guidance > 1:
            empty, of_empty = self._encode(pipe.tokenizer, pipe.text_encoder, "", features.shape[1], masked=True)
            inputs |= {"negative_prompt_embeds": empty, "negative_prompt_attention_mask": of_empty}
        return inputs


class CogVideoXPainter(PipelinePainter):
    """CogVideoX, which draws videos."""

    @property
    def width(self) -> int:
        """See ``Painter``."""
        return int(self._pipeline.transformer.config.text_embed_dim)

    def _inputs(self, features: Tensor, words: str) -> dict[str, Any]:
        pipe = self._pipeline
        length = int(pipe.transformer.config.max_text_seq_length)
        free = length - features.shape[1]
        if free < 0:
            raise ConfigError(f"{features.shape[1]} features: CogVideoX reads {length} tokens; give fewer features")
        if free:
            states, _ = self._encode(pipe.tokenizer, pipe.text_encoder, words, free)
            features = torch.cat((features, states), 1)
        inputs = {"prompt_embeds": features, "num_frames": self._config.frames}
        if self._config.guidance > 1:
            inputs["negative_prompt_embeds"], _ = self._encode(pipe.tokenizer, pipe.text_encoder, "", length)
        return inputs


_PAINTERS: dict[str, type[PipelinePainter]] = {
    "FluxPipeline": FluxPainter,
    "StableDiffusion3Pipeline": Sd3Painter,
    "PixArtAlphaPipeline": PixArtPainter,
    "PixArtSigmaPipeline": PixArtPainter,
    "CogVideoXPipeline": CogVideoXPainter,
}
"""By diffusers' class of the pipeline."""
_KINDS = {
    "flux": ("FluxPipeline",),
    "sd3": ("StableDiffusion3Pipeline",),
    "pixart": ("PixArtSigmaPipeline", "PixArtAlphaPipeline"),
    "cogvideox": ("CogVideoXPipeline",),
}


_WIDTH_KEYS = {
    "unet": ("unet", "cross_attention_dim"),
    "flux": ("transformer", "joint_attention_dim"),
    "sd3": ("transformer", "joint_attention_dim"),
    "pixart": ("transformer", "caption_channels"),
    "cogvideox": ("transformer", "text_embed_dim"),
}
"""Folder of a model and key of its ``config.json`` that says how wide the features are that it reads."""


def painter_width(config: PainterConfig) -> int:
    """Return the width of the features that a painter reads, without loading it.

    Raises:
        WeightsError: The folder is missing, incomplete, or of another kind.
    """
    name, key = _WIDTH_KEYS[config.kind]
    nano = "prior" if config.kind == "unet" else "painter"
    folder = resolve_folder(config.path, config.revision, nano, _PATTERNS)
    file = folder / name / "config.json"
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))[key])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsError(
            f"{file}: does not say {key}, which a painter of kind {config.kind} has; give another painter.kind or path"
        ) from error


def painter_of(pipeline: Any, config: PainterConfig) -> PipelinePainter:
    """Return the painter of a loaded pipeline. Raises ConfigError for a pipeline of a kind that is not supported."""
    name = type(pipeline).__name__
    painter = _PAINTERS.get(name)
    if painter is None:
        raise ConfigError(f"{name}: draws from no features of T5; give one of {', '.join(_PAINTERS)}")
    return painter(pipeline, config)


def load_painter(config: PainterConfig, engine: EngineConfig) -> UnetPainter | PipelinePainter:
    """Load a painter onto the engine's device.

    Args:
        config: Which, and how it draws.
        engine: Device and type of arithmetic.

    Raises:
        WeightsError: The folder is missing, incomplete, or of another kind.
        ConfigError: The device or a size is not possible.
    """
    if config.kind == "unet":
        return load_unet_painter(config, engine)
    import diffusers  # where it is needed: it takes seconds

    folder = resolve_folder(config.path, config.revision, "painter", _PATTERNS)
    require_files(folder, ["model_index.json"])
    device, dtype = resolve_device(engine)
    names = _KINDS[config.kind]
    try:
        name = str(diffusers.DiffusionPipeline.load_config(folder, local_files_only=True).get("_class_name"))
    except (OSError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{folder}: model_index.json cannot be read ({one_line(error)}); get the folder again"
        ) from error
    if name not in names:
        raise WeightsError(f"{folder}: is a {name}, not a {' or '.join(names)}; give another painter.kind")
    try:
        pipeline = getattr(diffusers, name).from_pretrained(
            folder, torch_dtype=dtype, use_safetensors=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, ImportError, SafetensorError) as error:
        raise WeightsError(f"{folder}: cannot be loaded as {name}: {one_line(error)}; get the folder again") from error
    return painter_of(pipeline.to(device), config)
