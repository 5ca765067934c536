"""DeepSpeed ZeRO: the same update with weights, gradients and moments spread over the workers.

The JSON files in the folder ``deepspeed`` configure the stages; the settings of a training (arithmetic, clipping,
batch) are added here. DeepSpeed is imported only where it is used, because importing it takes seconds and prints.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Generic

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor
from transformers import LlamaConfig

from covray.config import AdamWConfig, TrainConfig
from covray.errors import ConfigError, one_line
from covray.io import storage
from covray.models.lvm.lora import Projection
from covray.models.lvm.model import Lvm
from covray.training.memory import memory
from covray.training.objectives.base import B, Loss, Objective
from covray.training.optimizers import MOMENTS, adamw

FOLDER = Path(__file__).parent / "deepspeed"
STAGES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
_SET_BY_COVRAY = ("optimizer", "scheduler", "fp16", "bf16", "gradient_clipping", "train_batch_size",
         "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")  # fmt: skip


def read_settings(name: str) -> dict[str, Any]:
    """Return the DeepSpeed configuration ``name``: one of ``STAGES``, or a JSON file, local or remote.

    Raises:
        ConfigError: It cannot be read, does not configure ZeRO, or sets what covray's own configuration sets.
    """
    if name in STAGES:
        return dict(json.loads((FOLDER / f"{name}.json").read_text()))
    if not name.endswith(".json"):
        known = ", ".join(("auto", "none", *STAGES))
        raise ConfigError(f"compute.deepspeed: {name} is none of {known}, and no JSON file; give one of them")
    try:
        settings = storage.read_json(name)
    except (OSError, ValueError) as error:
        reason = "not valid JSON"
        if isinstance(error, OSError):
            reason = one_line(error)
        raise ConfigError(f"compute.deepspeed: {name}: {reason}; give a DeepSpeed JSON file") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError(f"compute.deepspeed: {name}: has no zero_optimization; see configs/deepspeed/")
    for key in _SET_BY_COVRAY:
        if key in settings:
            raise ConfigError(f"compute.deepspeed: {name}: sets {key}, which covray's configuration sets; remove it")
    return settings


def require_deepspeed(setting: str) -> None:
    """Raise ConfigError where DeepSpeed is not installed; ``setting`` is what asks for it."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"compute.deepspeed: {setting} needs DeepSpeed, which is not installed; pip install deepspeed (on Linux), "
            "or set compute.deepspeed=none"
        )


def check_settings(name: str) -> None:
    """Refuse a DeepSpeed configuration that ``read_settings`` refuses, or DeepSpeed itself.

    The check of a JSON file imports DeepSpeed, which takes seconds; the shipped stages are known to be right.

    Raises:
        ConfigError: The configuration cannot be used.
    """
    settings = read_settings(name)
    require_deepspeed(name)
    if name in STAGES:
        return
    accelerator = os.environ.get("DS_ACCELERATOR")
    try:
        # A driver needs no GPU, and its environment is that of the workers it starts: the variable is taken back.
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        DeepSpeedZeroConfig(**settings["zero_optimization"])
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in ("zero_optimization", *problem["loc"]))
        message = problem["msg"]
        if problem["type"] == "extra_forbidden":
            message = "DeepSpeed has no such key"
        raise ConfigError(f"compute.deepspeed: {name}: {key}: {message}; correct it") from error
    finally:
        del os.environ["DS_ACCELERATOR"]
        if accelerator is not None:
            os.environ["DS_ACCELERATOR"] = accelerator


def choose(config: TrainConfig, llama: LlamaConfig, gpu_bytes: int | None) -> str:
    """Return what ``compute.deepspeed: auto`` means: the fastest that fits, by ``covray.training.memory.memory``.

    Args:
        config: The configuration of the training.
        llama: The architecture of the backbone.
        gpu_bytes: Memory of each GPU, of which 15% are left to kernels, allocator and communication. None: no GPU.

    Raises:
        ConfigError: A stage of DeepSpeed is chosen, and DeepSpeed is not installed.
    """
    if gpu_bytes is None:
        return "none"
    chosen = "zero3_offload"
    for name, stage in (("none", 0), ("zero2", 2), ("zero3", 3)):
        needed = memory(config, llama, stage, config.optimizer.micro_batch_tokens, config.compute.recompute)
        if needed.total <= 0.85 * gpu_bytes:
            chosen = name
            break
    if chosen != "none":
        require_deepspeed(f"auto chooses {chosen}, which")
    return chosen


def require_whole_weights(config: TrainConfig) -> None:
    """Refuse frame noise that reads weights where no worker has all of them.

    Args:
        config: With the DeepSpeed setting that is used; ``auto`` is not checked.

    Raises:
        ConfigError: It is ZeRO-3.
    """
    kind, setting = config.sentences.frame_noise.kind, config.compute.deepspeed
    if not config.sentences.frame_noise.reads_weights or setting in ("auto", "none"):
        return
    if read_settings(setting)["zero_optimization"].get("stage") == 3:
        raise ConfigError(
            f"sentences.frame_noise.kind: {kind} reads whole weights, with compute.deepspeed={setting} a worker has "
            "a part of them; set compute.deepspeed=zero2, or another kind"
        )


class ZeroUpdate(Generic[B]):
    """A DeepSpeed engine whose update equals that of ``PlainUpdate``, but for the order of sums."""

    def __init__(self, objective: Objective[B], config: AdamWConfig, settings: Mapping[str, Any], device: torch.device):
        """Start the engine.

        Args:
            objective: What is trained.
            config: The optimizer's configuration.
            settings: The DeepSpeed configuration of ``read_settings``.
            device: The device of this worker.
        """
        deepspeed = _import_deepspeed(device)
        self._objective, self._device = objective, device
        self._world_size = dist.get_world_size()
        module = objective.module
        if settings["zero_optimization"].get("stage") == 3:
            _prepare_for_stage_3(module, deepspeed)
        self._parameters = objective.parameters()
        parameters = list(self._parameters.values())
        has_bfloat16 = any(weight.dtype == torch.bfloat16 for weight in module.parameters())
        self._engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=parameters,
            optimizer=adamw(parameters, config),
            config=_engine_settings(settings, config, has_bfloat16),
        )
        self._utils, self._gathered = deepspeed.utils, deepspeed.zero.GatheredParameters

    def evaluate(self, batch: B | None) -> Tensor:
        """See ``Update``."""
        with torch.no_grad():
            each = self._loss(batch).each
        if batch is None:
            return each[:0]  # the loss of the idle batch counts nowhere
        return each

    def accumulate(self, batch: B | None, loss_tokens: int, is_last: bool) -> Tensor:
        """See ``Update``."""
        self._engine.set_gradient_accumulation_boundary(is_last)
        total = self._loss(batch).total
        if batch is None:
            # The pass of the idle batch makes the collectives pair up; its gradient must be nothing.
            self._engine.backward(total * 0.0, scale_wrt_gas=False)
            return torch.zeros_like(total.detach())
        # DeepSpeed takes the mean over the workers, where the sum is wanted.
        self._engine.backward(total * (self._world_size / loss_tokens), scale_wrt_gas=False)
        return total.detach()

    def step(self, learning_rate: float) -> float:
        """See ``Update``."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        return float(self._engine.get_global_grad_norm() or 0.0)

    def tensors(self) -> dict[str, Tensor]:
        """See ``Update``."""
        copies = {}
        for name, parameter in self._parameters.items():
            copies[name] = self._utils.safe_get_full_fp32_param(parameter).to("cpu", copy=True)
            for moment in MOMENTS:
                whole = self._utils.safe_get_full_optimizer_state(parameter, moment)
                copies[f"{name}.{moment}"] = whole.to("cpu", copy=True)
        return copies

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """See ``Update``."""
        # DeepSpeed makes the moments in the first step: one that changes nothing, as its learning rate is 0.
        self.accumulate(None, 1, True)
        self.step(0.0)
        with self._gathered(list(self._parameters.values()), modifier_rank=0), torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[name])
        for name, parameter in self._parameters.items():
            self._utils.safe_set_full_fp32_param(parameter, tensors[name].to(self._device))
            for moment in MOMENTS:
                value = tensors[f"{name}.{moment}"].to(self._device)
                self._utils.safe_set_full_optimizer_state(parameter, value, moment)
        for state in self._engine.optimizer.optimizer.state.values():
            state["step"].fill_(step)

    def _loss(self, batch: B | None) -> Loss:
        """Return the loss of ``batch``, or of the idle batch, so that the collectives of all workers pair up."""
        if batch is None:
            batch = self._objective.idle_batch
        return self._objective.loss(self._engine, batch)


def _engine_settings(settings: Mapping[str, Any], config: AdamWConfig, has_bfloat16: bool) -> dict[str, Any]:
    """Return ``settings`` with what belongs to a training."""
    return {
        **settings,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # their number differs from step to step: see accumulate
        "gradient_clipping": config.clip,
        "bf16": {"enabled": has_bfloat16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # what is trained is small: torch's fused AdamW does, with no compiler
    }


def _prepare_for_stage_3(module: torch.nn.Module, deepspeed: Any) -> None:
    """Tell DeepSpeed how the LVM uses its weights, if ``module`` is one."""
    if not isinstance(module, Lvm):
        return
    # A layer's projection uses its adapter's matrices itself: gather them with it.
    deepspeed.utils.set_z3_leaf_modules(module, [Projection])
    # It frees a module's weights before their backward pass when no input of the module has a gradient.
    module.embed.register_forward_hook(lambda module, inputs, output: output.requires_grad_())


def _import_deepspeed(device: torch.device) -> Any:
    """Return the library, set up for ``device``."""
    # Without this it takes whatever accelerator is present.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Some settings need a compiled operator, as offloading to a disk. The ninja that compiles it lies beside Python,
    # where a worker of a virtual environment does not look.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    require_deepspeed("this worker")
    import deepspeed

    if device.type == "cpu":
        # On a CPU it would compile, for a minute, an all-reduce for inference, which no training calls.
        deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
