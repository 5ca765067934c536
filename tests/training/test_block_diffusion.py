"""Block diffusion as an objective: the same losses however it is run, and an adapter that decoding and PEFT read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from covray.config import SamplingConfig, TrainConfig
from covray.errors import ConfigError, WeightsError
from covray.models.lvm.adapter import read_run_adapter
from covray.models.lvm.backbone import backbone_facts, write_backbone
from covray.models.lvm.lora import Diffusion
from covray.models.lvm.model import Batch
from covray.models.lvm.records import BlockDiffusionRecord
from covray.training.objectives.block_diffusion import BlockDiffusion, noised_places
from covray.training.run import train
from covray.training.worker import WorkerContext
from tests.support.datasets import CODES, TOKENS
from tests.support.trainings import curve, decoder_of, model_of, require_same_after_a_stop

BLOCK = TOKENS // 2
CPU = torch.device("cpu")
Configure = Callable[..., TrainConfig]


@pytest.fixture
def diffusion_config(tiny_config: Configure) -> Configure:
    def config(out: str = "run", **changes: Any) -> TrainConfig:
        chosen = {"objective": "block_diffusion", "block_diffusion__block": BLOCK, "sentences__loss": "chain"}
        return tiny_config(out, **chosen | changes)

    return config


def test_it_learns_and_the_run_decodes_by_blocks(diffusion_config: Configure) -> None:
    config = diffusion_config(optimizer__steps=25)
    result = train(config)
    assert result is not None
    assert result.validation_loss is not None
    assert result.validation_loss_before is not None
    losses = [record["loss"] for record in curve(config) if "loss" in record]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05
    checks = [record for record in curve(config) if "validation_loss" in record]
    expected = np.log(checks[-1]["answer_perplexity"]) + np.log(checks[-1]["answer_nelbo_perplexity"])
    assert checks[-1]["validation_loss"] == pytest.approx(expected, rel=0.1), "both parts, nearly of the same tokens"
    decoder = decoder_of(config)
    query = np.zeros((1, TOKENS), np.uint16)
    before = decoder.passes
    written = decoder.decode(query[0], query, 1, SamplingConfig(passes=1))
    assert decoder.passes - before == 2 * TOKENS // BLOCK
    assert written.ids.max() < CODES


def test_a_stopped_run_takes_up_the_same_losses(diffusion_config: Configure, poll_every_step: None) -> None:
    require_same_after_a_stop(diffusion_config("whole"), diffusion_config("stopped"), "adapter_model.safetensors")


def test_noise_belongs_to_the_sentence_not_to_the_worker(diffusion_config: Configure) -> None:
    objective = BlockDiffusion(diffusion_config(), CPU)
    alone = objective.batches(0, WorkerContext())
    shares = [objective.batches(0, WorkerContext(rank=rank, world_size=2)) for rank in (0, 1)]

    def blocks(batches: list[Batch | None]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
        found = set()
        for batch in batches:
            if batch is None:
                continue
            assert batch.noisy is not None
            sentences = zip(batch.ids.split(batch.lengths), batch.noisy.ids.split(batch.noisy.counts), strict=True)
            found |= {(tuple(clean.tolist()), tuple(noisy.tolist())) for clean, noisy in sentences}
        return found

    assert blocks(shares[0].batches) | blocks(shares[1].batches) == blocks(alone.batches)
    assert alone.loss_tokens == shares[0].loss_tokens
    later = objective.batches(len(objective.training), WorkerContext())
    assert blocks(later.batches) != blocks(alone.batches), "another epoch, another noise"


@pytest.mark.parametrize("loss", ["all", "chains", "chain", "answer"])
def test_blocks_are_of_the_pictures_that_carry_loss(diffusion_config: Configure, loss: str) -> None:
    objective = BlockDiffusion(diffusion_config(sentences__loss=loss), CPU)
    places = noised_places(objective.training, 0)
    carries = objective.training.loss_at(0)
    assert set(places) <= set(carries)
    assert {int(place) // TOKENS for place in places} == {int(place) // TOKENS for place in carries} - {0}
    assert len(places) % TOKENS == 0
    batch = objective.batches(0, WorkerContext()).batches[0]
    assert batch is not None
    assert batch.noisy is not None
    noisy = batch.noisy
    is_mask = noisy.ids == CODES + 1
    assert torch.equal(is_mask.nonzero()[:, 0], noisy.masked)
    assert torch.equal(noisy.ids[~is_mask], batch.ids[noisy.places[~is_mask]])
    assert torch.equal(batch.targets, batch.ids[noisy.places]), "the clean loss is of the same tokens"


def test_an_autoregressive_adapter_is_converted(tiny_config: Configure, diffusion_config: Configure) -> None:
    first = tiny_config("first", sentences__loss="chain")
    result = train(first)
    assert result is not None
    converted = diffusion_config("converted", lora__path=f"{first.out}/adapter")
    train(converted)
    before = next(record for record in curve(converted) if "validation_loss" in record)
    assert before["answer_perplexity"] == pytest.approx(result.answer_perplexity, rel=1e-4), (
        "it begins where that ended"
    )
    continued = diffusion_config("continued", lora__path=f"{converted.out}/adapter")
    train(continued)
    with pytest.raises(WeightsError, match="trainable_tokens_delta"):
        train(tiny_config("back", lora__path=f"{converted.out}/adapter"))


def test_peft_computes_the_same_with_the_adapter(diffusion_config: Configure, tmp_path: Path) -> None:
    from peft import PeftModel

    config = diffusion_config()
    train(config)
    model = model_of(config)
    assert model.lora is not None
    assert model.lora.diffusion == Diffusion(CODES + 1, BLOCK)
    folder = tmp_path / "weights"
    write_backbone(folder, backbone_facts(config.backbone), model.backbone_tensors().__getitem__, torch.float32)
    peer = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder), f"{config.out}/adapter")
    ids = torch.arange(20) % CODES
    ids[5] = ids[11] = CODES + 1
    with torch.inference_mode():
        expected = peer(input_ids=ids[None]).logits[0]
        torch.testing.assert_close(model.logits(ids, (20,)), expected, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused(diffusion_config: Configure, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"block_diffusion.block: {TOKENS - 1} does not divide the {TOKENS} tokens"):
        BlockDiffusion(diffusion_config(block_diffusion__block=TOKENS - 1), CPU)
    config = diffusion_config("damaged")
    train(config)
    record = {"version": 1, "config": config.model_dump(mode="json"), "fingerprints": {}}
    Path(config.out, "_run.json").write_text(json.dumps(record))
    assert read_run_adapter(config.out)[0].diffusion == Diffusion(CODES + 1, BLOCK)
    file = Path(config.out, "adapter", BlockDiffusionRecord.FILE)
    text = file.read_text()
    file.write_text(json.dumps({"version": 1}))
    with pytest.raises(WeightsError, match="lacks objective; get the adapter again"):
        read_run_adapter(config.out)
    file.write_text(text.replace(str(BLOCK), "1"))
    with pytest.raises(WeightsError, match="is not what the run trained"):
        read_run_adapter(config.out)
    file.unlink()
    with pytest.raises(WeightsError, match=f"{BlockDiffusionRecord.FILE}: is not there"):
        read_run_adapter(config.out)


def test_runs_without_it_keep_their_identity(tiny_config: Configure, diffusion_config: Configure) -> None:
    assert not {"objective", "block_diffusion"} & set(tiny_config().identity())
    assert diffusion_config().identity()["block_diffusion"]["block"] == BLOCK
