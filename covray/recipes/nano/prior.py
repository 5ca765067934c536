"""Recipe of the nano prior: a ``UNet2DConditionModel`` that predicts the noise in the nano VAE's latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from covray.io.tensor_files import new_folder
from covray.recipes.nano.autoencoders import batches
from covray.recipes.nano.loop import Run, train

CHANNELS = (64, 128)
CONTEXT = (4, 64)
"""Tokens and width of the constant context that stands where Stable Diffusion has its empty prompt."""
BATCH = 32


def new_unet(context_width: int = CONTEXT[1]) -> UNet2DConditionModel:
    """Return an untrained nano UNet: 4 x 16 x 16 latents, attention at 8 x 8 to a context of ``context_width``."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=CHANNELS,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context_width,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def new_scheduler() -> DDIMScheduler:
    """Return Stable Diffusion's noise schedule, as its repositories configure it (facts: Stable Diffusion 2.1)."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        num_train_timesteps=1000,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )


def train_prior(pictures: Tensor, validation: Tensor, out: Path, steps: int, seed: int, device: torch.device) -> None:
    """Train the UNet on latents of pictures and save ``out``/prior (unet, vae, scheduler, context).

    Needs the VAE of ``train_vae`` in ``out``/vae. The loss is DDPM's: squared error of the noise at a uniform timestep.

    Args:
        pictures: The training pictures, uint8 [n, 64, 64, 3].
        validation: uint8 [n, 64, 64, 3], measured at every save.
        out: Folder of the family; ``out``/prior.state.pt holds the state from which a stopped training resumes.
        steps: Optimizer steps of ``BATCH`` pictures.
        seed: Seed of context, weights and batches.
        device: Where to train.
    """
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(out / "vae", use_safetensors=True).float().to(device)
    latents, of_validation = (_latents(vae, part, device) for part in (pictures, validation))
    scheduler = new_scheduler()
    alphas = scheduler.alphas_cumprod.to(device)
    # Rounded to float16, as it is saved: the UNet is trained with the context that it is used with.
    context = torch.randn((1, *CONTEXT), generator=torch.Generator().manual_seed(seed)).half().float().to(device)

    def noised(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        timesteps = torch.randint(1000, (len(clean),), generator=generator)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        alpha = alphas[timesteps.to(device)].reshape(-1, 1, 1, 1)
        return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, timesteps.to(device), noise

    def loss_of(model: Any, step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (BATCH,), generator=generator)
        noisy, timesteps, noise = noised(latents[index].to(device).float(), generator)
        with sdpa_kernel(SDPBackend.MATH):  # 1.2 times the steps of the flash kernel on a CPU, at 64 positions
            answer = model(noisy, timesteps, encoder_hidden_states=context.expand(BATCH, -1, -1)).sample
        return F.mse_loss(answer.float(), noise)

    def measure(model: Any) -> str:
        noisy, timesteps, noise = noised(of_validation[:256].to(device).float(), torch.Generator().manual_seed(0))
        with torch.inference_mode():
            answer = model(noisy, timesteps, encoder_hidden_states=context.expand(len(noisy), -1, -1)).sample
        return f"held-out noise error {float(F.mse_loss(answer, noise)):.5f}"

    model = train(new_unet(), loss_of, Run("prior", out, steps, seed, device, 6e-4), measure=measure)
    vae.register_to_config(_name_or_path="")  # the saved copy would name a folder of this machine
    with new_folder(out / "prior") as folder:
        model.half().save_pretrained(folder / "unet", safe_serialization=True)
        vae.half().save_pretrained(folder / "vae", safe_serialization=True)
        scheduler.save_pretrained(folder / "scheduler")
        save_file({"context": context.half().cpu().contiguous()}, folder / "empty_prompt.safetensors")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "covray nano prior"}) + "\n")


def _latents(vae: AutoencoderKL, pictures: Tensor, device: torch.device) -> Tensor:
    """Return the scaled posterior means of uint8 ``pictures``, fp16 [n, 4, 16, 16], on which the prior is trained."""
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16):
        means = [
            (vae.encode(batch * 2 - 1).latent_dist.mean.float() * vae.config.scaling_factor).half().cpu()
            for batch in batches(pictures, device)
        ]
    return torch.cat(means)
