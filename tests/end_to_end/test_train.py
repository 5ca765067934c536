"""Trainings as processes of their own on one Ray: what workers find is one line; ZeRO's losses are the plain ones."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial

import pytest

from covray.config import TrainConfig
from covray.training.run import train as train_in_process
from tests.support.commands import finish_training
from tests.support.trainings import curve

pytestmark = [pytest.mark.ray, pytest.mark.end_to_end]
OnRay = partial[subprocess.CompletedProcess[str]]


def test_a_mistake_that_workers_find_is_one_line(
    start_training: Callable[..., subprocess.Popen[str]], tiny_config: Callable[..., TrainConfig], run_on_ray: OnRay
) -> None:
    training = start_training(tiny_config(optimizer__learning_rate=1e38, optimizer__warmup=0), **run_on_ray.keywords)
    said = training.communicate(timeout=600)[1]
    assert training.returncode == 2
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("covray: step ")
    assert "not finite; lower optimizer.learning_rate" in last


def test_two_workers_with_zero_make_the_losses_of_one_without(
    start_training: Callable[..., subprocess.Popen[str]], tiny_config: Callable[..., TrainConfig], run_on_ray: OnRay
) -> None:
    workers = {"workers__count": 2, "workers__cpus": 0.5}
    one_worker = tiny_config("plain", optimizer__steps=20, validate_every_steps=20)
    train_in_process(one_worker)
    plain = [record["loss"] for record in curve(one_worker) if "loss" in record]
    assert len(plain) == 20
    for stage in ("zero2", "zero3"):
        config = tiny_config(stage, optimizer__steps=20, validate_every_steps=20, compute__deepspeed=stage, **workers)
        finish_training(start_training(config, **run_on_ray.keywords))
        losses = [record["loss"] for record in curve(config) if "loss" in record]
        assert losses == pytest.approx(plain, rel=1e-4), stage
