"""Recipes of the nano VAE (``AutoencoderKL``) and the nano VQGAN (``VQModel``)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from sklearn.cluster import KMeans
from torch import Tensor

from covray.io.tensor_files import new_folder
from covray.recipes.nano.data import CROPS, KINDS, Pictures
from covray.recipes.nano.loop import Run, draw, psnr, train
from covray.recipes.nano.patches import VALUES, patches, write_encoder

VAE_CHANNELS = (32, 64, 64)
VQGAN_CHANNELS = (24, 64, 112)
CODES = 2048
VQGAN_BATCH = 16
NORM_GROUPS = 8
CODEBOOK_PICTURES = 500
"""Pictures of each kind whose patches are clustered."""
KIND_WEIGHTS = {
    "colour": 1.0, "grey": 0.5, "dark": 0.5, "segmentation": 2.0, "pose": 1.5, "normals": 2.0, "edges": 4.0,
    "depth": 0.5, "photographs": 1.0,
}  # fmt: skip
"""Weight of each kind of picture in the error that k-means minimizes. Without weights nearly all codes would describe
textures of photographs; labels have few distinct patches, and a wrong one is easily seen."""


def new_vae() -> AutoencoderKL:
    """Return an untrained nano VAE: 64 px to 4 x 16 x 16 latents."""
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


def train_vae(pictures: Tensor, validation: Tensor, out: Path, steps: int, seed: int, device: torch.device) -> None:
    """Train the VAE and save it, with its scaling factor, as ``out``/vae.

    Args:
        pictures: The training pictures, uint8 [n, 64, 64, 3].
        validation: uint8 [n, 64, 64, 3], measured at every save; the scaling factor is that of their latents.
        out: Folder of the family; ``out``/vae.state.pt holds the state from which a stopped training resumes.
        steps: Optimizer steps of 16 pictures.
        seed: Seed of weights and batches.
        device: Where to train.
    """
    torch.manual_seed(seed)

    def loss_of(model: Any, step: int, generator: torch.Generator) -> Tensor:
        pixels = draw(pictures, 16, generator, device) * 2 - 1
        posterior = model.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
        decoded = model.decode(posterior.mean + posterior.std * noise).sample
        error = (decoded.float() - pixels).square().mean()
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).float().mean()
        # A slight penalty, as in latent diffusion (Rombach et al. 2022): latents stay bounded and keep detail.
        return error + 1e-4 * divergence

    model = train(
        new_vae(), loss_of, Run("vae", out, steps, seed, device, 1e-3),
        measure=lambda average: f"held-out PSNR {float(reconstruct_vae(average, validation).mean()):.2f} dB",
    )  # fmt: skip
    with torch.no_grad():
        latents = torch.cat([model.encode(batch * 2 - 1).latent_dist.mean for batch in batches(validation, device)])
    model.register_to_config(scaling_factor=round(1 / float(latents.std()), 5))
    with new_folder(out / "vae") as folder:
        model.half().save_pretrained(folder, safe_serialization=True)


def reconstruct_vae(model: Any, pictures: Tensor) -> Tensor:
    """Return the PSNR in dB, [n], of ``pictures`` uint8 [n, 64, 64, 3] encoded (posterior mean) and decoded."""
    device = next(model.parameters()).device
    psnr_db = []
    with torch.inference_mode():
        for batch in batches(pictures, device):
            decoded = model.decode(model.encode(batch * 2 - 1).latent_dist.mean).sample
            psnr_db.append(psnr((decoded / 2 + 0.5).clamp(0, 1), batch))
    return torch.cat(psnr_db)


def new_vqgan() -> VQModel:
    """Return an untrained nano VQGAN: 64 px to 16 x 16 tokens of a codebook."""
    levels = len(VQGAN_CHANNELS)
    model = VQModel(
        block_out_channels=VQGAN_CHANNELS,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=VALUES,
        vq_embed_dim=VALUES,
        num_vq_embeddings=CODES,
        layers_per_block=1,
        norm_num_groups=NORM_GROUPS,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
        sample_size=64,
    )
    write_encoder(model)
    return model


def train_vqgan(pictures: Tensor, validation: Tensor, out: Path, steps: int, seed: int, device: torch.device) -> None:
    """Cluster the patches of the pictures, train a decoder on the codes, and save both as ``out``/vqgan.

    A token is the nearest of ``CODES`` patches (``covray.recipes.nano.patches``), so that only the decoder is trained,
    on the squared error of pixels.

    Args:
        pictures: The training pictures, uint8 [scenes * 8 + CROPS * 3, 64, 64, 3], of ``covray.recipes.nano.data``.
        validation: uint8 [n, 64, 64, 3], measured at every save.
        out: Folder of the family; ``out``/vqgan.state.pt holds the state from which a stopped training resumes.
        steps: Optimizer steps of ``VQGAN_BATCH`` pictures.
        seed: Seed of codebook, weights and batches.
        device: Where to train.
    """
    torch.manual_seed(seed)
    corpus = Pictures.of(pictures.numpy(), CROPS)

    def loss_of(model: Any, step: int, generator: torch.Generator) -> Tensor:
        pixels = corpus.batch(VQGAN_BATCH, generator, device)
        quantised, _ = nearest(model, patches(pixels).permute(0, 3, 1, 2))
        return (decode_latents(model, quantised).float() - pixels).square().mean()

    def on_step(model: Any, step: int) -> None:
        # Here and not before the training: a resumed one has the codebook in its state.
        if step == 0:
            model.quantize.embedding.weight.data.copy_(patch_codes(corpus, seed))

    model = new_vqgan()
    for part in (model.encoder, model.quant_conv, model.quantize):
        part.requires_grad_(False)
    model = train(
        model, loss_of, Run("vqgan", out, steps, seed, device, 1e-3), on_step=on_step,
        measure=lambda average: describe_vqgan(average, validation),
    )  # fmt: skip
    with new_folder(out / "vqgan") as folder:
        model.half().save_pretrained(folder, safe_serialization=True)


def patch_codes(corpus: Pictures, seed: int) -> Tensor:
    """Return the codebook: k-means of patches, each kind of picture with its share of ``KIND_WEIGHTS``.

    Args:
        corpus: The training pictures.
        seed: Seed of what is drawn and of the clusters.

    Returns:
        float [CODES, patches.VALUES], rounded to float16 as it is saved.
    """
    rng = np.random.default_rng(seed)
    distinct, weights = [], []
    for kind, weight in KIND_WEIGHTS.items():
        of_kind = corpus.crops.reshape(-1, *corpus.crops.shape[2:])
        if kind != "photographs":
            of_kind = corpus.scenes[:, KINDS.index(kind)]
        chosen = np.sort(rng.permutation(len(of_kind))[:CODEBOOK_PICTURES])
        if len(chosen):
            pixels = torch.from_numpy(np.array(of_kind[chosen])).permute(0, 3, 1, 2)
            values, counts = np.unique(patches(pixels).flatten(0, 2).numpy(), axis=0, return_counts=True)
            distinct.append(values)
            weights.append(weight * counts)
    points, mass = np.concatenate(distinct).astype(np.float32) / 255, np.concatenate(weights)
    # A few plain patches have most of the mass: k-means++, and draws by mass, would begin with many equal codes.
    share = np.sqrt(mass)
    first = points[rng.choice(len(points), CODES, replace=False, p=share / share.sum())]
    clusters = KMeans(CODES, init=first, n_init=1, max_iter=30, random_state=seed).fit(points, sample_weight=mass)
    return torch.from_numpy(clusters.cluster_centers_).half().float()


def decode_latents(model: Any, latents: Tensor) -> Tensor:
    """Return the pictures of continuous latents.

    ``VQModel.decode`` itself takes only ids where ``lookup_from_codebook`` is on.
    """
    return model.decoder(model.post_quant_conv(latents))


def nearest(model: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes nearest to ``latents`` [n, c, h, w]: their vectors in the same shape, and ids [n, h * w]."""
    codes = model.quantize.embedding.weight
    flat = latents.detach().permute(0, 2, 3, 1).reshape(-1, latents.shape[1]).float()
    with torch.no_grad(), torch.autocast(flat.device.type, enabled=False):
        ids = ((codes**2).sum(1) - 2 * flat @ codes.T).argmin(1)
    n, c, h, w = latents.shape
    return codes[ids].reshape(n, h, w, c).permute(0, 3, 1, 2), ids.reshape(n, h * w)


def reconstruct_vqgan(model: Any, pictures: Tensor) -> tuple[Tensor, np.ndarray]:
    """Return the PSNR in dB, [n], of ``pictures`` through tokens, and how often each code is used, [codes]."""
    device = next(model.parameters()).device
    psnr_db, used = [], np.zeros(model.quantize.n_e, np.int64)
    with torch.inference_mode():
        for batch in batches(pictures, device):
            quantised, ids = nearest(model, model.encode(batch).latents)
            decoded = decode_latents(model, quantised)
            psnr_db.append(psnr(decoded.clamp(0, 1), batch))
            used += np.bincount(ids.flatten().cpu().numpy(), minlength=len(used))
    return torch.cat(psnr_db), used


def describe_vqgan(model: Any, validation: Tensor) -> str:
    """Return the validation PSNR and the share of the codebook in use, in one line."""
    psnr_db, used = reconstruct_vqgan(model, validation)
    return f"held-out PSNR {float(psnr_db.mean()):.2f} dB through tokens, {np.mean(used > 0):.0%} of the codes in use"


def batches(pictures: Tensor, device: torch.device, size: int = 64) -> Iterable[Tensor]:
    """Yield ``pictures`` uint8 [n, h, w, 3] as float [<= size, 3, h, w] in [0, 1], in order."""
    for chunk in pictures.split(size):
        yield chunk.to(device).permute(0, 3, 1, 2).float() / 255
