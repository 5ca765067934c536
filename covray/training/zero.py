"""DeepSpeed ZeRO: the same update with weights, gradients and moments spread over the workers.

The JSON files beside this one say how; what belongs to a run (arithmetic, clipping, batch) is filled in here. DeepSpeed
is imported only where it is used: importing it takes seconds and prints.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import LlamaConfig

from covray.config import OptimizerConfig, TrainConfig
from covray.errors import ConfigError, one_line
from covray.io import storage
from covray.models.lvm.model import Batch, Lvm, Projection
from covray.training.memory import memory
from covray.training.optimizers import MOMENTS, adamw, trainable

FOLDER = Path(__file__).parent / "deepspeed"
STAGES = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
_OURS = ("optimizer", "scheduler", "fp16", "bf16", "gradient_clipping", "train_batch_size",
         "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")  # fmt: skip


def read_settings(name: str) -> dict[str, Any]:
    """The DeepSpeed configuration ``name``: one of ``STAGES``, or a JSON file on any filesystem pyarrow knows.

    Raises ConfigError when it cannot be read, is no ZeRO configuration, or sets what the run's own configuration sets.
    """
    if name in STAGES:
        return dict(json.loads((FOLDER / f"{name}.json").read_text()))
    if not name.endswith(".json"):
        known = ", ".join(("auto", "none", *STAGES))
        raise ConfigError(f"compute.deepspeed: {name} is none of {known}, and no JSON file; give one of them")
    try:
        settings = storage.read_json(name)
    except (OSError, ValueError) as error:
        reason = one_line(error) if isinstance(error, OSError) else "not valid JSON"
        raise ConfigError(f"compute.deepspeed: {name}: {reason}; give a DeepSpeed JSON file") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError(f"compute.deepspeed: {name}: has no zero_optimization; see configs/deepspeed/")
    for key in _OURS:
        if key in settings:
            raise ConfigError(f"compute.deepspeed: {name}: sets {key}, which covray's configuration sets; remove it")
    return settings


def choose(config: TrainConfig, llama: LlamaConfig, gpu_bytes: int | None) -> str:
    """What ``compute.deepspeed: auto`` means for GPUs of ``gpu_bytes`` each: the fastest that fits; none on a CPU.

    Fits: by ``covray.training.memory.memory``, with 15% left to kernels, allocator and communication.
    """
    if gpu_bytes is None:
        return "none"
    for name, stage in (("none", 0), ("zero2", 2), ("zero3", 3)):
        needed = memory(config, llama, stage, config.optimizer.micro_batch_tokens, config.compute.recompute)
        if needed.total <= 0.85 * gpu_bytes:
            return name
    return "zero3_offload"


class ZeroUpdate:
    """A DeepSpeed engine driven so that its update is ``PlainUpdate``'s, but for the order of sums."""

    def __init__(self, model: Lvm, config: OptimizerConfig, settings: Mapping[str, Any], device: torch.device):
        deepspeed = _import_deepspeed(device)
        self.world = dist.get_world_size()
        bf16 = model.norm.weight.dtype == torch.bfloat16
        filled = {
            **settings,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # how many there are differs from step to step: see accumulate
            "gradient_clipping": config.clip,
            "bf16": {"enabled": bf16},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # the adapter is small: torch's fused AdamW does, with no compiler
        }
        if settings["zero_optimization"].get("stage") == 3:
            # A layer's projection uses its adapter's matrices itself: gather them with it.
            deepspeed.utils.set_z3_leaf_modules(model, [Projection])
            # It lets go of a module's weights before their backward pass when no input of the module has a gradient.
            model.embed.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        self.parameters = trainable(model)
        parameters = list(self.parameters.values())
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameters, optimizer=adamw(parameters, config), config=filled
        )
        self.utils, self.gathered = deepspeed.utils, deepspeed.zero.GatheredParameters
        # A collective must be met by all workers: one without a batch computes a sentence of two tokens for nothing.
        ids = torch.zeros(2, dtype=torch.int64, device=device)
        self.nothing = Batch(ids, (2,), ids[:1])

    def evaluate(self, batch: Batch | None) -> Tensor:
        """See ``Update``."""
        with torch.no_grad():
            each: Tensor = self.engine(batch or self.nothing)[1]
        return each if batch else each[:0]

    def accumulate(self, batch: Batch | None, tokens: int, last: bool) -> Tensor:
        """See ``Update``."""
        self.engine.set_gradient_accumulation_boundary(last)
        total: Tensor = self.engine(batch or self.nothing)[0]
        # DeepSpeed takes the mean over the workers.
        self.engine.backward(total * (self.world / tokens if batch else 0.0), scale_wrt_gas=False)
        return total.detach() if batch else torch.zeros_like(total.detach())

    def step(self, learning_rate: float) -> float:
        """See ``Update``."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        return float(self.engine.get_global_grad_norm() or 0.0)

    def tensors(self) -> dict[str, Tensor]:
        """See ``Update``."""
        found = {}
        for name, parameter in self.parameters.items():
            found[name] = self.utils.safe_get_full_fp32_param(parameter).to("cpu", copy=True)
            for moment in MOMENTS:
                whole = self.utils.safe_get_full_optimizer_state(parameter, moment)
                found[f"{name}.{moment}"] = whole.to("cpu", copy=True)
        return found

    def load(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """See ``Update``."""
        # DeepSpeed makes the moments in the first step: one that changes nothing, as its learning rate is 0.
        self.accumulate(None, 1, True)
        self.step(0.0)
        device = self.nothing.ids.device
        with self.gathered(list(self.parameters.values()), modifier_rank=0), torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])
        for name, parameter in self.parameters.items():
            self.utils.safe_set_full_fp32_param(parameter, tensors[name].to(device))
            for moment in MOMENTS:
                self.utils.safe_set_full_optimizer_state(parameter, tensors[f"{name}.{moment}"].to(device), moment)
        for state in self.engine.optimizer.optimizer.state.values():
            state["step"].fill_(step)


def _import_deepspeed(device: torch.device) -> Any:
    # Else it takes whatever accelerator it finds.
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    # Settings may ask for what it compiles, as offloading to a disk: its ninja lies beside Python, where a worker of a
    # virtual environment does not look.
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), str(Path(sys.executable).parent)])
    import deepspeed

    if device.type == "cpu":
        # On a CPU it would compile, for a minute, an all-reduce for inference, which no training calls.
        deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed
