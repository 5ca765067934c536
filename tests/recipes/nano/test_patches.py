"""An encoder of patches, and the ``VQModel`` that it is written into."""

from __future__ import annotations

import pytest
import torch
from diffusers import VQModel

from covray.recipes.nano.autoencoders import CODE_WIDTH, NORM_GROUPS, VQGAN_CHANNELS, new_vqgan
from covray.recipes.nano.patches import PATCH_PX, PatchEncoder, write_encoder


@pytest.fixture(scope="module")
def encoder() -> PatchEncoder:
    """One whose every parameter is drawn, as large as training makes them."""
    torch.manual_seed(0)
    encoder = PatchEncoder(VQGAN_CHANNELS[-1], NORM_GROUPS, CODE_WIDTH)
    with torch.no_grad():
        encoder.features.weight.normal_()
        encoder.features.bias.normal_()
        encoder.gain.normal_()
        encoder.offset.normal_()
    return encoder


@pytest.fixture(scope="module")
def model(encoder: PatchEncoder) -> VQModel:
    """The VQModel that it is written into."""
    model = new_vqgan()
    write_encoder(encoder, model)
    return model


@torch.inference_mode()
def test_the_vqmodel_computes_what_the_encoder_does(encoder: PatchEncoder, model: VQModel) -> None:
    pictures = torch.rand(2, 3, 64, 64)
    latents = encoder(pictures)
    # What is left is the features' own part of the variance that the norm divides by.
    torch.testing.assert_close(model.encode(pictures).latents, latents, rtol=0, atol=2e-3 * float(latents.std()))


@torch.inference_mode()
def test_a_token_is_told_by_its_own_pixels_alone(model: VQModel) -> None:
    pictures = torch.rand(1, 3, 64, 64)
    row, column = 5, 9
    others = torch.rand(1, 3, 64, 64)
    patch = (..., slice(row * PATCH_PX, (row + 1) * PATCH_PX), slice(column * PATCH_PX, (column + 1) * PATCH_PX))
    others[patch] = pictures[patch]
    own, other = model.encode(pictures).latents, model.encode(others).latents
    apart = (own - other).abs().amax(1)[0] / own.std()
    assert float(apart[row, column]) < 2e-3
    apart[row, column] = 1
    assert float(apart.min()) > 0.05


@torch.inference_mode()
def test_what_is_written_survives_float16(encoder: PatchEncoder) -> None:
    model = new_vqgan()
    write_encoder(encoder, model)
    pictures = torch.rand(2, 3, 64, 64)
    latents = encoder(pictures)
    rounded = model.half().float().encode(pictures).latents
    torch.testing.assert_close(rounded, latents, rtol=0, atol=0.02 * float(latents.std()))
