"""Tiny LLaMA folders in the layout of LVM: the right parts, no training, and the end of sequence where LVM has it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from covray.config import BackboneConfig, LoraConfig
from covray.models.lvm.backbone import backbone_facts, load_backbone
from covray.models.lvm.lora import Lora
from covray.models.lvm.model import Batch, Lvm

CODES = 64
CPU = torch.device("cpu")


def write_llama(folder: Path, *, dtype: torch.dtype = torch.float32, shard_size: str = "1GB", **sizes: Any) -> Path:
    """A ``LlamaForCausalLM`` folder with random weights: 2 layers, hidden 64, 64 codes and 100 special ids.

    Weights are large enough for attention to matter, norms are not all 1. Id 2 ends sequences, as in LVM's folders.
    """
    shape: dict[str, Any] = {
        "vocab_size": CODES + 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)  # transformers initialises from the global generator only
        model = LlamaForCausalLM(LlamaConfig(**shape | sizes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # norms start at 1, biases at 0
                    parameter.add_(torch.rand(parameter.shape) - 0.5)
                assert parameter.isfinite().all(), name
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def load(
    folder: Path | str,
    lora: LoraConfig | Lora | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    recompute: bool = False,
    warm: bool = True,
) -> Lvm:
    """The folder as an ``Lvm`` on the CPU; ``warm``: with B other than zero, so that the adapter changes something."""
    config = BackboneConfig(scale="custom", path=str(folder))
    model = load_backbone(backbone_facts(config), config, lora, dtype=dtype, device=CPU, seed=seed, recompute=recompute)
    if warm:
        generator = torch.Generator().manual_seed(1)
        for name, tensor in model.lora_tensors().items():
            if name.endswith("lora_B"):
                tensor.normal_(0.0, 0.1, generator=generator)
    return model


def random_batch(*lengths: int, seed: int = 0) -> Batch:
    """Sentences of random codes, loss on all that have a predecessor."""
    ids = torch.randint(CODES, (sum(lengths),), generator=torch.Generator().manual_seed(seed))
    starts = torch.tensor((0, *lengths)).cumsum(0).tolist()
    places = [torch.arange(start, start + length - 1) for start, length in zip(starts, lengths, strict=False)]
    return Batch(ids, lengths, torch.cat(places))


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny folder; one for the whole session, not to be changed."""
    return write_llama(tmp_path_factory.mktemp("llama"))
