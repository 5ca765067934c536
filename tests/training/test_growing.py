"""Trainings on a dataset that has grown, and on several datasets."""

from __future__ import annotations

from collections.abc import Callable

from covray.chains.dataset import ChainDataset
from covray.config import TrainConfig
from covray.distributed.train_checks import check, open_run
from covray.training.metrics_log import METRICS_FILE
from covray.training.run import train
from tests.support.datasets import append_pairs
from tests.support.trainings import curve


def test_a_training_on_the_first_version_continues_to_the_same_losses(tiny_config: Callable[..., TrainConfig]) -> None:
    before, begun, new = tiny_config("before"), tiny_config("begun"), tiny_config("new")
    train(before)
    checked = check(begun, open_run(begun.out))
    checked.record(checked.config, None).write(begun.out)
    open_run(begun.out).folder.write_bytes(METRICS_FILE, b"")  # from its first metrics on a run is bound to its data
    append_pairs(begun.data, {"depth": 6, "pose": 8}, ("diffusion", "linear"), (3,))

    output = open_run(begun.out)
    output.inspect()
    continued = check(begun, output)
    assert continued.fingerprints == checked.fingerprints
    assert continued.config.data == ChainDataset(begun.data, version=1).reference
    train(continued.config)
    assert curve(continued.config) == curve(before)

    fresh = check(new, open_run(new.out))
    assert fresh.fingerprints["data"] != checked.fingerprints["data"]
    assert fresh.config.data == new.data
    train(fresh.config)
    assert curve(fresh.config) != curve(before)
