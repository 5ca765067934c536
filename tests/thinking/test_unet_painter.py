"""A UNet draws from its features: padding is not seen, and the empty prompt draws what the prior draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from covray.config import PriorConfig
from covray.config.think import PainterConfig
from covray.errors import ConfigError, WeightsError
from covray.models.diffusion.prior import load_prior
from covray.thinking.unet_painter import UnetPainter, load_unet_painter
from tests.support.priors import CPU

WIDTH = 24


def load(folder: Path, guidance: float = 1.0) -> UnetPainter:
    config = PainterConfig(kind="unet", path=str(folder), steps=4, guidance=guidance, seed=7)
    return load_unet_painter(config, CPU, verify=False)


def features_of(seed: int, count: int) -> torch.Tensor:
    return 3 * torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_short_row_is_drawn_beside_a_long_one_as_alone(prior_folder: Path, guidance: float) -> None:
    painter = load(prior_folder, guidance)
    rows = [features_of(0, 2), features_of(1, 9)]
    together = painter.paint(rows)
    for row, picture in zip(rows, together, strict=True):
        assert picture.shape == (1, 32, 32, 3)
        alone = painter.paint([row])[0]
        assert np.abs(alone.astype(int) - picture.astype(int)).max() <= 1
    assert not np.array_equal(*together)


def test_the_empty_prompt_draws_what_the_prior_draws(prior_folder: Path) -> None:
    prior = load_prior(PriorConfig(path=str(prior_folder), steps=4), CPU, verify=False)
    latents = torch.randn((1, *prior.latent_shape), generator=torch.Generator().manual_seed(7))
    previous, denoise = torch.zeros_like(latents), torch.zeros(1, dtype=torch.int64)
    for number in range(prior.schedule.evaluations):
        output = prior.predict(latents, prior.schedule.timesteps[0, number].expand(1))
        latents, previous = prior.schedule.step(latents, output, previous, number, denoise)
    expected = prior.decode(latents)[0].numpy()
    for guidance in (1.0, 5.0):  # guidance from the empty prompt to itself changes nothing
        drawn = load(prior_folder, guidance).paint([prior.context[0]])[0]
        assert np.abs(drawn.astype(int) - expected.astype(int)).max() <= 1


def test_guidance_leads_away_from_the_empty_prompt(prior_folder: Path) -> None:
    features = [features_of(0, 4)]
    plain, guided = load(prior_folder).paint(features), load(prior_folder, 5.0).paint(features)
    assert not np.array_equal(plain[0], guided[0])


def test_words_and_other_widths_are_refused(prior_folder: Path) -> None:
    painter = load(prior_folder)
    assert painter.width == WIDTH
    assert len(painter.paint([features_of(0, 2)], [""])) == 1
    with pytest.raises(ConfigError, match="a painter of kind unet has no text encoder; put the encoded words after"):
        painter.paint([features_of(0, 2)], ["red"])
    with pytest.raises(WeightsError, match="features are 16 wide, the painter reads 24; give an aligner"):
        painter.paint([torch.zeros(3, 16)])
