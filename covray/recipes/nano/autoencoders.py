"""Recipes of the nano VAE (``AutoencoderKL``) and the nano VQGAN (``VQModel``)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn

from covray.recipes.nano.data import CROPS, Pictures
from covray.recipes.nano.loop import Run, draw, psnr, train
from covray.recipes.nano.patches import PatchEncoder, write_encoder

VAE_CHANNELS = (32, 64, 64)
VQGAN_CHANNELS = (24, 64, 96)
CODES = 2048
CODE_WIDTH = 8
VQGAN_BATCH = 16
NORM_GROUPS = 8
CODEBOOK_BATCHES = 64
"""Batches of 64 pictures whose latents the codebook's k-means sees: 512 latents a code."""
UNQUANTISED_SHARE = 0.3
READER_WIDTH = 128
READER_LOSS = 0.2
READ_KINDS = ("colour", "segmentation", "pose", "normals", "edges", "depth")
"""What ``SceneReader`` predicts; a grey or dark input has the colour picture as its label."""


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
        new_vae(), loss_of, Run("vae", out, steps, seed, device, 1e-3),
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
    """Return an untrained nano VQGAN: 64 px to 16 x 16 tokens of a codebook."""
    levels = len(VQGAN_CHANNELS)
    return VQModel(
        block_out_channels=VQGAN_CHANNELS,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=CODE_WIDTH,
        vq_embed_dim=CODE_WIDTH,
        num_vq_embeddings=CODES,
        layers_per_block=1,
        norm_num_groups=NORM_GROUPS,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
        sample_size=64,
    )


class SceneReader(nn.Module):
    """Predict a scene's colour picture and its five labels from the latents of one of its inputs.

    It is trained beside the VQGAN and then discarded. Reconstruction alone spends the few bits of a cell on brightness;
    what the answers are made of (which object, which way a surface faces, where it ends) changes few pixels and is lost
    in the quantisation. A loss on the labels, read from the codes by a small network, keeps it in the codes.
    """

    def __init__(self, width: int, cell_px: int) -> None:
        """Make an untrained reader.

        Args:
            width: Channels of the latents.
            cell_px: Side of the cell of the picture that one latent stands for, in pixels.
        """
        super().__init__()
        hidden = READER_WIDTH
        self.cell_px = cell_px
        self.first = nn.Conv2d(width, hidden, 3, padding=1)
        self.middle = nn.ModuleList(nn.Conv2d(hidden, hidden, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(hidden, len(READ_KINDS) * 3 * cell_px**2, 1)

    def forward(self, latents: Tensor) -> Tensor:
        """Latents [n, width, h, w] -> pictures in [0, 1] [n, kinds, 3, h * cell_px, w * cell_px]."""
        x = F.silu(self.first(latents))
        for layer in self.middle:
            x = x + F.silu(layer(x))
        pictures = F.pixel_shuffle(self.last(x), self.cell_px)
        return pictures.unflatten(1, (len(READ_KINDS), 3))


class TokenizerTraining(nn.Module):
    """The VQGAN, the encoder that is written into it at the end, and the reader that is trained beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.vqgan = new_vqgan()
        self.encoder = PatchEncoder(VQGAN_CHANNELS[-1], NORM_GROUPS, CODE_WIDTH)
        for unused in (self.vqgan.encoder, self.vqgan.quant_conv):
            unused.requires_grad_(False)
        self.reader = SceneReader(CODE_WIDTH, 2 ** (len(VQGAN_CHANNELS) - 1))

    def finished(self) -> VQModel:
        """Return the VQGAN with the encoder as it is now."""
        write_encoder(self.encoder, self.vqgan)
        return self.vqgan


def train_vqgan(pictures: Tensor, validation: Tensor, out: Path, steps: int, seed: int, device: torch.device) -> None:
    """Train the VQGAN and save it as ``out``/vqgan.

    A plain VQ of this size collapses to a few codes. So the first third of the steps is without quantisation (latents
    are kept near the unit ball, with a little noise, so that they cluster), then the codebook is set by mini-batch
    k-means on the latents, and the remaining steps are with quantisation, straight through, codebook and encoder drawn
    to each other (van den Oord et al. 2017). The loss of ``SceneReader`` is added wherever a picture is the input of a
    task.

    Args:
        pictures: The training pictures, uint8 [scenes * 8 + CROPS * 3, 64, 64, 3], of ``covray.recipes.nano.data``.
        validation: uint8 [n, 64, 64, 3], measured at every save.
        out: Folder of the family; ``out``/vqgan.state.pt keeps the state of a training that was stopped.
        steps: Optimizer steps of ``VQGAN_BATCH`` pictures.
        seed: Seed of weights and batches.
        device: Where to train.
    """
    torch.manual_seed(seed)
    quantised_from = int(steps * UNQUANTISED_SHARE)
    corpus = Pictures.of(pictures.numpy(), CROPS)

    def loss_of(model: TokenizerTraining, step: int, generator: torch.Generator) -> Tensor:
        pixels, labels = corpus.batch(VQGAN_BATCH, generator, device)
        latents = model.encoder(pixels)
        if step < quantised_from:
            pull = 0.2 * (latents.abs() - 1).clamp_min(0).square().mean()
            through = latents + 0.05 * torch.randn(latents.shape, generator=generator).to(device)
        else:
            quantised, _ = nearest(model.vqgan, latents)
            codebook_loss = (quantised - latents.detach()).square().mean()
            pull = codebook_loss + 0.25 * (quantised.detach() - latents).square().mean()
            through = latents + (quantised - latents).detach()
        decoded = decode_latents(model.vqgan, through)
        inputs = len(labels)  # the batch begins with the pictures that are inputs of a task
        read = model.reader(through[:inputs])
        return (
            (decoded.float() - pixels).square().mean()
            + 0.05 * pull
            + READER_LOSS * (read.float() - labels).square().mean()
        )

    def on_step(model: TokenizerTraining, step: int) -> None:
        if step == quantised_from:
            model.vqgan.quantize.embedding.weight.data.copy_(_codebook(model.encoder, corpus, seed, device))

    model = train(
        TokenizerTraining(), loss_of, Run("vqgan", out, steps, seed, device, 1e-3), on_step=on_step,
        measure=lambda average: describe_vqgan(average.finished(), validation),
    )  # fmt: skip
    model.finished().half().save_pretrained(out / "vqgan", safe_serialization=True)


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


def _codebook(encoder: PatchEncoder, corpus: Pictures, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents = []
    with torch.inference_mode():
        for _ in range(CODEBOOK_BATCHES):
            encoded = encoder(corpus.batch(64, generator, device)[0])
            latents.append(encoded.permute(0, 2, 3, 1).reshape(-1, CODE_WIDTH).float().cpu())
    clusters = MiniBatchKMeans(CODES, random_state=seed, batch_size=8192, n_init=1, max_iter=30, reassignment_ratio=0.0)
    return torch.from_numpy(clusters.fit(torch.cat(latents).numpy()).cluster_centers_).float()
