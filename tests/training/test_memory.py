"""The plan against what is counted, measured and published."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig

from covray.config import TrainConfig, load_config
from covray.errors import ConfigError, DatasetError
from covray.models.lvm.lora import TARGETS, Lora
from covray.models.lvm.model import Batch, Lvm
from covray.models.lvm.scales import SCALES, llama_config
from covray.training.memory import adapter_parameters, memory, plan, plan_training

GIB = 2**30


def config_of(**options: Any) -> TrainConfig:
    return load_config(TrainConfig, None, {"data": "chains", "out": "run"} | options)


def papers(**options: Any) -> TrainConfig:
    """The 7B of the paper: a pair and a query at length 4, 256 tokens an image, 32 GPUs."""
    return config_of(**{"backbone.scale": "7b", "optimizer.epochs": 20, "workers.count": 32} | options)


# --- work ----------------------------------------------------------------------------------------------------------


def test_steps_and_tokens_are_those_of_whole_sentences() -> None:
    found = plan_training(papers(), llama_config("7b"), 70_000, 256)
    assert found.tokens_per_sentence == 2 * 4 * 256
    assert found.sentences == 1_400_000
    assert found.steps == math.ceil(1_400_000 / 84)  # 172,032 tokens hold 84 sentences
    assert found.tokens == 1_400_000 * 2048
    by_steps = plan_training(papers(**{"optimizer.steps": 10}), llama_config("7b"), 70_000, 256)
    assert (by_steps.steps, by_steps.sentences) == (10, 840)
    assert by_steps.epochs == pytest.approx(840 / 70_000)


def test_a_batch_smaller_than_a_sentence_still_holds_one() -> None:
    config = config_of(**{"optimizer.batch_tokens": 1, "optimizer.micro_batch_tokens": 1})
    found = plan_training(config, llama_config("nano"), 10, 64)
    assert (found.steps, found.micro_batch_tokens) == (10, 512)


def test_drawn_lengths_and_pairs_count_by_their_mean() -> None:
    config = config_of(**{"sentences.lengths": [2, 4], "sentences.pairs": [1, 3]})
    found = plan_training(config, llama_config("nano"), 100, 64)
    assert found.tokens_per_sentence == 64 * 3 * 3
    assert found.micro_batch_tokens == 8192
    without = plan_training(config_of(**{"sentences.method": "none"}), llama_config("nano"), 100, 64)
    assert without.tokens_per_sentence == 2 * 2 * 64, "the method none has no frames"


def test_hours_agree_with_the_papers_run() -> None:
    """20 epochs of 70,000 pairs in about 12 h on 32 H20.

    Where every pair is in one sentence an epoch, that is 1.4 G tokens and 1,040 tokens/s a GPU. Here every pair is the
    query once, and so in two sentences of a pair and a query: twice the tokens, and 12 h would take 2,070 tokens/s.
    """
    llama = llama_config("7b")
    once = plan_training(papers(**{"optimizer.epochs": 10}), llama, 70_000, 256, tokens_per_s=1_000)
    twice = plan_training(papers(), llama, 70_000, 256, tokens_per_s=2_070)
    assert once.hours == pytest.approx(12, rel=0.05)
    assert twice.hours == pytest.approx(12, rel=0.01)
    assert twice.gpu_hours == pytest.approx(32 * 12, rel=0.01)
    assert plan_training(papers(), llama, 70_000, 256).hours is None


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "v_proj"), ("down_proj",)])
def test_the_adapter_has_as_many_parameters_as_are_trained(targets: tuple[str, ...]) -> None:
    for scale in SCALES:
        with torch.device("meta"):
            model = Lvm(llama_config(scale), Lora(8, 16.0, targets))
        trained = sum(tensor.numel() for name, tensor in model.named_parameters() if ".lora_" in name)
        config = config_of(**{"lora.rank": 8, "lora.targets": list(targets)})
        assert adapter_parameters(llama_config(scale), config.lora) == trained


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive; those it is given beforehand are not counted."""

    def __init__(self, known: list[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, Any] = {tensor.untyped_storage()._cdata: tensor for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def measured(llama: LlamaConfig, config: TrainConfig, tokens: int, recompute: bool) -> tuple[int, int]:
    """Bytes kept by a forward pass, and the most alive in forward and backward, beside weights and gradients."""
    chosen = config.lora
    model = Lvm(llama, Lora(chosen.rank, chosen.alpha, chosen.targets), recompute)
    generator = torch.Generator().manual_seed(0)
    known = []
    for name, tensor in model.named_parameters():
        tensor.data.normal_(0, 0.02, generator=generator)
        tensor.requires_grad_(".lora_" in name)
        if tensor.requires_grad:
            tensor.grad = torch.zeros_like(tensor)
            known.append(tensor.grad)
    ids = torch.randint(0, 100, (tokens,), generator=generator)
    lengths = (tokens // 2, tokens // 2)
    positions = torch.cat([torch.arange(start, start + tokens // 2 - 1) for start in (0, tokens // 2)])
    live = Live([*model.parameters(), *known, ids, positions])
    with live:
        total, _ = model(Batch(ids, lengths, positions))
        gc.collect()  # what only the collector frees is not kept
        kept = live.now
        total.backward()
    return kept, live.peak


@pytest.mark.parametrize(
    "options",
    [{}, {"compute.recompute": True}, {"lora.targets": ["q_proj", "v_proj"], "lora.rank": 8}],
    ids=["whole", "recompute", "two targets"],
)
def test_activations_of_the_nano_are_those_measured(options: dict[str, Any]) -> None:
    llama = llama_config("nano")
    config = config_of(**{"compute.dtype": "float32"} | options)
    recompute = config.compute.recompute
    for tokens in (256, 512):
        kept, peak = measured(llama, config, tokens, recompute)
        said = memory(config, llama, 0, tokens, recompute)
        assert said.activations == pytest.approx(kept, rel=0.02)
        assert said.activations + said.working == pytest.approx(peak, rel=0.1)


def test_stages_spread_what_they_say() -> None:
    llama, config = llama_config("7b"), papers(**{"workers.count": 8})
    zero, one, two, three = (memory(config, llama, stage, 8192, False) for stage in (0, 1, 2, 3))
    each = adapter_parameters(llama, config.lora)
    assert zero.weights == one.weights == two.weights == pytest.approx(13.1e9, rel=0.01)
    assert three.weights < zero.weights / 4
    assert zero.adapter == 16 * each
    assert [part.adapter for part in (one, two, three)] == [
        pytest.approx(each * share) for share in (4 + 4 + 12 / 8, 4 + 4 / 8 + 12 / 8, 20 / 8)
    ]
    assert one.total > two.total > three.total


def test_a_7b_fits_an_80_gib_gpu_and_with_recompute_a_24_gib_one() -> None:
    llama, config = llama_config("7b"), papers()
    assert memory(config, llama, 0, 8192, False).total < 70 * GIB
    assert memory(config, llama, 0, 2048, True).total < 20 * GIB


# --- of a dataset --------------------------------------------------------------------------------------------------


def test_the_pairs_are_those_of_the_split(write_dataset: Callable[..., Any]) -> None:
    path, rows = write_dataset({"depth": 8, "edges": 8})
    train = [row for row in rows if row["split"] == "train"]
    options = {"data": path, "sentences.validation_split": "val"}
    assert plan(config_of(**options)).pairs == len(train)
    of_depth = plan(config_of(**options, **{"sentences.tasks": ["depth"]}))
    assert of_depth.pairs == sum(row["task"] == "depth" for row in train)


def test_a_scale_is_planned_without_its_weights(write_dataset: Callable[..., Any]) -> None:
    path, _ = write_dataset({"depth": 8})
    for backbone in (None, "owner/not-downloaded"):
        found = plan(config_of(**{"data": path, "backbone.scale": "7b", "backbone.path": backbone}))
        assert found.parameters == pytest.approx(6.54e9, rel=0.01)


def test_what_cannot_be_trained_cannot_be_planned(write_dataset: Callable[..., Any]) -> None:
    path, _ = write_dataset({"depth": 8})
    with pytest.raises(ConfigError, match=r"4 pictures x \(63 \+ 1\) chains x 16 tokens = 4096 tokens exceed"):
        plan(config_of(**{"data": path, "sentences.pairs": [63]}))
    with pytest.raises(DatasetError, match="needs alpha"):
        plan(config_of(**{"data": path, "sentences.lengths": [8], "sentences.pairs": [0]}))
    with pytest.raises(ConfigError, match="--tokens-per-s -1"):
        plan(config_of(data=path), -1.0)
