"""An output folder: begun once, continued by the same command, never worked on by two."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from covray.config import TrackingConfig, TrainConfig
from covray.distributed import resumable
from covray.distributed.lock import Claim, _machine, _start_of
from covray.distributed.resumable import Output
from covray.errors import ConfigError, DatasetError
from covray.io import storage
from covray.io.records import Record


class Description(Record):
    FILE = "_thing.json"
    FIX = "make the thing again"
    ERROR = ConfigError

    identity: dict[str, Any]
    mlflow_run_id: str | None
    tracker_runs: dict[str, str] | None = None


def open_output(folder: Path, **options: Any) -> Output[Description]:
    return Output(str(folder), Description, "covray make", **{"result": "result.json", **options})


def begin(folder: Path) -> None:
    Description(identity={"a": 1}, mlflow_run_id=None).write(str(folder))


def test_a_fresh_folder_is_begun_and_then_continued(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with open_output(out) as output:
        assert (output.begun, output.finished) == (None, False)
        begin(out)
    with open_output(out) as output:
        assert output.begun is not None
        assert output.begun.identity == {"a": 1}
        assert not output.finished
    assert os.listdir(out) == ["_thing.json"]


@pytest.mark.parametrize("name", [Description.FILE, "_lock.0123456789ab.json"])
def test_a_file_that_is_written_by_another_command_is_no_stranger(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen while it is written aside, or left there by a kill: either way nothing has begun."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", stop)
        patched.setattr(os, "remove", lambda path: None)
        with pytest.raises(KeyboardInterrupt):
            storage.write_json(str(tmp_path / name), {})
    (left,) = os.listdir(tmp_path)
    assert left != name
    with open_output(tmp_path) as output:
        assert output.begun is None
    (tmp_path / ".profile").touch()
    with pytest.raises(DatasetError, match="holds files"), open_output(tmp_path):
        pytest.fail("it was opened")


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), open_output(tmp_path / "out"):
        raise ConfigError("a mistake that is found before anything is begun")
    assert not (tmp_path / "out").exists()


def test_files_of_something_else_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match=r"holds files that covray make did not write; give another --out$"):
        open_output(tmp_path).__enter__()
    assert os.listdir(tmp_path) == ["thesis.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        open_output(tmp_path / "file" / "out").__enter__()


def test_a_description_that_cannot_be_used_is_refused_and_the_folder_is_free_again(tmp_path: Path) -> None:
    (tmp_path / "_thing.json").write_text("{")
    with pytest.raises(ConfigError, match=r"_thing\.json: cannot be read .*; make the thing again"):
        open_output(tmp_path).__enter__()
    assert os.listdir(tmp_path) == ["_thing.json"]


def test_a_second_command_is_refused_while_the_first_is_at_work(tmp_path: Path) -> None:
    with open_output(tmp_path), pytest.raises(DatasetError, match=r"covray make .* is at work in this folder"):
        open_output(tmp_path).__enter__()
    with open_output(tmp_path):
        pass


def test_a_finished_folder_is_only_read(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / "result.json").touch()
    tmp_path.chmod(0o500)
    try:
        with open_output(tmp_path) as first, open_output(tmp_path) as second:
            assert first.finished
            assert second.finished
            assert sorted(os.listdir(tmp_path)) == ["_thing.json", "result.json"]
    finally:
        tmp_path.chmod(0o700)


def test_a_command_killed_after_its_result_leaves_no_claim_for_good(tmp_path: Path) -> None:
    killed = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    claim = Claim(
        command="covray make", host="here", process=killed.pid, machine=_machine(), started=_start_of(killed.pid)
    )
    begin(tmp_path)
    (tmp_path / "result.json").touch()
    claim.write(str(tmp_path), "_lock.0123456789ab.json")
    try:
        with open_output(tmp_path) as output:
            assert output.finished
        assert (tmp_path / "_lock.0123456789ab.json").exists(), "that of a command at work stays"
    finally:
        killed.kill()
        killed.wait()
    with open_output(tmp_path):
        pass
    assert sorted(os.listdir(tmp_path)) == ["_thing.json", "result.json"]


def test_a_command_without_a_last_file_always_locks(tmp_path: Path) -> None:
    begin(tmp_path)
    with open_output(tmp_path, result=None), pytest.raises(DatasetError, match="is at work"):
        open_output(tmp_path, result=None).__enter__()


def test_a_folder_that_is_finished_while_it_is_waited_for_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = open_output(tmp_path)

    def acquire_after_another_command() -> None:
        begin(tmp_path)
        (tmp_path / "result.json").touch()

    monkeypatch.setattr(output._lock, "acquire", acquire_after_another_command)
    with output:
        assert output.finished
        assert output.begun is not None


def test_another_configuration_is_refused_with_what_differs(tmp_path: Path) -> None:
    output = open_output(tmp_path)
    output.require_same({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 2}})
    output.require_same({"a": 1}, {"a": None}, open_matches=True)
    with pytest.raises(ConfigError, match=r"was begun with another configuration: b\.c was 2, .*3; give the same, or"):
        output.require_same({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    with pytest.raises(ConfigError, match="a was 1"):
        output.require_same({"a": 1}, {"a": None})


class FakeTrackers:
    """The trackers of a command, of which MLflow is the only one."""

    ended: list[tuple[str | None, str]]

    def __init__(self, config: TrainConfig, run_ids: Mapping[str, str | None], command: str):
        self.run_id = run_ids.get("mlflow") or "new"

    def start(self) -> dict[str, str]:
        written = Description.read(FakeTrackers.folder)
        FakeTrackers.written_before_start = written.mlflow_run_id
        return {"mlflow": self.run_id}

    def finish(self, status: str) -> bool:
        FakeTrackers.ended.append((self.run_id, status))
        return True

    folder: str
    written_before_start: str | None


@pytest.mark.parametrize(
    ("ending", "status"), [(None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (ValueError, "FAILED")]
)
@pytest.mark.parametrize("run_id", [None, "old"])
def test_the_run_of_mlflow_is_written_down_and_ends_as_the_command_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    ending: type[BaseException] | None,
    status: str,
    run_id: str | None,
) -> None:
    monkeypatch.setattr(resumable, "RunTrackers", FakeTrackers)
    FakeTrackers.ended, FakeTrackers.folder = [], str(tmp_path)
    config = TrainConfig(data="data", out=str(tmp_path), tracking=TrackingConfig(uri="none"))
    description = Description(identity={}, mlflow_run_id=run_id)

    def work(fail: Callable[[], None]) -> None:
        with open_output(tmp_path) as output, output.tracked(config, description) as (tracker, record):
            assert tracker.run_id == record.mlflow_run_id == (run_id or "new")  # type: ignore[attr-defined]
            assert Description.read(str(tmp_path)) == record
            fail()

    def fail() -> None:
        if ending is not None:
            raise ending

    if ending is None:
        work(fail)
    else:
        with pytest.raises(ending):
            work(fail)
    assert FakeTrackers.written_before_start == run_id
    assert FakeTrackers.ended == [(run_id or "new", status)]
