"""The authors' pickled aligners as folders of covray, read without running code from them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from covray.config.section import JsonObject
from covray.errors import ConfigError, WeightsError
from covray.io.tensor_files import read_tensors, require_new
from covray.models.aligner.aligner import Aligner, aligner_of, save_aligner
from covray.models.aligner.records import AlignerRecord, FeaturesOrigin

_PREFIX = "mm_projector."
_TOKENS = {"lvlm": 128, "clip": 32}
"""Of a text to write, in the authors' training files."""
_T5_EPSILON = 1e-6
"""Of the norm in the authors' code, transformers' default."""


def convert_aligner(
    file: Path, out: Path, variant: str, vlm: str | None = None, language_model: str | None = None
) -> JsonObject:
    """Write one of the authors' checkpoints as the folder of an aligner, and return what it is.

    Args:
        file: The ``.pth`` file.
        out: Folder to write.
        variant: ``lvlm`` or ``clip``.
        vlm: Folder or hub id of the model whose features it reads; the folder's ``aligner.json`` will say so.
        language_model: Folder or hub id of the language model that it was trained through.

    Raises:
        ConfigError: ``out`` exists, or there is no such variant.
        WeightsError: The file cannot be read without running code, or holds no such aligner.
    """
    if variant not in ("lvlm", "clip"):
        raise ConfigError(f"--variant {variant}: give lvlm or clip")
    require_new(out)
    aligner = read_pickled_aligner(file)
    features = FeaturesOrigin(variant=variant)
    if vlm is not None:
        features = FeaturesOrigin(variant=variant, vlm={"path": vlm, "revision": None, "mask_id": None})
    update: dict[str, object] = {"features": features}
    if language_model is not None:
        update["trained_through"] = {"path": language_model, "revision": None, "max_tokens": _TOKENS[variant]}
    save_aligner(out, Aligner(aligner.network, aligner.record.model_copy(update=update)))
    return {"out": str(out), "variant": variant, "input_width": aligner.record.input_width,
            "width": aligner.record.width}  # fmt: skip


def read_pickled_aligner(
    file: Path, *, vlm_fingerprint: str | None = None, language_fingerprint: str | None = None
) -> Aligner:
    """Return the aligner of one of the authors' checkpoints (``thinkdiff_lvlm.pth``, ``thinkdiff_clip.pth``).

    Their checkpoints hold a dict with the key ``model``, in which the aligner's tensors begin with ``mm_projector.``.
    All of their aligners end with a norm that started as the encoder's.

    Args:
        file: The ``.pth`` file; it is read with ``weights_only``.
        vlm_fingerprint: Fingerprint of the vision-language model, where it is known.
        language_fingerprint: Fingerprint of the language model, where it is known.

    Raises:
        WeightsError: The file cannot be read without running code, or holds no such aligner.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(file, keys=("model",)).items():
        if name.startswith(_PREFIX):
            tensors[name.removeprefix(_PREFIX)] = tensor
    first = tensors.get("0.weight")
    if first is None or first.ndim != 2:
        raise WeightsError(f"{file}: has no matrix {_PREFIX}0.weight; give a checkpoint of ThinkDiff's training")
    record = AlignerRecord(
        input_width=first.shape[1],
        width=first.shape[0],
        norm="encoder",
        epsilon=_T5_EPSILON,
        vlm=vlm_fingerprint,
        language_model=language_fingerprint,
    )
    return aligner_of(record, tensors, file, torch.device("cpu"))
