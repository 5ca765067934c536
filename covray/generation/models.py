"""A backbone with its adapter, loaded once, and what computes with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from covray.config import BackboneConfig, EngineConfig
from covray.io.device import resolve_device
from covray.models.lvm.adapter import load_adapter_tensors
from covray.models.lvm.backbone import BackboneFacts, load_backbone
from covray.models.lvm.decoding.base import Decoder
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.model import Batch, Lora, Lvm
from covray.models.tokenizer.vqgan import Tokenizer

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


class LoadedModel:
    """A model, and the decoder that writes with it."""

    def __init__(self, model: Lvm, decoder: Decoder):
        self.model, self.decoder = model, decoder

    @classmethod
    def load(cls, source: ModelSource, engine: EngineConfig, tokenizer: Tokenizer, batch: int) -> LoadedModel:
        """Load the backbone with its adapter.

        Args:
            source: Backbone and adapter.
            engine: Device and type of the weights.
            tokenizer: Whose codes are written.
            batch: Rows of the decoder's fixed, padded batch.

        Raises:
            WeightsError: A file cannot be read, or the adapter is of another backbone.
            ConfigError: The device is not there.
        """
        device, dtype = resolve_device(engine)
        lora = None if source.adapter is None else source.adapter[0]
        model = load_backbone(source.facts, source.backbone, lora, dtype=dtype, device=device, seed=source.seed)
        if source.adapter is not None:
            load_adapter_tensors(model, source.adapter[1])
        decoder = LvmDecoder(model, tokenizer.codes, tokenizer.tokens_per_image, batch, tokenizer.codebook)
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
