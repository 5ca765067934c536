"""Recipe of the nano CLIP: a picture tower and a text tower that learn which caption belongs to which portrait.

ThinkDiff-CLIP reads the picture tower's patches; both towers together check the judge's verdicts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from covray.io.tensor_files import new_folder
from covray.recipes.nano.loop import Run, new_part, train
from covray.recipes.nano.portrait_data import (
    SIZE_PX,
    Portraits,
    describe,
    numbers_of,
    portrait_manifest,
    read_portraits,
)

STEPS = 2500
BATCH = 128
PATCH_PX = 8
VISION_WIDTH, VISION_LAYERS, VISION_HEADS = 192, 5, 4
TEXT_WIDTH, TEXT_LAYERS, TEXT_HEADS = 128, 4, 4
SHARED_WIDTH = 128
TEXT_TOKENS = 80
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def train_clip(out: Path, steps: int | None, portraits: int, seed: int, device: torch.device) -> None:
    """Train both towers and save them as ``out``/clip, with the tokenizer of ``out``/text; a killed training continues.

    Args:
        out: Folder of the family. Portraits are rendered once and kept in ``out``/data.
        steps: Steps; None: the recipe's.
        portraits: Portraits to render, a fifth of them for validation and test.
        seed: Of portraits, captions, weights and order.
        device: Where the model is trained.

    Raises:
        ConfigError: ``out``/clip exists.
    """
    result = new_part(out, "clip")
    parts = read_portraits(portrait_manifest(out, portraits, seed))
    tokenizer = AutoTokenizer.from_pretrained(out / "text")
    torch.manual_seed(seed)

    def similarities(model: Any, own: Portraits, index: Tensor, generator: torch.Generator) -> Any:
        captions = describe([own.contents[number] for number in index.tolist()], numbers_of(generator))
        texts = tokenizer(captions, padding=True, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt").to(
            device
        )
        pixels = normed(own.pictures[index.numpy()]).to(device)
        return model(
            pixel_values=pixels, input_ids=texts["input_ids"], attention_mask=texts["attention_mask"], return_loss=True
        )

    def loss_of(model: Any, _: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(parts["train"].contents), (BATCH,), generator=generator)
        loss: Tensor = similarities(model, parts["train"], index, generator).loss.float()
        return loss

    def measure(model: Any) -> str:
        index = torch.arange(min(BATCH, len(parts["val"].contents)))
        model.eval()
        with torch.inference_mode():
            logits = similarities(model, parts["val"], index, torch.Generator().manual_seed(0)).logits_per_image
        right = (logits.argmax(1).cpu() == index).float().mean()
        return f"{float(right):.2f} of {len(index)} validation pictures find their captions"

    model = train(
        CLIPModel(new_config(tokenizer)), loss_of, Run("clip", out, steps or STEPS, seed, device, 1e-3), measure=measure
    )
    with new_folder(result) as folder:
        model.half().save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
        new_image_processor().save_pretrained(folder)


def new_config(tokenizer: Any) -> CLIPConfig:
    """Return the architecture: 64 patches and a class token a picture; a text is represented by its end token."""
    vision = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 4 * VISION_WIDTH,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": VISION_HEADS,
        "image_size": SIZE_PX,
        "patch_size": PATCH_PX,
        "projection_dim": SHARED_WIDTH,
    }
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 4 * TEXT_WIDTH,
        "num_hidden_layers": TEXT_LAYERS,
        "num_attention_heads": TEXT_HEADS,
        "max_position_embeddings": TEXT_TOKENS,
        "projection_dim": SHARED_WIDTH,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=SHARED_WIDTH)


def new_image_processor() -> CLIPImageProcessorPil:
    """Return the image processor, on Pillow."""
    side = {"height": SIZE_PX, "width": SIZE_PX}
    return CLIPImageProcessorPil(size=side, crop_size=side, image_mean=list(MEAN), image_std=list(STD))


def normed(pictures: NDArray[np.uint8]) -> Tensor:
    """Return pixels as the image processor returns them, float [n, 3, h, w], of uint8 [n, h, w, 3]."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]
