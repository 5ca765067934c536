"""A backbone with its adapter, loaded once, and what computes with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from covray.chains.build import BlockBuilder
from covray.config import BackboneConfig, BuildConfig, EngineConfig, TokenizerConfig
from covray.io.device import resolve_device
from covray.models.lvm.adapter import load_adapter_tensors
from covray.models.lvm.backbone import BackboneFacts, load_backbone
from covray.models.lvm.decoding.base import Decoder
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.decoding.reader import MergedWeights
from covray.models.lvm.lora import Lora
from covray.models.lvm.model import Batch, Lvm
from covray.models.tokenizer.vqgan import Tokenizer, load_tokenizer

Adapter = tuple[Lora, dict[str, Tensor]]
"""What ``read_adapter`` returns: rank, alpha and targets, and the tensors by their names in the file."""


@dataclass(frozen=True)
class ModelSource:
    """What a model is loaded from."""

    facts: BackboneFacts
    backbone: BackboneConfig
    adapter: Adapter | None
    """None: the backbone as it is."""
    seed: int
    """Of a backbone with random weights."""

    @property
    def lora(self) -> Lora | None:
        """What the adapter is; None without one."""
        if self.adapter is None:
            return None
        return self.adapter[0]


@dataclass(frozen=True, eq=False)
class SharedBackbone:
    """A backbone that several adapters of a process use."""

    model: Lvm
    """With the adapter that was the first."""
    merged: MergedWeights = field(default_factory=MergedWeights)
    """Weights with one of the adapters merged in, where the decoder merges it."""


@dataclass(frozen=True, eq=False)
class SharedModels:
    """Models that several generators of one process, and of one thread, use: each is loaded once."""

    backbones: dict[tuple[object, ...], SharedBackbone] = field(default_factory=dict)
    """By fingerprint, seed, device and type of the weights."""
    tokenizers: dict[str, Tokenizer] = field(default_factory=dict)
    """By configuration."""
    builders: dict[str, BlockBuilder] = field(default_factory=dict)
    """What makes chains of examples, by configuration."""

    def tokenizer(self, config: TokenizerConfig, engine: EngineConfig) -> Tokenizer:
        """Return a tokenizer. Raises WeightsError where it cannot be loaded."""
        key = config.model_dump_json() + engine.model_dump_json()
        if key not in self.tokenizers:
            self.tokenizers[key] = load_tokenizer(config, engine)
        return self.tokenizers[key]

    def builder(self, config: BuildConfig, tokenizer: Tokenizer) -> BlockBuilder:
        """Return what makes chains of examples, with the prior where they have frames by it. Raises WeightsError."""
        key = config.model_dump_json()
        if key not in self.builders:
            self.builders[key] = BlockBuilder(config)
            self.builders[key].tokenizer = tokenizer  # the same weights: they are kept once
        return self.builders[key]


class LoadedModel:
    """A model, and the decoder that writes with it."""

    def __init__(self, model: Lvm, decoder: Decoder):
        self.model, self.decoder = model, decoder

    @classmethod
    def load(
        cls, source: ModelSource, engine: EngineConfig, tokenizer: Tokenizer, batch: int,
        shared: SharedModels | None = None,
    ) -> LoadedModel:  # fmt: skip
        """Load the backbone with its adapter.

        Args:
            source: Backbone and adapter.
            engine: Device and type of the weights.
            tokenizer: Whose codes are written.
            batch: Rows of the decoder's fixed, padded batch.
            shared: Models that others of this process have loaded, and that they share with this one.

        Raises:
            WeightsError: A file cannot be read, or the adapter is of another backbone.
            ConfigError: The device is not there.
        """
        device, dtype = resolve_device(engine)
        key = (source.facts.fingerprint, source.seed, device, dtype)
        beside: SharedBackbone | None = None
        first: Lvm | None = None
        if shared is not None and key in shared.backbones:
            # The frozen weights are those of the model that was loaded first: only the adapter takes memory again.
            beside = shared.backbones[key]
            first = beside.model
        model = load_backbone(
            source.facts, source.backbone, source.lora, dtype=dtype, device=device, seed=source.seed, beside=first
        )
        if shared is not None and beside is None:
            beside = shared.backbones[key] = SharedBackbone(model)
        if source.adapter is not None:
            load_adapter_tensors(model, source.adapter[1])
        merged: MergedWeights | None = None
        if beside is not None:
            # One buffer for all adapters: the decoder merges the one that writes into it.
            merged = beside.merged
        decoder = LvmDecoder(model, tokenizer.codes, tokenizer.tokens_per_image, batch, tokenizer.codebook, merged)
        return cls(model, decoder)

    @torch.inference_mode()
    def answer_nats(self, before: np.ndarray, answer: np.ndarray) -> float:
        """Return the mean negative log likelihood of ``answer`` after ``before`` in nats a token.

        Its exponent is the perplexity.

        Args:
            before: Ids of the sentence up to the answer, [n].
            answer: Ids [tokens per image].
        """
        ids = torch.from_numpy(np.concatenate([before, answer]).astype(np.int64))
        positions = torch.arange(len(before) - 1, len(ids) - 1)
        # Alone: another batch would be another order of additions.
        batch = Batch(ids, (len(ids),), positions).to(self.model.embed.weight.device)
        _, each = self.model(batch)
        return float(each.double().mean())
