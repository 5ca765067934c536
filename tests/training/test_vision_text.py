"""Vision-language models are trained by the trainer of all others: continued to the bit, exported for everyone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForImageTextToText

from covray.config.vlm import VlmDecodingConfig, VlmModelConfig, VlmTrainConfig
from covray.errors import ConfigError, ManifestError, WeightsError
from covray.models.vlm.adapter import load_adapter
from covray.models.vlm.checkpoint import load_vlm, vlm_facts
from covray.models.vlm.convert import convert_vlm
from covray.models.vlm.decoding import decode
from covray.training.objectives.base import perplexity
from covray.training.objectives.vision_text import VisionText
from covray.training.run import train
from covray.training.worker import Signal, WorkerContext
from tests.support.trainings import curve
from tests.support.vlm_trainings import STEPS
from tests.support.vlms import picture

CPU = torch.device("cpu")


CASES: list[dict[str, Any]] = [
    {"objective": "autoregressive"},
    {"objective": "block_diffusion", "family": "llava", "blocks__shift": True, "blocks__anneal": [1, 2]},
    {"objective": "block_diffusion", "blocks__preset": "diffusionvl", "train": "full"},
    {"objective": "block_diffusion", "train": "language", "compute__recompute": True},
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_a_run_stopped_after_every_step_equals_an_undisturbed_one(
    case: dict[str, Any], vlm_config: Callable[..., VlmTrainConfig], poll_every_step: None
) -> None:
    whole, often = vlm_config("whole", **case), vlm_config("often", **case)
    result = train(whole)
    assert result is not None
    assert result.validation_loss is not None
    for _ in range(STEPS - 1):
        assert train(often, WorkerContext(poll_signal=lambda: Signal.STOP)) is None
    assert train(often) is not None
    assert curve(often) == curve(whole), "to the bit"
    name = "adapter_model.safetensors" if whole.train == "lora" else "model.safetensors"
    weights = [Path(run.out, "adapter", name).read_bytes() for run in (whole, often)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("mean", ["tokens", "samples"])
def test_workers_share_a_step(mean: str, vlm_config: Callable[..., VlmTrainConfig]) -> None:
    objective = VisionText(vlm_config(objective="block_diffusion", blocks__mean=mean), CPU)

    def summed(batches: Any) -> float:
        return sum(float(objective.module(batch)[0].detach()) for batch in batches if batch is not None)

    whole = objective.batches(6, WorkerContext())
    shares = [objective.batches(6, WorkerContext(rank=rank, world_size=4)) for rank in range(4)]
    assert {len(share.batches) for share in shares} == {1}, "all take part in the same collectives"
    assert {share.loss_tokens for share in shares} == {whole.loss_tokens}
    assert sum(summed(share.batches) for share in shares) == pytest.approx(summed(whole.batches), rel=1e-5)
    assert whole.loss_tokens == (6 if mean == "samples" else whole.tokens)


def test_a_step_reads_samples_of_like_lengths_together(vlm_config: Callable[..., VlmTrainConfig]) -> None:
    together = VisionText(vlm_config(optimizer__micro_batch_samples=2), CPU).batches(6, WorkerContext()).batches
    lengths = torch.cat([batch.lengths for batch in together if batch is not None])
    (whole,) = VisionText(vlm_config(optimizer__micro_batch_samples=6), CPU).batches(6, WorkerContext()).batches
    assert whole is not None
    assert lengths.tolist() == sorted(whole.lengths.tolist())
    assert len(set(whole.lengths.tolist())) > 1, "captions and answers"


def test_every_sample_is_seen_once_an_epoch(vlm_config: Callable[..., VlmTrainConfig]) -> None:
    config = vlm_config(optimizer__steps=None, optimizer__epochs=2)
    objective = VisionText(config, CPU)
    assert objective.steps == 6, "32 samples by 6"
    cursor, sizes = 0, []
    for _ in range(objective.steps):
        step = objective.batches(cursor, WorkerContext())
        cursor = step.next_cursor
        sizes.append(step.sentences)
    assert sizes == [6, 6, 6, 6, 6, 2]
    assert step.epoch == 2


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_plain_peft_reads_the_adapter(family: str, vlm_config: Callable[..., VlmTrainConfig]) -> None:
    config = vlm_config(objective="block_diffusion", family=family)
    train(config)
    folder = f"{config.out}/adapter"
    loaded = load_vlm(vlm_facts(config.checkpoint()), torch.float32, CPU)
    lora = config.lora
    assert load_adapter(loaded.model, folder, lora.rank, lora.alpha, lora.targets) is not None
    base = AutoModelForImageTextToText.from_pretrained(config.model)
    plain = PeftModel.from_pretrained(base, folder).eval()
    ids = torch.tensor([[2, 7, loaded.model.mask_id, 9, 3, 10]])
    untrained = load_vlm(vlm_facts(config.checkpoint()), torch.float32, CPU)
    with torch.no_grad():
        ours = loaded.model.model(input_ids=ids).logits
        before = untrained.model.model(input_ids=ids).logits
        torch.testing.assert_close(ours, plain(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ours, before, atol=1e-3)


def test_a_whole_model_is_a_folder_like_the_one_it_began_with(vlm_config: Callable[..., VlmTrainConfig]) -> None:
    config = vlm_config(objective="block_diffusion", train="full", family="llava")
    train(config)
    facts = vlm_facts(VlmModelConfig(path=f"{config.out}/adapter"))
    assert facts.blocks is not None
    assert facts.blocks.size == 4
    loaded = load_vlm(facts, torch.float32, CPU)
    (answer,) = decode(loaded, [loaded.prompter.prompt([], "what is it")], VlmDecodingConfig(), facts.blocks)
    assert answer.passes
    # Trained on, token by token, it has forgotten its blocks; its mask it keeps.
    further = vlm_config("further", objective="autoregressive", train="full", model=f"{config.out}/adapter")
    train(further)
    after = vlm_facts(VlmModelConfig(path=f"{further.out}/adapter"))
    assert (after.blocks, after.mask_id) == (None, facts.mask_id)


@pytest.mark.parametrize("objective", ["autoregressive", "block_diffusion"])
def test_captions_and_answers_are_learned(objective: str, vlm_config: Callable[..., VlmTrainConfig]) -> None:
    """A few steps of a whole tiny model tell red from blue."""
    config = vlm_config(
        objective=objective, train="full", optimizer__steps=60, optimizer__batch_samples=16,
        optimizer__micro_batch_samples=16, validate_every_steps=60, checkpoints__every_steps=60,
        optimizer__learning_rate=5e-3,
    )  # fmt: skip
    train(config)
    facts = vlm_facts(VlmModelConfig(path=f"{config.out}/adapter"))
    loaded = load_vlm(facts, torch.float32, CPU)
    objective_of = VisionText(config.model_copy(update={"model": f"{config.out}/adapter"}), CPU)
    right = 0
    for exchange in objective_of._validation:
        sample = objective_of._sample(exchange, objective_of._blocks)
        prompt = objective_of._prompter.prompt([], "")
        prompt = type(prompt)(sample.ids[: sample.prompt], sample.images)
        (answer,) = decode(loaded, [prompt], VlmDecodingConfig(max_tokens=8), facts.blocks)
        right += loaded.prompter.text(answer.ids) == exchange.answer
    assert right >= 7, "of 8"


def test_a_bad_picture_is_named(vlm_config: Callable[..., VlmTrainConfig], tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("image,caption\nabsent.png,a ball\n")
    config = vlm_config(data=str(tmp_path / "list.csv"), texts__validation_split=None)
    with pytest.raises(ManifestError, match=r"absent\.png"):
        VisionText(config, CPU)
    Image.fromarray(picture(0, 2, 500)).save(tmp_path / "absent.png")
    with pytest.raises(ManifestError, match=r"500x2 px; .*; correct or remove its row"):
        VisionText(config, CPU)


def test_blocks_grow_in_equal_shares_of_the_training(vlm_config: Callable[..., VlmTrainConfig]) -> None:
    objective = VisionText(vlm_config(objective="block_diffusion", blocks__anneal=[1, 2], optimizer__steps=6), CPU)
    sizes = []
    for step in range(6):
        (batch, _) = objective.batches(step * 6, WorkerContext()).batches
        sizes.append(batch.blocks.size)
    assert sizes == [1, 1, 2, 2, 4, 4]


def test_younger_settings_leave_identities_as_they_were(vlm_config: Callable[..., VlmTrainConfig]) -> None:
    known = {"preset", "size", "context", "start", "low", "high", "weight", "autoregressive", "mean"}
    assert set(vlm_config(objective="block_diffusion", blocks__shift=False).identity()["blocks"]) == known
    younger = vlm_config(objective="block_diffusion", blocks__shift=True, blocks__anneal=[2]).identity()["blocks"]
    assert younger | {"shift": True, "anneal": [2]} == younger
    assert "cache" not in VlmDecodingConfig().model_dump()


def test_a_converted_folder_is_trained_as_the_model_it_was(
    vlm_config: Callable[..., VlmTrainConfig], vlm_folders: dict[str, str], tmp_path: Path
) -> None:
    case = {"objective": "block_diffusion", "optimizer__steps": 2}
    plain = vlm_config("plain", **case)
    folder = str(tmp_path / "converted")
    result = convert_vlm(VlmModelConfig(path=vlm_folders["qwen2_5_vl"]), folder)
    converted = vlm_config("of-converted", **case, model=folder)
    train(plain)
    train(converted)
    assert curve(converted) == curve(plain), "to the bit"
    facts = vlm_facts(converted.checkpoint())
    assert (facts.mask_id, facts.blocks) == (result["mask_id"], None), "not yet trained for blocks"
    with pytest.raises(WeightsError, match="already"):
        convert_vlm(converted.checkpoint(), str(tmp_path / "again"))


def test_a_loss_beyond_all_bounds_does_not_end_a_training(vlm_config: Callable[..., VlmTrainConfig]) -> None:
    objective = VisionText(vlm_config(), CPU)
    metrics = objective.validate(lambda batch: torch.full((1,), 1e6), WorkerContext())
    assert metrics is not None
    assert metrics["validation_loss"] > 1000, "exp of it is no float"
    assert metrics["answer_perplexity"] == perplexity(100.0) > 1e43
    assert perplexity(1.0) == math.e


def test_contradictions_are_refused(vlm_config: Callable[..., VlmTrainConfig]) -> None:
    with pytest.raises(ConfigError, match="autoregressive: must be 0 with context=block"):
        vlm_config(blocks__context="block")
    with pytest.raises(ConfigError, match="weight: must be level with start=sequence"):
        vlm_config(blocks__start="sequence")
    published = vlm_config(blocks__preset="diffusionvl", blocks__size=4).blocks
    assert (published.context, published.start, published.weight, published.size) == ("block", "sequence", "level", 4)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_zero_makes_the_plain_losses(vlm_config: Callable[..., VlmTrainConfig], process_group: None) -> None:
    case = {"objective": "block_diffusion"}
    plain, zero = vlm_config("plain", **case), vlm_config("zero", compute__deepspeed="zero2", **case)
    train(plain)
    train(zero)
    losses = [[record["loss"] for record in curve(run) if "loss" in record] for run in (plain, zero)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
