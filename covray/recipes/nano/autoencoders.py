"""Recipes of the nano VAE (``AutoencoderKL``) and the nano VQGAN (``VQModel``)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor

from covray.recipes.nano.loop import draw, psnr, train

VAE_CHANNELS = (32, 64, 64)
VQGAN_CHANNELS = (32, 64, 128, 128)
CODES = 2048
CODE_WIDTH = 8


def new_vae() -> AutoencoderKL:
    """An untrained nano VAE: 64 px to 4 x 16 x 16 latents."""
    levels = len(VAE_CHANNELS)
    model = AutoencoderKL(
        block_out_channels=VAE_CHANNELS,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
    )
    # A posterior that starts as wide as its means teaches the decoder to ignore it: start narrow (std 0.05).
    with torch.no_grad():
        model.quant_conv.weight[4:].zero_()
        model.quant_conv.bias[4:].fill_(-6.0)
    return model


def train_vae(pictures: Tensor, held_out: Tensor, out: Path, steps: int, seed: int, device: torch.device) -> None:
    """Train the VAE on uint8 ``pictures`` [n, 64, 64, 3] and save it, with its scaling factor, as ``out``/vae."""
    torch.manual_seed(seed)

    def loss_of(model: Any, step: int, generator: torch.Generator) -> Tensor:
        pixels = draw(pictures, 16, generator, device) * 2 - 1
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        error = (decoded.float() - pixels).square().mean()
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        return error + 1e-4 * divergence

    model = train(
        new_vae(), loss_of, out, steps, seed, 1e-3, "vae", device,
        measure=lambda average: f"held-out PSNR {float(reconstruct_vae(average, held_out).mean()):.2f} dB",
    )  # fmt: skip
    with torch.no_grad():
        latents = torch.cat([model.encode(batch * 2 - 1).latent_dist.mean for batch in batches(held_out, device)])
    model.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    model.half().save_pretrained(out / "vae", safe_serialization=True)


def reconstruct_vae(model: Any, pictures: Tensor) -> Tensor:
    """PSNR in dB [n] of ``pictures`` uint8 [n, 64, 64, 3] after encoding (posterior mean) and decoding."""
    device = next(model.parameters()).device
    found = []
    with torch.inference_mode():
        for batch in batches(pictures, device):
            decoded = model.decode(model.encode(batch * 2 - 1).latent_dist.mean).sample
            found.append(psnr((decoded / 2 + 0.5).clamp(0, 1), batch))
    return torch.cat(found)


def new_vqgan() -> VQModel:
    """An untrained nano VQGAN: 64 px to 8 x 8 tokens of a codebook."""
    levels = len(VQGAN_CHANNELS)
    return VQModel(
        block_out_channels=VQGAN_CHANNELS,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=CODE_WIDTH,
        vq_embed_dim=CODE_WIDTH,
        num_vq_embeddings=CODES,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
        sample_size=64,
    )


def train_vqgan(pictures: Tensor, held_out: Tensor, out: Path, steps: int, seed: int, device: torch.device) -> None:
    """Train the VQGAN on uint8 ``pictures`` [n, 64, 64, 3] and save it as ``out``/vqgan.

    A plain VQ of this size collapses to a few codes. So: the first 40% of the steps without quantisation (latents
    kept near the unit ball, with a little noise, so that they cluster); then the codebook by mini-batch k-means on
    the latents; then with quantisation, straight through, codebook and encoder drawn to each other.
    """
    torch.manual_seed(seed)
    quantised_from = int(steps * 0.4)

    def loss_of(model: Any, step: int, generator: torch.Generator) -> Tensor:
        pixels = draw(pictures, 16, generator, device)
        latents = model.encode(pixels).latents.float()
        if step < quantised_from:
            bound = (latents.abs() - 1).clamp_min(0).square().mean()
            latents = latents + 0.05 * torch.randn(latents.shape, generator=generator).to(device)
            decoded = decode_latents(model, latents)
            return (decoded.float() - pixels).square().mean() + 0.01 * bound
        quantised, _ = nearest(model, latents)
        pull = (quantised - latents.detach()).square().mean() + 0.25 * (quantised.detach() - latents).square().mean()
        through = latents + (quantised - latents).detach()
        decoded = decode_latents(model, through)
        return (decoded.float() - pixels).square().mean() + 0.05 * pull

    def on_step(model: Any, step: int) -> None:
        if step == quantised_from:
            model.quantize.embedding.weight.data.copy_(_codebook(model, pictures, seed, device))

    model = train(
        new_vqgan(), loss_of, out, steps, seed, 1e-3, "vqgan", device, on_step=on_step,
        measure=lambda average: describe_vqgan(average, held_out),
    )  # fmt: skip
    model.half().save_pretrained(out / "vqgan", safe_serialization=True)


def decode_latents(model: Any, latents: Tensor) -> Tensor:
    """Pictures of continuous latents: ``VQModel.decode`` itself takes ids only where ``lookup_from_codebook`` is on."""
    return model.decoder(model.post_quant_conv(latents))


def nearest(model: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """The codes nearest to ``latents`` [n, c, h, w]: their vectors, and their ids [n, h * w]."""
    codes = model.quantize.embedding.weight
    flat = latents.detach().permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).float()
    with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
        ids = ((codes**2).sum(1) - 2 * flat @ codes.T).argmin(1)
    n, c, h, w = latents.shape
    return codes[ids].reshape(n, h, w, c).permute(0, 3, 1, 2), ids.reshape(n, h * w)


def reconstruct_vqgan(model: Any, pictures: Tensor) -> tuple[Tensor, np.ndarray]:
    """PSNR in dB [n] of ``pictures`` after writing and reading tokens, and how often each code was used [codes]."""
    device = next(model.parameters()).device
    found, used = [], np.zeros(model.quantize.n_e, np.int64)
    with torch.inference_mode():
        for batch in batches(pictures, device):
            quantised, ids = nearest(model, model.encode(batch).latents)
            decoded = decode_latents(model, quantised)
            found.append(psnr(decoded.clamp(0, 1), batch))
            used += np.bincount(ids.flatten().cpu().numpy(), minlength=len(used))
    return torch.cat(found), used


def describe_vqgan(model: Any, held_out: Tensor) -> str:
    """One line for the progress: held-out PSNR and the share of the codebook in use."""
    found, used = reconstruct_vqgan(model, held_out)
    return f"held-out PSNR {float(found.mean()):.2f} dB through tokens, {np.mean(used > 0):.0%} of the codes in use"


def batches(pictures: Tensor, device: torch.device, size: int = 64) -> Iterable[Tensor]:
    """``pictures`` uint8 [n, h, w, 3] as float [<= size, 3, h, w] in [0, 1], in order."""
    for chunk in pictures.split(size):
        yield chunk.to(device).permute(0, 3, 1, 2).float() / 255


def _codebook(model: Any, pictures: Tensor, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = []
    with torch.inference_mode():
        for _ in range(64):
            encoded = model.encode(draw(pictures, 64, generator, device)).latents
            latents.append(encoded.permute(0, 2, 3, 1).reshape(-1, CODE_WIDTH).float().cpu())
    clusters = MiniBatchKMeans(CODES, random_state=seed, batch_size=8192, n_init=1, max_iter=30, reassignment_ratio=0.0)
    return torch.from_numpy(clusters.fit(torch.cat(latents).numpy()).cluster_centers_).float()
