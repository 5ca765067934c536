"""A ``VQModel`` whose latents are the pixels of patches."""

from __future__ import annotations

import pytest
import torch
from diffusers import VQModel

from covray.recipes.nano.autoencoders import new_vqgan
from covray.recipes.nano.patches import PATCH_PX, patches


@pytest.fixture(scope="module")
def model() -> VQModel:
    """The nano VQGAN, whose decoder is untrained."""
    return new_vqgan()


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    """Noise, one black and one white picture: what a norm over the picture would treat most differently."""
    plain = torch.stack((torch.zeros(3, 64, 64), torch.ones(3, 64, 64)))
    return torch.cat((torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), plain))


@torch.inference_mode()
@pytest.mark.parametrize("half", [False, True], ids=["float32", "rounded to float16"])
def test_latents_are_the_pixels_of_patches(model: VQModel, pictures: torch.Tensor, half: bool) -> None:
    if half:
        model = new_vqgan().half().float()
    latents = model.encode(pictures).latents
    assert latents.shape == (4, 48, 16, 16)
    torch.testing.assert_close(latents.permute(0, 2, 3, 1), patches(pictures), rtol=0, atol=2e-5)


@torch.inference_mode()
def test_a_token_is_told_by_its_own_pixels_alone(model: VQModel, pictures: torch.Tensor) -> None:
    row, column = 5, 9
    patch = (..., slice(row * PATCH_PX, (row + 1) * PATCH_PX), slice(column * PATCH_PX, (column + 1) * PATCH_PX))
    noise, other = pictures[:1], pictures[1:2].clone()
    other[patch] = noise[patch]
    apart = (model.encode(noise).latents - model.encode(other).latents).abs().amax(1)[0]
    assert float(apart[row, column]) < 2e-5
    apart[row, column] = 1
    assert float(apart.min()) > 0.1


@torch.inference_mode()
def test_a_patch_is_its_pixels_by_colour_row_and_column() -> None:
    pictures = torch.arange(3 * 8 * 8).float().view(1, 3, 8, 8)
    expected = pictures[0, :, 4:8, 0:4].flatten()
    assert torch.equal(patches(pictures)[0, 1, 0], expected)
