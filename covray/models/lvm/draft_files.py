"""The files of a draft adapter, beside those of the adapter that it drafts for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from covray.errors import WeightsError
from covray.io.storage import Folder
from covray.models.lvm.adapter_parts import description_bytes, is_count, read_part, require_all_finite, tensor_bytes
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
    values = {
        "rank": draft.rank,
        "alpha": draft.alpha,
        "targets": list(draft.targets),
        "mask_id": draft.mask_id,
        "tokens": draft.tokens,
    }
    return {DRAFT_FILE: description_bytes(values), DRAFT_WEIGHTS: tensor_bytes(tensors)}


def read_draft(folder: Folder) -> tuple[Draft, dict[str, Tensor]]:
    """Return the draft adapter in ``folder`` and its tensors, by names that begin with ``DRAFT_PREFIX``.

    Raises:
        WeightsError: A file is missing or damaged, or values are not finite.
    """
    values, tensors = read_part(folder, DRAFT_FILE, DRAFT_WEIGHTS)
    draft = _checked(values, folder.join(DRAFT_FILE))
    require_all_finite(folder, DRAFT_WEIGHTS, tensors)
    # Other names belong to nothing that is read here.
    of_draft = {}
    for name, tensor in tensors.items():
        if name.startswith(DRAFT_PREFIX):
            of_draft[name] = tensor
    return draft, of_draft


def _checked(values: Mapping[str, Any], file: str) -> Draft:
    """Return the draft adapter that ``values`` describe. Raises WeightsError."""
    has_sizes = all(is_count(values.get(key), 2**31) for key in ("rank", "mask_id", "tokens"))
    alpha, targets = values.get("alpha"), values.get("targets")
    has_alpha = isinstance(alpha, int | float) and 0 < alpha < math.inf
    if not (has_sizes and has_alpha and isinstance(targets, list)):
        raise WeightsError(f"{file}: does not describe a draft adapter of this version; get the adapter again")
    return Draft(values["rank"], float(values["alpha"]), tuple(map(str, targets)), values["mask_id"], values["tokens"])
