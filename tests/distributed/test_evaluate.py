"""What ``covray evaluate`` decides before an actor starts: who, on what, and every mistake in one line."""

from __future__ import annotations

import itertools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covray.chains.dataset import ChainDataset
from covray.cli import app as cli
from covray.config import EvaluateConfig
from covray.distributed.evaluate import _metric, evaluate, read_rows
from covray.distributed.evaluate_checks import list_episodes, prepare
from covray.errors import ConfigError
from covray.evaluation.answers import RESULT_SCHEMA
from covray.evaluation.pair_files import choose_pairs
from covray.evaluation.records import EvaluationRecord, SubjectScore
from covray.evaluation.subjects import Subject
from tests.support.commands import error_line

Write = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every refusal here comes before Ray is started."""

    def started() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("covray.distributed.evaluate.ray_session", started)


@pytest.fixture
def mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """The one line that a mistaken ``covray evaluate`` answers with: exit code 2, and no file more than before."""

    def mistake(*arguments: object) -> str:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()  # what preparing a test has said
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["covray", "evaluate", *map(str, arguments)])
            with pytest.raises(SystemExit) as end:
                cli.main()
        out, err = capsys.readouterr()
        assert end.value.code == 2, err
        assert out == ""
        assert sorted(tmp_path.rglob("*")) == before
        return error_line(err)

    return mistake


@pytest.fixture
def there(
    write_dataset: Write, write_manifest: Write, write_run: Write, tmp_path: Path
) -> tuple[str, list[dict[str, Any]], list[object]]:
    """A dataset, its rows, and a command line with which all is well (up to Ray)."""
    data, rows = write_dataset({"depth": 8, "edges": 4})
    manifest = write_manifest(rows)
    run = write_run(data, method="diffusion")
    command = ["--data", data, "--adapter", run, "--split", "val", "--manifest", manifest, "--out", tmp_path / "out"]
    return data, rows, command


def test_a_command_line_with_which_all_is_well_gets_to_ray(
    there: tuple[str, Any, list[object]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or the refusals below would prove nothing."""
    monkeypatch.setattr(sys, "argv", ["covray", "evaluate", *map(str, there[2])])
    with pytest.raises(AssertionError, match="Ray was started"):
        cli.app(standalone_mode=False)
    assert not (tmp_path / "out").exists(), "nothing is written before the tokenizer is known to be right"


def test_splits_and_tasks_that_are_not_there_are_refused(
    mistake: Callable[..., str], there: tuple[str, Any, list[object]]
) -> None:
    _, _, command = there
    assert "no good pairs in split test, only in train, val; set split" in mistake(*command, "--split", "test")
    assert "set example_split" in mistake(*command, "--set", "example_split=holdout")
    assert "no good pairs of pose in split val" in mistake(*command, "--tasks", "depth,pose")
    assert "tasks" in mistake(*command, "--tasks", "cooking")
    few = mistake(*command, "--set", "example_split=val", "--pairs", "1")
    assert "edges has 1 good pairs in split val, an episode needs 2" in few


def test_datasets_and_runs_that_are_none_are_refused(
    mistake: Callable[..., str], there: tuple[str, Any, list[object]], tmp_path: Path
) -> None:
    data, _, command = there
    assert "not a dataset; give the --out of a covray build" in mistake(*command, "--data", tmp_path)
    assert "data: is required" in mistake("--out", tmp_path / "out")
    assert "not a run" in mistake(*command, "--adapter", tmp_path)
    assert "baselines" in mistake(*command, "--baselines", "copy,oracle")
    Path(data, "_audit.json").unlink()
    assert "is unfinished; run the same covray build again" in mistake(*command)


def test_manifests_that_do_not_have_the_pairs_are_refused(
    mistake: Callable[..., str], there: tuple[str, Any, list[object]], write_manifest: Write, tmp_path: Path
) -> None:
    data, rows, command = there
    assert "nowhere.parquet" in mistake(*command, "--manifest", tmp_path / "nowhere.parquet")
    fewer = write_manifest(rows[4:], name="fewer.parquet")
    lacking = mistake(*command, "--manifest", fewer)
    assert re.search(r"lacks 4 of the \d+ pairs to evaluate, pair -?\d+ for one", lacking)
    text = tmp_path / "text.parquet"
    text.write_text("no manifest")
    assert str(text) in mistake(*command, "--manifest", text)
    # The build names its manifest as it was given: here by a path that is relative to another folder.
    without = [part for part in command if part != "--manifest" and not str(part).endswith("pairs.parquet")]
    assert "was built from pairs.parquet, which is not there any more; give it as --manifest" in mistake(*without)
    assert Path(data, "_dataset.json").exists()


def test_an_output_of_something_else_is_refused(
    mistake: Callable[..., str], there: tuple[str, Any, list[object]], tmp_path: Path
) -> None:
    _, _, command = there
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert "holds files that covray evaluate did not write" in mistake(*command)
    for text, message in (
        ('{"version": 2}', "is of version 2, not 1"),
        ('{"version": 1, "config": {}, "identity": {}}', "lacks fingerprints; give another --out"),
        ("{", "cannot be read"),
    ):
        (tmp_path / "out" / EvaluationRecord.FILE).write_text(text)
        assert message in mistake(*command)
    assert "cannot be written" in mistake(*command, "--out", tmp_path / "pairs.parquet" / "out")


def test_another_configuration_does_not_continue(
    there: tuple[str, Any, list[object]], write_run: Write, tmp_path: Path
) -> None:
    data, _, _ = there
    run = str(tmp_path / "runs" / "tuned")
    config = EvaluateConfig(
        data=data, out=str(tmp_path / "out"), adapters=(run,), split="val", manifest=str(tmp_path / "pairs.parquet")
    )
    EvaluationRecord(config={}, identity={"seed": 7}, fingerprints={}, subjects=[], mlflow_run_id=None).write(
        config.out
    )
    with pytest.raises(ConfigError, match=r"was begun with another configuration: .*seed was 7, is 0") as error:
        evaluate(config)
    assert "\n" not in str(error.value)


def test_an_evaluation_whose_folders_have_moved_continues(
    there: tuple[str, Any, list[object]], write_run: Write, tmp_path: Path
) -> None:
    data, _, _ = there
    names = (Path(data).name, "runs/tuned", "pairs.parquet")

    def config_below(root: Path, **changes: object) -> EvaluateConfig:
        dataset, run, manifest = (str(root / name) for name in names)
        values = {"data": dataset, "adapters": [run], "manifest": manifest, "split": "val", "out": str(root / "out")}
        return EvaluateConfig.model_validate(values | changes)

    work = prepare(config_below(tmp_path))
    record = EvaluationRecord(
        config={}, identity=work.config.identity(), fingerprints=work.fingerprints, subjects=[], mlflow_run_id=None
    )
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in (names[0], "runs", "pairs.parquet"):
        (tmp_path / name).rename(moved / name)
    record.write(str(moved / "out"))
    with pytest.raises(AssertionError, match="Ray was started"):
        evaluate(config_below(moved))
    with pytest.raises(ConfigError, match="was begun with another configuration: adapters"):
        evaluate(config_below(moved, adapters=[f"other={moved / 'runs' / 'tuned'}"]))


def test_what_does_not_decide_scores_is_no_part_of_the_identity(config_of: Write, tmp_path: Path) -> None:
    config = config_of("chains")
    same = config_of("chains", out="elsewhere", rows_per_block=3, actors={"max": 2}, tracking={"uri": "sqlite:///x.db"})
    assert same.identity() == config.identity()
    for change in ({"seed": 1}, {"batch": 5}, {"pairs": 2}, {"split": "train"}, {"selection": "similar"}):
        assert config_of("chains", **change).identity() != config.identity()


def test_every_subject_and_query_is_one_episode_with_an_id_of_its_own(write_dataset: Write) -> None:
    data, _ = write_dataset({"depth": 40, "edges": 40})
    queries = choose_pairs(ChainDataset(data), None, "val", None, 0, "split")
    subjects = [Subject(name, "adapter", "") for name in ("one", "two", "three")]
    episodes = list_episodes(subjects, queries)
    assert len(set(episodes["episode"].to_pylist())) == len(episodes) == 3 * len(queries) == 60
    alone = list_episodes(subjects[1:2], queries.slice(3, 1)).to_pylist()
    assert alone[0] in episodes.to_pylist(), "an id depends on nothing but subject and pair"
    order = [(row["subject"], row["task"]) for row in episodes.to_pylist()]
    changes = sum(first != second for first, second in itertools.pairwise(order))
    assert changes == 3 * 2 - 1, "a model is loaded once"


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    rows = [
        {
            "episode": number, "subject": subject, "task": task, "pair_id": number - 3, "examples": [1, -2],
            "values": [{"metric": "f", "value": None}], "counts": [[1, 2]], "images": [[3]],
            "log_likelihood": -1.5, "error": None,
        }
        for number, (task, subject) in enumerate((t, s) for t in ("edges", "depth") for s in ("b", "a") for _ in "12")
    ]  # fmt: skip
    table = pa.Table.from_pylist(rows, RESULT_SCHEMA)
    pq.write_to_dataset(table, os.fspath(tmp_path / "rows"), partition_cols=["task"])
    expected = sorted(rows, key=lambda row: (row["task"], row["subject"], row["pair_id"]))
    without = [{key: value for key, value in row.items() if key != "images"} for row in expected]
    assert read_rows(str(tmp_path)) == without, "tokens only where asked for"
    assert read_rows(str(tmp_path), [-3, 2]) == [row for row in expected if row["pair_id"] in (-3, 2)]


def test_a_subject_of_any_name_has_one_that_mlflow_takes() -> None:
    subject = "untuned diffusion L=4 (50%), ü"
    score = SubjectScore(task="depth", metric="abs_rel", subject=subject, mean=1.0, low=None, high=None, episodes=1)
    name = _metric(score)
    assert re.fullmatch(r"[\w\-. :/]+", name)
    assert name.startswith("depth/abs_rel/untuned diffusion L_4")
