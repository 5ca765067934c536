"""The files of a draft adapter, beside those of the adapter that it drafts for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from covray.io.storage import Folder
from covray.models.lvm.adapter_parts import read_weights, record_bytes, tensor_bytes
from covray.models.lvm.draft import Draft
from covray.models.lvm.records import DraftRecord

DRAFT_WEIGHTS = "draft_model.safetensors"
DRAFT_PREFIX = "draft."
"""Before the names of the draft adapter's tensors, in its file and among those of an adapter."""


def draft_files(draft: Draft, tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return the files of a draft adapter by name.

    Args:
        draft: What is known of it.
        tensors: Its matrices and the mask's row of the embedding, by names that begin with ``DRAFT_PREFIX``.
    """
    record = DraftRecord(**vars(draft))
    return {DraftRecord.FILE: record_bytes(record), DRAFT_WEIGHTS: tensor_bytes(tensors)}


def read_draft(folder: Folder) -> tuple[Draft, dict[str, Tensor]]:
    """Return the draft adapter in ``folder`` and its tensors, by names that begin with ``DRAFT_PREFIX``.

    Raises:
        WeightsError: A file is missing or damaged, or values are not finite.
    """
    record = DraftRecord.read(folder)
    draft = Draft(record.rank, record.alpha, record.targets, record.mask_id, record.tokens)
    # Other names belong to nothing that is read here.
    of_draft = {}
    for name, tensor in read_weights(folder, DRAFT_WEIGHTS).items():
        if name.startswith(DRAFT_PREFIX):
            of_draft[name] = tensor
    return draft, of_draft
