"""A task that is registered in one line is evaluated, tabulated, shown on the page and exported like the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from covray.chains.dataset import ChainDataset
from covray.config import GenerateConfig
from covray.evaluation.records import EvaluationResults
from covray.evaluation.results import choose_episodes, tabulate
from covray.evaluation.subjects import subjects_of
from covray.report.evaluation import write_evaluation_page
from covray.tasks import TASKS
from tests.support import toy_task

Write = Callable[..., Any]


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TASKS, toy_task.name, toy_task)


def test_an_eighth_task_is_scored_tabulated_and_shown(
    write_dataset: Write, write_manifest: Write, write_run: Write, config_of: Write, runner_of: Write, tmp_path: Path
) -> None:
    data, rows = write_dataset({"brightness": 12, "depth": 8})
    write_manifest(rows)
    run = write_run(data, method="none", tasks=("brightness",))
    config = config_of(data, adapters=(run,), tasks=("brightness",), sampling={"temperature": 1.0, "vote": 2})
    runner, episodes = runner_of(config)
    results = runner.run(episodes).to_pylist()
    assert {row["error"] for row in results} == {None}
    table = tabulate(results, subjects_of(config, ChainDataset(data)), 0)
    assert list(table.tasks) == ["brightness"]
    assert table.tasks["brightness"].primary == "level_error"
    assert "level_error" in table.lower_is_better
    assert {subject.name: subject.samples for subject in table.subjects if subject.kind == "adapter"} == {"tuned": 2}
    ceiling = [
        score.mean for score in table.scores if (score.subject, score.metric) == ("VQGAN ceiling", "level_error")
    ]
    assert ceiling[0] is not None
    assert choose_episodes(results, table).keys() == {"brightness"}
    whole = EvaluationResults(**dict(table), seconds=1.0, config=config.model_dump(mode="json"), fingerprints={})
    write_evaluation_page(whole, [], str(tmp_path / "index.html"))
    assert "Level error" in (tmp_path / "index.html").read_text()


def test_a_task_that_nobody_registered_is_refused_by_its_name() -> None:
    options = {"queries": ("a.png",), "out": "out"}
    assert GenerateConfig.model_validate(options | {"task": "brightness"}).task == "brightness"
    with pytest.raises(ValueError, match=r"no such task; the tasks are segmentation, .*, brightness"):
        GenerateConfig.model_validate(options | {"task": "cooking"})
