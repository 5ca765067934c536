"""The options of PEFT's LoRA in an ``adapter_config.json``: which ones covray computes, and which it refuses."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from covray.errors import WeightsError, one_line
from covray.models.lvm.lora import TARGETS, Lora

_MOST_RANK = 1024
"""Of ``LoraConfig.rank``."""
READ = (
    "peft_type",
    "r",
    "lora_alpha",
    "target_modules",
    "use_rslora",
    "init_lora_weights",
    "bias",
    "trainable_token_indices",
)
"""Options of PEFT's LoraConfig that covray computes with, or checks."""
WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
)
"""Options that do not change what a trained LoRA of linear layers computes: names, training, and details of options
that are themselves refused. Any other option that is set is refused, also one that a later PEFT adds."""
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""``init_lora_weights`` that leave the backbone as it is. All others (``pissa``, ``olora``, ``corda``, ``loftq``,
``lora_ga``, ...) also change the backbone's weights, and PEFT does so again whenever it loads the adapter."""


def read_lora(values: dict[str, Any], file: str) -> Lora:
    """Return the adapter that the options ``values`` of ``file`` describe.

    PEFT judges whether they are valid. Raises WeightsError if they are not, and for an unplain LoRA.
    """
    kind = values.get("peft_type")
    if kind != "LORA":
        raise WeightsError(f"{file}: is of type {kind}, not LORA; give a LoRA adapter")
    unsupported = [key for key, value in values.items() if value and key not in (*READ, *WITHOUT_EFFECT)]
    if values.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise WeightsError(
            f"{file}: uses {unsupported[0]}, which covray does not compute; merge it into the backbone with PEFT "
            "(merge_and_unload), or give a plain LoRA adapter"
        )
    init = values.get("init_lora_weights", True)
    if init == "loftq":
        raise WeightsError(
            f"{file}: its init_lora_weights is loftq, which quantises the backbone, too; merge it into the backbone "
            "with PEFT (merge_and_unload)"
        )
    if init not in _PLAIN_INITS:
        raise WeightsError(
            f"{file}: its init_lora_weights is {init}, which changes the backbone, too; convert it to plain LoRA by "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...) of PEFT, or merge it with PEFT"
        )
    rank, alpha, targets = values.get("r"), values.get("lora_alpha"), values.get("target_modules")
    if (
        not (isinstance(rank, int) and isinstance(alpha, int | float))
        or not 0 < rank <= _MOST_RANK
        or not 0 < alpha < math.inf
    ):
        raise WeightsError(f"{file}: has rank {rank!r} and alpha {alpha!r}; give a plain LoRA adapter")
    # PEFT saves "all-linear" as the full names of all layers; the tensors show whether a layer is left out.
    names = {str(target).rpartition(".")[2] for target in targets} if isinstance(targets, list) else set()
    if not names or not names <= set(TARGETS):
        raise WeightsError(f"{file}: adapts {targets!r:.200}, covray only {', '.join(TARGETS)}; give another adapter")
    _require_valid(values, file)
    # rsLoRA (arXiv:2312.03732) scales by alpha / sqrt(rank), all else here by alpha / rank.
    if values.get("use_rslora"):
        alpha *= math.sqrt(rank)
    return Lora(rank, float(alpha), tuple(name for name in TARGETS if name in names))


def _require_valid(values: Mapping[str, Any], file: str) -> None:
    """Check that PEFT can make its configuration of ``values``. Raises WeightsError."""
    from peft import PeftConfig  # where it is needed: it takes a second

    stored = {key: value for key, value in values.items() if key != "runtime_config"}  # PEFT does not read this one
    try:
        with warnings.catch_warnings(action="ignore"):  # an option that is not set may be unknown to it
            PeftConfig.from_peft_type(**stored)
    except (TypeError, ValueError, ImportError) as error:
        raise WeightsError(f"{file}: PEFT refuses it ({one_line(error)}); save the adapter with PEFT again") from error
