"""A UNet with cross-attention that draws from aligned features, sampled with covray's own schedule.

The folder is a prior's (``covray.models.diffusion``): its empty prompt is the unconditional side of the guidance. Rows
are padded to the longest, and ``encoder_attention_mask`` hides the padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from covray.config import EngineConfig, PriorConfig
from covray.config.think import PainterConfig
from covray.errors import ConfigError, WeightsError
from covray.models.diffusion.prior import CPU_BATCH, Prior, load_prior


class UnetPainter:
    """A prior whose UNet reads features instead of the empty prompt alone."""

    def __init__(self, prior: Prior, config: PainterConfig, batch: int):
        """Take a loaded prior; its UNet forgets the keys and values of the empty prompt.

        Args:
            prior: The prior.
            config: How it draws.
            batch: Pictures that are drawn at a time.
        """
        self._prior, self._config, self._batch = prior, config, batch
        prior.read_contexts()

    @property
    def width(self) -> int:
        """Width of the features that it reads."""
        return int(self._prior.context.shape[-1])

    def paint(self, features: Sequence[Tensor], words: Sequence[str] | None = None) -> list[NDArray[np.uint8]]:
        """Return a picture of each of ``features``, uint8 [1, h, w, 3].

        Args:
            features: Aligned features, [n, width] each. The encoded words of ``Alignment.read`` may stand after them.
            words: Must be None or empty texts: the folder has no text encoder.

        Raises:
            WeightsError: The features are of another width.
            ConfigError: There are words.
        """
        if words is not None and any(words):
            raise ConfigError(
                "words: a painter of kind unet has no text encoder; put the encoded words after the features"
            )
        require_width(features, self.width)
        pictures: list[NDArray[np.uint8]] = []
        for start in range(0, len(features), self._batch):
            pixels = self._draw(features[start : start + self._batch])
            pictures += [picture[None] for picture in pixels]
        return pictures

    @torch.inference_mode()
    def _draw(self, features: Sequence[Tensor]) -> NDArray[np.uint8]:
        prior, guided = self._prior, self._config.guidance > 1
        contexts = [own.to(prior.device, prior.dtype) for own in features]
        # The unconditional half reads the empty prompt, as in the prior's own training.
        if guided:
            contexts += [prior.context[0]] * len(features)
        lengths = torch.tensor([len(own) for own in contexts], device=prior.device)
        context = nn.utils.rnn.pad_sequence(contexts, batch_first=True)
        mask = torch.arange(context.shape[1], device=prior.device) < lengths[:, None]
        # One noise for all pictures, drawn on the CPU: a picture is the same beside others and on every device.
        generator = torch.Generator("cpu").manual_seed(self._config.seed)
        noise = torch.randn((1, *prior.latent_shape), generator=generator)
        latents = noise.to(prior.device).repeat(len(features), 1, 1, 1)
        previous = torch.zeros_like(latents)
        # 0 is the schedule's way from noise to picture; 1 would be its inverse.
        denoise = torch.zeros(len(features), dtype=torch.int64, device=prior.device)
        for number in range(prior.schedule.evaluations):
            rows = latents.repeat(2, 1, 1, 1) if guided else latents
            timesteps = prior.schedule.timesteps[0, number].expand(len(rows))
            output = prior.unet(
                rows.to(prior.dtype), timesteps, context, encoder_attention_mask=mask, return_dict=False
            )[0].float()
            if guided:
                with_features, without = output.chunk(2)
                output = without + self._config.guidance * (with_features - without)
            latents, previous = prior.schedule.step(latents, output, previous, number, denoise)
        pixels, _ = prior.decode(latents)
        drawn: NDArray[np.uint8] = pixels.cpu().numpy()
        return drawn


def load_unet_painter(config: PainterConfig, engine: EngineConfig, *, verify: bool = True) -> UnetPainter:
    """Load a painter of kind ``unet``.

    Args:
        config: Which prior, and how it draws.
        engine: Device, type of arithmetic and batch.
        verify: Also check that the network predicts what its scheduler says.

    Raises:
        WeightsError: The folder is missing, incomplete, or contradicts itself.
        ConfigError: The size, the steps or the device is not possible.
    """
    about = {"path": config.path, "revision": config.revision, "size_px": config.size_px, "steps": config.steps}
    prior = load_prior(PriorConfig.model_validate(about), engine, verify=verify)
    return UnetPainter(prior, config, engine.batch or CPU_BATCH)


def require_width(features: Sequence[Tensor], width: int) -> None:
    """Refuse features of another width. Raises WeightsError."""
    for own in features:
        if own.shape[-1] != width:
            raise WeightsError(
                f"features are {own.shape[-1]} wide, the painter reads {width}; give an aligner that was trained for "
                "the painter's text encoder"
            )
