"""Trainings on a dataset that has grown, and on several datasets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from covray.chains.audit import audit_dataset
from covray.chains.dataset import ChainDataset
from covray.chains.mapped import MappedChains, Source, count_queries
from covray.chains.records import DatasetRecord
from covray.chains.sentences import Sentences
from covray.config import SentencesConfig, TrainConfig
from covray.distributed.train_checks import check, open_run
from covray.errors import CovrayError, DatasetError
from covray.io import storage
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


@pytest.fixture
def halves(tiny_config: Callable[..., TrainConfig], tmp_path: Path) -> tuple[TrainConfig, str, str]:
    """A training, and its dataset once more as two: the rows with even and those with odd places."""
    config = tiny_config("whole")
    parts = []
    for number in range(2):
        part = str(tmp_path / f"part {number}")
        DatasetRecord.read(config.data).write(part)
        ids = []
        for task in ("depth", "edges"):
            table = ChainDataset(config.data).table(tasks=[task])
            table = table.take(list(range(number, len(table), 2)))
            folder = Path(part, "shards", f"task={task}")
            folder.mkdir(parents=True)
            pq.write_table(table.drop_columns("task"), folder / "part.parquet")
            ids += table["pair_id"].to_pylist()
        audit_dataset(part, np.array(ids)).write(part)
        parts.append(part)
    return config, parts[0], parts[1]


def test_two_datasets_with_natural_weights_equal_one_dataset_of_both(halves: tuple[TrainConfig, str, str]) -> None:
    config, first, second = halves
    train(config)
    for out, mix in (("halves", (second,)), ("weighted", (f"{second}=1",))):
        mixed = config.model_copy(update={"data": first, "mix": mix, "out": f"{config.out} {out}"})
        train(mixed)
        assert curve(mixed) == curve(config)


def test_a_weight_is_how_often_pairs_are_queries(halves: tuple[TrainConfig, str, str]) -> None:
    _, first, second = halves
    chosen = SentencesConfig(lengths=(3,))
    for weight in (0.5, 2.0, 0.3):
        sources = [Source(ChainDataset(first)), Source(ChainDataset(second), weight)]
        chains = MappedChains(sources, chosen, "train")
        sentences = Sentences(chains, chosen, 4096, seed=3)
        of_second = {tuple(row.tolist()) for row in (r["source"] for r in ChainDataset(second).rows(split="train"))}
        epochs = 10
        met: Counter[tuple[int, ...]] = Counter()
        for index in range(epochs * len(sentences)):
            row = sentences.rows(index)[-1:]
            met[tuple(chains.take(row, 3)[0, 0].tolist())] += 1
        assert len(sentences) == len(chains) - len(of_second) + max(1, round(weight * len(of_second)))
        times = [count for source, count in met.items() if source in of_second]
        assert len(times) == len(of_second)
        assert max(times) - min(times) <= 1, "each as often as the others"
        assert {count for source, count in met.items() if source not in of_second} == {epochs}
        assert count_queries(sources, chosen, "train") == len(sentences)


def test_what_cannot_be_mixed_is_refused_before_anything_starts(halves: tuple[TrainConfig, str, str]) -> None:
    config, first, second = halves

    def refused(message: str, **record: Any) -> None:
        values = storage.read_json(f"{second}/_dataset.json")
        storage.write_json(f"{second}/_dataset.json", values | record)
        mixed = config.model_copy(update={"data": first, "mix": (second,), "out": f"{config.out} refused"})
        with pytest.raises(CovrayError, match=message):
            check(mixed, open_run(mixed.out))
        storage.write_json(f"{second}/_dataset.json", values)

    record = storage.read_json(f"{second}/_dataset.json")
    refused("codebook", fingerprints=record["fingerprints"] | {"codebook": "0" * 64})
    refused("tokens", tokens_per_image=64)
    refused("--length 3,4", config=record["config"] | {"lengths": [4]})
    mixed = config.model_copy(update={"data": first, "mix": (first,), "out": f"{config.out} twice"})
    with pytest.raises(DatasetError, match="pairs are in two of the datasets"):
        check(mixed, open_run(mixed.out))
    good = config.model_copy(update={"data": first, "mix": (f"{second}=0.5",), "out": f"{config.out} good"})
    checked = check(good, open_run(good.out))
    assert set(checked.fingerprints) == {"backbone", "codebook", "data", "data.2"}
    assert checked.config.identity()["data_weights"] == [1.0, 0.5]
    assert "data_weights" not in config.identity()
