"""The files of a draft adapter, beside those of the adapter that it drafts for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from covray.errors import WeightsError, one_line
from covray.io.storage import Folder
from covray.io.tensor_files import require_finite
from covray.models.lvm.draft import Draft

DRAFT_FILE = "draft.json"
"""Rank, alpha, targets, mask and length of the drafts."""
DRAFT_WEIGHTS = "draft_model.safetensors"
DRAFT_PREFIX = "draft."
"""Before the names of the draft adapter's tensors, in its file and among those of an adapter."""


def draft_files(draft: Draft, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the files of a draft adapter by name.

    Args:
        draft: What is known of it.
        tensors: Its matrices and the mask's row of the embedding, by names that begin with ``DRAFT_PREFIX``.
    """
    about = {
        "version": 1,
        "rank": draft.rank,
        "alpha": draft.alpha,
        "targets": list(draft.targets),
        "mask_id": draft.mask_id,
        "tokens": draft.tokens,
    }
    return {
        DRAFT_FILE: (json.dumps(about, indent=2) + "\n").encode(),
        DRAFT_WEIGHTS: save(dict(tensors), {"format": "pt"}),
    }


def read_draft(folder: Folder) -> tuple[Draft, dict[str, Tensor]]:
    """Return the draft adapter in ``folder`` and its tensors, by names that begin with ``DRAFT_PREFIX``.

    Raises:
        WeightsError: A file is missing or damaged, or values are not finite.
    """
    try:
        about = folder.read_json(DRAFT_FILE)
        tensors = load(folder.read_bytes(DRAFT_WEIGHTS))
    except FileNotFoundError as error:
        raise WeightsError(f"{folder.join(DRAFT_WEIGHTS)}: is missing; get the adapter again") from error
    except (OSError, ValueError, SafetensorError) as error:
        raise WeightsError(f"{folder.join(DRAFT_FILE)}: cannot be read ({one_line(error)}); get it again") from error
    draft = _checked(about, folder.join(DRAFT_FILE))
    for name, tensor in tensors.items():
        require_finite(folder.join(DRAFT_WEIGHTS), name, tensor)
    return draft, {name: tensor for name, tensor in tensors.items() if name.startswith(DRAFT_PREFIX)}


def _checked(about: Any, file: str) -> Draft:
    """Return the draft adapter that ``about`` describes. Raises WeightsError."""
    values = about if isinstance(about, dict) and about.get("version") == 1 else {}
    sizes = [values.get(key) for key in ("rank", "mask_id", "tokens")]
    alpha, targets = values.get("alpha"), values.get("targets")
    if (
        not all(isinstance(size, int) and 0 < size < 2**31 for size in sizes)
        or not (isinstance(alpha, int | float) and 0 < alpha < math.inf)
        or not isinstance(targets, list)
    ):
        raise WeightsError(f"{file}: does not describe a draft adapter of this version; get the adapter again")
    return Draft(values["rank"], float(alpha), tuple(map(str, targets)), values["mask_id"], values["tokens"])
