"""Noise in the query's frames: only there, only in the input, the same after any restart and on any workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from covray.chains.dataset import ChainDataset
from covray.chains.sentences import micro_batches
from covray.config import FrameNoiseConfig, TrainConfig
from covray.errors import ConfigError
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.model import Batch
from covray.models.tokenizer.vqgan import codebook_neighbours
from covray.training.objectives.frame_noise import NEIGHBOURS, load_codebook
from covray.training.objectives.visual_sentences import VisualSentences, end_of_training
from covray.training.run import train
from covray.training.worker import WorkerContext
from covray.training.zero import require_whole_weights
from tests.support.datasets import CODES, TOKENS
from tests.support.trainings import STEPS, curve, stop_after

KINDS = ("random", "neighbour", "scheduled", "own")
STEP_TOKENS = 5 * 96


def noisy_config(tiny_config: Callable[..., TrainConfig], kind: str, out: str = "run", **changes: Any) -> TrainConfig:
    """Return a training with noise; frames of its own are written after every second step."""
    noise = {"sentences__frame_noise__kind": kind, "sentences__frame_noise__refresh_tokens": 2 * STEP_TOKENS}
    return tiny_config(out, **noise | changes)


def objective_of(config: TrainConfig) -> VisualSentences:
    return VisualSentences(config, torch.device("cpu"))


def batches_of(objective: VisualSentences, last: int, rank: int = 0, world: int = 1) -> list[Batch]:
    """Return the noisy micro-batches of the sentences before ``last``, with guesses filled in."""
    assert objective._noise is not None
    result = []
    for batch in micro_batches(objective.training, 0, last, rank, world, 2 * 96, objective._noise.add):
        if batch is not None:
            result.append(objective._noise.fill_guesses(objective.model, batch))
    return result


def sentences_of(batches: list[Batch], ids: Callable[[Batch], torch.Tensor]) -> list[tuple[int, ...]]:
    """Return the ids of every sentence of ``batches``, sorted."""
    sentences = []
    for batch in batches:
        for part in ids(batch).split(list(batch.lengths)):
            sentences.append(tuple(part.tolist()))
    return sorted(sentences)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_querys_frames_change_and_targets_stay_clean(
    kind: str, tiny_config: Callable[..., TrainConfig]
) -> None:
    objective = objective_of(noisy_config(tiny_config, kind))
    if objective.rewriter is not None:
        objective.rewriter.rewrite(0, WorkerContext())
    clean = objective_of(tiny_config()).training
    replaced = frames = 0
    for batch, plain in zip(batches_of(objective, 10), micro_batches(clean, 0, 10, 0, 1, 2 * 96), strict=True):
        assert plain is not None
        assert torch.equal(batch.targets, plain.targets)
        changed = (batch.ids != plain.ids).view(-1, 6, TOKENS)  # two chains of image, frame, label
        assert not changed[:, [0, 1, 2, 3, 5]].any()
        assert batch.ids.max() < CODES
        replaced += int(changed[:, 4].sum())
        frames += changed[:, 4].numel()
    assert 0.2 < replaced / frames < 0.8, "a share of one half, but for codes that are drawn again"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_after_every_step_equals_an_undisturbed_one(
    kind: str, tiny_config: Callable[..., TrainConfig], poll_every_step: None
) -> None:
    often, whole = (noisy_config(tiny_config, kind, out) for out in ("often", "whole"))
    train(whole)
    for _ in range(STEPS - 1):
        stop_after(often, 1)
    assert train(often) is not None
    assert curve(often) == curve(whole), "to the bit"
    train(tiny_config("clean"))
    clean, noisy = (
        [record["loss"] for record in curve(run) if "loss" in record] for run in (tiny_config("clean"), whole)
    )
    first = 2 if kind == "own" else 0  # nothing is written before two steps are trained
    assert noisy[:first] == clean[:first]
    assert noisy[first:] != clean[first:]


def test_without_noise_a_run_is_what_it_was(tiny_config: Callable[..., TrainConfig]) -> None:
    config = tiny_config()
    named = tiny_config(sentences__frame_noise__kind="none", sentences__frame_noise__share=0.9)
    assert named.identity() == config.identity()
    assert "frame_noise" not in config.identity()["sentences"]
    (batch,) = micro_batches(objective_of(config).training, 0, 1, 0, 1, 1)
    assert batch is not None
    assert batch.target_ids is None


@pytest.mark.parametrize("kind", KINDS)
def test_noise_does_not_depend_on_workers(kind: str, tiny_config: Callable[..., TrainConfig]) -> None:
    objective = objective_of(noisy_config(tiny_config, kind))
    if objective.rewriter is not None:
        objective.rewriter.rewrite(0, WorkerContext())
    shared = batches_of(objective, 10, 0, 2) + batches_of(objective, 10, 1, 2)
    for ids in (lambda batch: batch.ids, lambda batch: batch.target_ids):
        assert sentences_of(shared, ids) == sentences_of(batches_of(objective, 10), ids)


def test_every_epoch_has_noise_of_its_own(tiny_config: Callable[..., TrainConfig]) -> None:
    objective = objective_of(noisy_config(tiny_config, "random", sentences__pairs=[0]))
    assert objective._noise is not None
    queries: dict[int, set[tuple[int, ...]]] = {}
    for index in range(3 * len(objective.training)):
        (batch,) = micro_batches(objective.training, index, index + 1, 0, 1, 1, objective._noise.add)
        assert batch is not None
        queries.setdefault(int(objective.training.rows(index)[-1]), set()).add(tuple(batch.ids.tolist()))
    assert all(len(inputs) == 3 for inputs in queries.values())


def test_neighbours_are_the_nearest_other_codes(tiny_config: Callable[..., TrainConfig]) -> None:
    codebook = load_codebook(ChainDataset(tiny_config().data))
    nearest = codebook_neighbours(codebook, NEIGHBOURS)
    distances = np.linalg.norm(codebook[:, None].astype(np.float64) - codebook, axis=-1)
    for code in range(CODES):
        assert code not in nearest[code]
        farthest = distances[code, nearest[code]].max()
        assert (distances[code] < farthest - 1e-6).sum() <= NEIGHBOURS  # itself among them


def test_guesses_are_the_likeliest_codes_after_the_clean_input(tiny_config: Callable[..., TrainConfig]) -> None:
    objective = objective_of(noisy_config(tiny_config, "scheduled", sentences__frame_noise__share=1.0))
    (batch,) = batches_of(objective, 1)
    assert batch.target_ids is not None
    logits = objective.model.logits(batch.target_ids, batch.lengths)
    expected = logits[4 * TOKENS - 1 : 5 * TOKENS - 1, :CODES].argmax(-1)
    assert torch.equal(batch.ids[4 * TOKENS : 5 * TOKENS], expected)


def test_own_frames_are_those_that_the_decoder_writes(tiny_config: Callable[..., TrainConfig]) -> None:
    objective = objective_of(noisy_config(tiny_config, "own", sentences__frame_noise__share=1.0))
    rewriter = objective.rewriter
    assert rewriter is not None
    assert not rewriter.is_due(9)
    assert rewriter.is_due(10), "after two steps of five sentences"
    rewriter.rewrite(10, WorkerContext())
    assert not rewriter.is_due(19)
    assert rewriter.is_due(20)
    decoder = LvmDecoder(objective.model, CODES, TOKENS, 4)
    assert objective._noise is not None
    for index in (10, 19):
        prompt = objective.training.sentence(index).ids[: 4 * TOKENS]
        expected = decoder.decode(prompt[:0], prompt[None], 1).ids.reshape(-1)
        (batch,) = micro_batches(objective.training, index, index + 1, 0, 1, 1, objective._noise.add)
        assert batch is not None
        assert batch.ids[4 * TOKENS : 5 * TOKENS].tolist() == expected.tolist()


def test_nothing_is_written_behind_the_end_of_a_training(tiny_config: Callable[..., TrainConfig]) -> None:
    for steps in ({}, {"optimizer__steps": None, "optimizer__epochs": 1.5}):
        changes: dict[str, Any] = {
            "sentences__frame_noise__refresh_tokens": 10**9,
            "sentences__frame_noise__share": 1.0,
            **steps,
        }
        objective = objective_of(noisy_config(tiny_config, "own", **changes))
        end = end_of_training(objective.training, objective.config)
        assert objective.rewriter is not None
        assert not objective.rewriter.is_due(end - 1)
        last_step = (end - 1) // 5 * 5
        objective.rewriter.rewrite(last_step, WorkerContext())
        assert objective.rewriter.tensors()["own_frames.indices"].tolist() == [*range(last_step, end)]


def test_without_frames_nothing_is_replaced(tiny_config: Callable[..., TrainConfig]) -> None:
    for kind in KINDS:
        config = noisy_config(
            tiny_config, kind, kind, sentences__method="none", sentences__frame_noise__refresh_tokens=1
        )
        clean = tiny_config("clean " + kind, sentences__method="none")
        train(config)
        train(clean)
        assert curve(config) == curve(clean)


@pytest.mark.parametrize("values", [{"share": 0}, {"share": 1.1}, {"refresh_tokens": 0}, {"kind": "ss"}, {"rate": 1}])
def test_what_cannot_be_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(values))):
        FrameNoiseConfig.model_validate(values)


def test_noise_is_refused_where_it_cannot_be_computed(tiny_config: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ConfigError, match="needs objective: autoregressive, not block_diffusion"):
        noisy_config(tiny_config, "random", objective="block_diffusion")
    for kind in ("scheduled", "own"):
        require_whole_weights(noisy_config(tiny_config, kind, compute__deepspeed="zero2"))
        with pytest.raises(ConfigError, match=f"{kind} reads whole weights.*set compute.deepspeed=zero2"):
            require_whole_weights(noisy_config(tiny_config, kind, compute__deepspeed="zero3"))
    require_whole_weights(noisy_config(tiny_config, "neighbour", compute__deepspeed="zero3"))
