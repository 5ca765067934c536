"""Files of what lies beside an adapter, such as its drafts and its verifier: a record in JSON, and tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from covray.errors import WeightsError, one_line
from covray.io.records import Record
from covray.io.storage import Folder
from covray.io.tensor_files import require_finite


def record_bytes(record: Record) -> bytes:
    """Return a record as the bytes of its file."""
    return (json.dumps(record.to_json(), indent=2) + "\n").encode()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors on the CPU as the bytes of a safetensors file, as PyTorch's loaders expect it."""
    return save(dict(tensors), {"format": "pt"})


def read_weights(folder: Folder, weights: str) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file beside an adapter, by name.

    Args:
        folder: That of the adapter.
        weights: The name of the file.

    Raises:
        WeightsError: The file is missing or damaged, or a tensor holds infinities or NaN.
    """
    try:
        tensors: dict[str, Tensor] = load(folder.read_bytes(weights))
    except FileNotFoundError as error:
        raise WeightsError(f"{folder.join(weights)}: is missing; get the adapter again") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder.join(weights)}: cannot be read ({one_line(error)}); get it again") from error
    for name, tensor in tensors.items():
        require_finite(folder.join(weights), name, tensor)
    return tensors
