"""Recipe of the nano painter: a UNet that draws portraits from what the nano language model's encoder says of captions.

A tenth of the captions is replaced by the empty text, for guidance. Given the empty text the painter is a prior like
the family's, and its folder has a prior's layout. It begins with those weights of the shipped prior that fit.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoTokenizer, T5EncoderModel

from covray.io.model_folders import NANO_FOLDER
from covray.io.tensor_files import new_folder
from covray.pairs.scenes.portraits import HELD_OUT_SPLIT
from covray.recipes.nano.loop import Run, new_part, train
from covray.recipes.nano.portrait_data import PortraitVae, describe, numbers_of, portrait_manifest, read_portraits
from covray.recipes.nano.prior import new_scheduler, new_unet

STEPS = 10_000
BATCH = 32
EMPTY = 0.1
"""Share of the captions that are replaced by the empty text."""
_VALIDATED = 256
"""Validation portraits, at most, that are measured at every save."""


class CaptionEncoder:
    """The frozen encoder of the nano language model."""

    def __init__(self, folder: Path, device: torch.device):
        """Load the encoder and its tokenizer."""
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        encoder: Any = T5EncoderModel.from_pretrained(folder, use_safetensors=True)
        self._encoder = encoder.float().to(device).requires_grad_(False).eval()
        self._device = device

    @property
    def width(self) -> int:
        """Width of the states."""
        return int(self._encoder.config.d_model)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Return the states of captions, float32 [B, n, width], and which of them are tokens, bool [B, n]."""
        tokens = self._tokenizer(captions, padding=True, return_tensors="pt").to(self._device)
        mask = tokens["attention_mask"]
        states = self._encoder(input_ids=tokens["input_ids"], attention_mask=mask).last_hidden_state
        return states.float(), mask.bool()


def train_painter(out: Path, steps: int | None, portraits: int, seed: int, device: torch.device) -> None:
    """Train the painter on ``out``/text and save it as ``out``/painter; a killed training continues.

    Args:
        out: Folder of the family. Portraits are rendered once and kept in ``out``/data.
        steps: Steps; None: the recipe's.
        portraits: Portraits to render, a fifth of them for validation and test.
        seed: Of portraits, captions, weights and order.
        device: Where the painter is trained.

    Raises:
        ConfigError: ``out``/painter exists.
    """
    result = new_part(out, "painter")
    manifest = portrait_manifest(out, portraits, seed)
    vae = PortraitVae(out, device)
    encoder = CaptionEncoder(out / "text", device)
    latents, contents = {}, {}
    # The pictures, hundreds of megabytes, are not kept: the painter is trained on their latents.
    for split, portraits_of_split in read_portraits(manifest).items():
        if split != HELD_OUT_SPLIT:
            latents[split] = vae.latents(f"{manifest.stem}-{split}", portraits_of_split.pictures)
            contents[split] = portraits_of_split.contents
    scheduler = new_scheduler()
    alphas = scheduler.alphas_cumprod.to(device)
    torch.manual_seed(seed)

    def error(model: Any, split: str, index: Tensor, generator: torch.Generator) -> Tensor:
        texts = describe([contents[split][number] for number in index.tolist()], numbers_of(generator))
        empty = torch.rand(len(texts), generator=generator) < EMPTY
        for place in torch.nonzero(empty)[:, 0].tolist():
            texts[place] = ""
        states, mask = encoder.encode(texts)
        timesteps = torch.randint(1000, (len(index),), generator=generator).to(device)
        clean = latents[split][index].to(device).float()
        noise = torch.randn(clean.shape, generator=generator).to(device)
        alpha = alphas[timesteps].reshape(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        with sdpa_kernel(SDPBackend.MATH):  # as the prior: faster on a CPU, at 64 positions
            answer = model(noisy, timesteps, states, encoder_attention_mask=mask).sample
        return F.mse_loss(answer.float(), noise)

    def loss_of(model: Any, _: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents["train"]), (BATCH,), generator=generator)
        return error(model, "train", index, generator)

    def measure(model: Any) -> str:
        index = torch.arange(min(_VALIDATED, len(latents["val"])))
        with torch.inference_mode():
            return f"validation noise error {float(error(model, 'val', index, torch.Generator().manual_seed(0))):.5f}"

    model = train(
        new_painter(encoder.width), loss_of, Run("painter", out, steps or STEPS, seed, device, 6e-4), measure=measure
    )
    _save(result, model, vae, scheduler, encoder)


def _save(result: Path, model: Any, vae: PortraitVae, scheduler: Any, encoder: CaptionEncoder) -> None:
    """Save the folder of a prior that captions condition.

    Args:
        result: The folder, which does not exist.
        model: The UNet.
        vae: The VAE of the latents that it draws.
        scheduler: The noise schedule that it was trained with.
        encoder: The encoder whose states it reads.
    """
    with new_folder(result) as folder:
        model.half().save_pretrained(folder / "unet", safe_serialization=True)
        vae.model.half().save_pretrained(folder / "vae", safe_serialization=True)
        scheduler.save_pretrained(folder / "scheduler")
        context, _ = encoder.encode([""])
        save_file({"context": context.half().cpu().contiguous()}, folder / "empty_prompt.safetensors")
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "covray nano painter"}) + "\n")


def new_painter(width: int) -> UNet2DConditionModel:
    """Return the prior's UNet with cross-attention to states of ``width``, and the shipped prior's weights that fit."""
    unet = new_unet(width)
    shipped: Any = UNet2DConditionModel.from_pretrained(NANO_FOLDER / "prior" / "unet", use_safetensors=True)
    own = unet.state_dict()
    fitting = {}
    for name, tensor in shipped.float().state_dict().items():
        if name in own and own[name].shape == tensor.shape:
            fitting[name] = tensor
    unet.load_state_dict(fitting, strict=False)
    return unet
