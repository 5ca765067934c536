"""The driver that ``covray train``, ``covray vlm train`` and ``covray think train`` share, without Ray's workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from covray.distributed import train as driver
from covray.distributed.train import train
from covray.distributed.train_aligner import train_aligner
from covray.distributed.train_vlm import train_vlm
from covray.errors import CovrayError
from covray.io.storage import Folder
from covray.training.metrics_log import METRICS_FILE
from covray.training.records import RunRecord, TrainResult
from tests.support.thinking import write_features

ROW = '{"step": 1, "loss": 2.0}\n'


@pytest.fixture
def without_workers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Put in place of Ray's workers a function that writes what they write; return the configurations it got."""
    trained = []

    @contextmanager
    def session() -> Iterator[int]:
        yield 2

    def work(config: Any, folder: Folder, *_: Any) -> TrainResult:
        trained.append(config)
        folder.write_bytes(METRICS_FILE, ROW.encode())
        if len(trained) == 1:
            raise KeyboardInterrupt
        result = TrainResult.model_construct(steps=1, loss=2.0)
        result.write(folder)
        return result

    monkeypatch.setattr(driver, "ray_session", session)
    monkeypatch.setattr(driver.ray, "cluster_resources", lambda: {"CPU": 8.0})
    monkeypatch.setattr(driver, "run_workers", work)
    monkeypatch.setattr(TrainResult, "read", classmethod(lambda cls, folder: "the result"))
    return trained


@pytest.mark.parametrize("command", ["train", "vlm", "aligner"])
def test_a_training_is_continued_and_a_finished_one_only_read(
    command: str, request: pytest.FixtureRequest, without_workers: list[Any]
) -> None:
    call: Callable[..., Any] = {"train": train, "vlm": train_vlm, "aligner": train_aligner}[command]
    make = request.getfixturevalue({"train": "tiny_config"}.get(command, f"{command}_config"))
    options: dict[str, Any] = {"compute__deepspeed": "auto", "compute__dtype": "auto", "compute__threads": None}
    if command == "aligner":
        data = (write_features(request.getfixturevalue("features_config")()),)
        del options["compute__threads"]
    else:
        data = ()
    config = make(*data, **options)
    with pytest.raises(KeyboardInterrupt):
        call(config)
    begun = RunRecord.read(config.out)
    assert begun.identity == without_workers[0].identity()
    optimizer = config.optimizer.model_copy(update={"learning_rate": 0.5})
    with pytest.raises(CovrayError, match=r"another configuration: optimizer.learning_rate was 0.01, is 0.5"):
        call(config.model_copy(update={"optimizer": optimizer}))
    call(config)
    assert without_workers[1] == without_workers[0]
    assert "auto" not in without_workers[0].compute.model_dump().values()
    assert RunRecord.read(config.out) == begun
    seen: list[Any] = []
    assert call(config, seen.append) == "the result"
    assert [record["step"] for record in seen] == [1]
    assert len(without_workers) == 2
    assert Path(config.out, TrainResult.FILE).exists()
