"""Files of what lies beside an adapter, such as its drafts and its verifier: a description in JSON, and tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from covray.errors import WeightsError, one_line
from covray.io.storage import Folder
from covray.io.tensor_files import require_finite

_VERSION = 1


def description_bytes(values: Mapping[str, Any]) -> bytes:
    """Return the description as the bytes of its file."""
    return (json.dumps({"version": _VERSION, **values}, indent=2) + "\n").encode()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return tensors on the CPU as the bytes of a safetensors file, as PyTorch's loaders expect it."""
    return save(dict(tensors), {"format": "pt"})


def read_part(folder: Folder, description: str, weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the values of a description, and the tensors beside it.

    Args:
        folder: That of the adapter.
        description: The name of the JSON file.
        weights: The name of the safetensors file.

    Returns:
        The values, empty where the file is none of this version; and the tensors by name.

    Raises:
        WeightsError: A file is missing or damaged.
    """
    try:
        values = folder.read_json(description)
        tensors = load(folder.read_bytes(weights))
    except FileNotFoundError as error:
        raise WeightsError(f"{folder.join(weights)}: is missing; get the adapter again") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder.join(description)}: cannot be read ({one_line(error)}); get it again") from error
    # Files come from strangers: JSON may be anything, and a caller finds its keys missing.
    if not isinstance(values, dict) or values.get("version") != _VERSION:
        values = {}
    return values, tensors


def require_all_finite(folder: Folder, weights: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that hold infinities or NaN. Raises WeightsError."""
    for name, tensor in tensors.items():
        require_finite(folder.join(weights), name, tensor)


def is_count(value: object, end: int) -> bool:
    """Return whether ``value`` is a whole number above 0 and below ``end``."""
    return isinstance(value, int) and 0 < value < end
