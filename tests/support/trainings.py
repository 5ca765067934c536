"""A training small enough for a second: 2 layers of width 32, sentences of 96 tokens, random chains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from covray.chains.dataset import ChainDataset
from covray.config import LoraConfig, TrainConfig, load_config
from covray.io import storage
from covray.models.lvm.adapter import load_adapter_tensors, read_adapter, save_adapter
from covray.models.lvm.backbone import backbone_facts, load_backbone
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.model import Lvm
from covray.training.metrics_log import read_metrics
from covray.training.run import train
from covray.training.worker import Signal, WorkerContext
from tests.support.backbones import CPU, load
from tests.support.datasets import CODES, TOKENS

STEPS = 6


@pytest.fixture
def tiny_config(
    tmp_path: Path, write_dataset: Callable[..., tuple[str, list[dict[str, Any]]]]
) -> Callable[..., TrainConfig]:
    """Gives resolved configurations of the same tiny training, with dotted keys on top (``out`` by name)."""
    data, _ = write_dataset({"depth": 12, "edges": 12}, lengths=(3,))
    folder = tmp_path / "backbone"
    LlamaConfig(
        vocab_size=CODES + 100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, initializer_range=0.2,
    ).save_pretrained(folder)  # fmt: skip

    def config(out: str = "run", **changes: Any) -> TrainConfig:
        options = {
            "data": data,
            "out": str(tmp_path / out),
            "backbone.scale": "custom",
            "backbone.path": str(folder),
            "backbone.init": "random",
            "lora.rank": 4,
            "sentences.lengths": [3],
            "optimizer.steps": STEPS,
            "optimizer.learning_rate": 1e-2,
            "optimizer.batch_tokens": 5 * 96,
            "optimizer.micro_batch_tokens": 2 * 96,
            "compute.device": "cpu",
            "compute.dtype": "float32",
            "compute.deepspeed": "none",
            "compute.threads": 1,
            "checkpoints.every_steps": 2,
            "validate_every_steps": 3,
            "tracking.uri": "none",
        }
        return load_config(
            TrainConfig, None, options | {key.replace("__", "."): value for key, value in changes.items()}
        )

    return config


def curve(config: TrainConfig) -> list[dict[str, Any]]:
    """The records of a run without what depends on the machine: all that must be the same in two runs."""
    records = read_metrics(f"{config.out}/metrics.jsonl")
    timed = ("seconds", "tokens_per_s", "memory_bytes")
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


@pytest.fixture
def poll_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training asks for signals before every step, not once in so many seconds."""
    monkeypatch.setattr("covray.training.trainer._POLL_SIGNAL_EVERY_S", -1.0)


def stop_after(config: TrainConfig, steps: int) -> None:
    """Train ``steps`` steps, as a run that is asked to stop; it needs ``poll_every_step``."""
    signals = iter([Signal.CONTINUE] * (steps - 1) + [Signal.STOP])
    assert train(config, WorkerContext(poll_signal=lambda: next(signals))) is None


def require_same_after_a_stop(whole: TrainConfig, stopped: TrainConfig, weights: str) -> None:
    """Train ``whole`` undisturbed and ``stopped`` with a stop: losses and the adapter's file ``weights`` are the same.

    It needs ``poll_every_step``.
    """
    train(whole)
    stop_after(stopped, 3)
    train(stopped)
    assert curve(whole) == curve(stopped), "to the bit"
    adapters = [Path(run.out, "adapter", weights).read_bytes() for run in (whole, stopped)]
    assert adapters[0] == adapters[1]


def model_of(config: TrainConfig) -> Lvm:
    """The backbone of a finished run with the adapter that it wrote."""
    lora, tensors = read_adapter(f"{config.out}/adapter")
    facts = backbone_facts(config.backbone)
    model = load_backbone(facts, config.backbone, lora, dtype=torch.float32, device=CPU, seed=config.seed)
    load_adapter_tensors(model, tensors)
    return model


def decoder_of(config: TrainConfig) -> LvmDecoder:
    """A decoder of a finished run."""
    return LvmDecoder(model_of(config), CODES, TOKENS, batch=2)


def write_finished_run(run: str, data: str, backbone: Path, lora: LoraConfig, sentences: Mapping[str, Any]) -> str:
    """Write the folder of a finished run, with an adapter that changes what the tiny backbone says; return it.

    Args:
        run: The folder.
        data: Dataset that it was trained on.
        backbone: Folder of a tiny LLaMA.
        lora: Rank and alpha.
        sentences: Settings of the sentences.
    """
    options = {f"sentences.{key}": value for key, value in sentences.items()}
    options |= {"backbone.scale": "custom", "backbone.path": str(backbone)}
    options |= {"lora.rank": lora.rank, "lora.alpha": lora.alpha}
    config = load_config(TrainConfig, None, {"data": data, "out": run} | options)
    fingerprints = {
        "backbone": backbone_facts(config.backbone).fingerprint,
        "codebook": ChainDataset(data).fingerprints["codebook"],
        "data": "",
    }
    about = {"version": 1, "config": config.model_dump(mode="json"), "fingerprints": fingerprints}
    storage.write_json(f"{run}/_run.json", about)
    storage.write_json(f"{run}/_result.json", {})
    save_adapter(load(backbone, lora), f"{run}/adapter", str(backbone))
    return run
