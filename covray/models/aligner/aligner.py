"""The aligner: linear, GELU, linear and T5's RMSNorm; written and read as safetensors beside a JSON file.

The norm starts as the final norm of the language model's encoder, so that aligned features begin on the scale of that
encoder's outputs (arXiv:2502.10458, section 3.3). It is trained with the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5LayerNorm

from covray.errors import WeightsError
from covray.io.tensor_files import new_folder, read_tensors, require_finite, require_tensors
from covray.models.aligner.records import AlignerRecord, Norm

WEIGHTS = "aligner.safetensors"
_SHOWN = 12
"""Digits of a fingerprint in a message."""


@dataclass(frozen=True)
class Aligner:
    """An aligner and what is known of it."""

    network: nn.Sequential
    """[..., input_width] to [..., width], in float32."""
    record: AlignerRecord

    def require_fit(self, where: str, *, vlm: str | None = None, language_model: str | None = None) -> None:
        """Refuse models that the aligner was not trained between.

        Args:
            where: The aligner's folder, for the message.
            vlm: Fingerprint of the vision-language model at hand; None: not checked.
            language_model: Fingerprint of the language model at hand; None: not checked.

        Raises:
            WeightsError: A fingerprint differs from the recorded one.
        """
        models = (
            ("vision-language model", self.record.vlm, vlm),
            ("language model", self.record.language_model, language_model),
        )
        for name, recorded, given in models:
            if recorded is not None and given is not None and recorded != given:
                raise WeightsError(
                    f"{where}: was trained with the {name} {recorded[:_SHOWN]}, not with {given[:_SHOWN]}; give the "
                    f"{name} that it was trained with"
                )


def new_aligner(
    input_width: int,
    language_model: Any,
    norm: Norm,
    seed: int,
    *,
    vlm_fingerprint: str | None = None,
    language_fingerprint: str | None = None,
) -> Aligner:
    """Return an untrained aligner.

    Args:
        input_width: Width of the features.
        language_model: A ``T5ForConditionalGeneration``; its encoder's final norm is copied to the bit.
        norm: What the aligner ends with.
        seed: Of the linear layers' initial weights, which are PyTorch's.
        vlm_fingerprint: Fingerprint of the vision-language model, for the record.
        language_fingerprint: Fingerprint of the language model, for the record.
    """
    record = AlignerRecord(
        input_width=input_width,
        width=int(language_model.config.d_model),
        norm=norm,
        epsilon=float(language_model.config.layer_norm_epsilon),
        vlm=vlm_fingerprint,
        language_model=language_fingerprint,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # nn.Linear draws from the global generator only
        network = _network(record)
    if norm == "encoder":
        last: Any = network[-1]
        with torch.no_grad():
            last.weight.copy_(language_model.encoder.final_layer_norm.weight)
    return Aligner(network, record)


def save_aligner(out: Path, aligner: Aligner) -> None:
    """Write the folder of an aligner, whole or not at all. Raises ConfigError for an ``out`` that exists."""
    with new_folder(out) as draft:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in aligner.network.state_dict().items()}
        save_file(tensors, draft / WEIGHTS)
        aligner.record.write(str(draft))


def load_aligner(folder: Path, device: torch.device) -> Aligner:
    """Return the aligner of a folder, in float32 on ``device``.

    Raises:
        WeightsError: A file is missing, cannot be read, or does not fit the other.
    """
    record = AlignerRecord.read(str(folder))
    file = folder / WEIGHTS
    return aligner_of(record, read_tensors(file), file, device)


def aligner_of(record: AlignerRecord, tensors: dict[str, Tensor], where: Path, device: torch.device) -> Aligner:
    """Return the aligner that ``tensors`` are of.

    Args:
        record: What it is.
        tensors: By the names of ``network.state_dict()``.
        where: The file of the tensors, for messages.
        device: Where the network is put.

    Raises:
        WeightsError: Tensors are missing, unexpected, of other shapes, no floats, or not finite.
    """
    with torch.device("meta"):
        network = _network(record)
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    require_tensors(where, shapes, expected)
    values = {}
    for name, tensor in tensors.items():
        values[name] = require_finite(where, name, tensor).to(device, torch.float32, copy=True)
    network.load_state_dict(values, assign=True)
    return Aligner(network, record)


def _network(record: AlignerRecord) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Linear(record.input_width, record.width),
        nn.GELU(),
        nn.Linear(record.width, record.width),
    ]
    if record.norm != "none":
        layers.append(T5LayerNorm(record.width, eps=record.epsilon))
    return nn.Sequential(*layers)
