"""A command says what it does while someone waits, ends by SIGTERM as by Ctrl-C, and with --debug says why."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from covray import progress
from covray.cli.waiting import informed

ROOT = Path(__file__).parents[2]

WAITS = """
import time
from covray.cli import waiting
from covray.progress import own_display, stage
waiting.FIRST_AFTER_S, waiting.EVERY_S, waiting._POLL_S = 0.2, 0.4, 0.02
with waiting.informed():
    with stage("reading [red]x") as reading:
        time.sleep(0.3)
        reading.say("half is read")
        time.sleep(0.6)
    with own_display():
        time.sleep(0.8)
    with stage("outer"), stage("writing"):
        time.sleep(0.3)
"""


def test_the_innermost_stage_is_shown_and_nothing_beside_another_display() -> None:
    done = subprocess.run([sys.executable, "-c", WAITS], cwd=ROOT, capture_output=True, text=True)
    lines = [line.rpartition(" (")[0] for line in done.stderr.splitlines()]
    assert lines == ["reading [red]x", "half is read", "writing"]
    assert done.stdout == ""


def test_a_stage_ends_with_its_block_also_by_an_error() -> None:
    with progress.stage("outer"):
        with contextlib.suppress(ValueError), progress.stage("inner"):
            assert progress.current() == "inner"
            raise ValueError
        assert progress.current() == "outer"
        with progress.own_display():
            assert progress.current() is None
    assert progress.current() is None


def test_notes_are_one_printable_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger("covray")
    with informed():
        log.debug("a detail")
        log.warning("a [red]b[/x]\n\x1b[31m%s", "c")
    assert capsys.readouterr().err == "covray: a [red]b[/x] ?[31mc\n"
    assert not log.handlers


def test_what_is_counted_says_how_far_it_is_and_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 2.0, 4.0, 0.0, 10.0])
    monkeypatch.setattr("covray.progress.time.monotonic", lambda: next(seconds))
    shown = [(item, progress.current()) for item in progress.counted("ab", "portraits rendered", 42)]
    assert shown == [
        ("a", "1 of 42 portraits rendered, 0.5/s, 82 s left"), ("b", "2 of 42 portraits rendered, 0.5/s, 80 s left"),
    ]  # fmt: skip
    assert [progress.current() for _ in progress.counted("a", "pairs made", None)] == ["1 pairs made, 0.1/s"]
    assert progress.current() is None


def _start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "covray", *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # A shell's background job ignores Ctrl-C, and hands that down.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code", "at"),
    # Its first line, whatever that is: how far the command has come in a second depends on the machine.
    [(signal.SIGTERM, 143, "pairs"), (signal.SIGINT, 130, "pairs"), (signal.SIGTERM, 143, "pairs made")],
    ids=["sigterm-at-its-start", "ctrl-c", "sigterm-at-work"],
)
def test_a_command_says_what_it_does_and_when_stopped_that_it_is(
    tmp_path: Path, number: int, code: int, at: str
) -> None:
    process = _start("pairs", "scenes", "--count", 100_000, "--size", 16, "--out", tmp_path / "pairs.parquet")
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        while at not in line:
            assert line, "it ended"
            line = process.stderr.readline()
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, out) == (code, "")
    assert err.splitlines()[-1] == "covray: stopped; run the same command again to continue"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "statement"),
    [("slow", "import slow"), ("trimesh/slow", "load().normals()"), ("another/slow", "load().normals()")],
)
def test_a_stop_in_code_that_ignores_any_exception_closes_what_is_open(
    tmp_path: Path, file: str, statement: str
) -> None:
    """So do some libraries while they are imported, and trimesh at work: the stop waits for the end of it.

    Of any other code it is seen a second later that the command goes on, but not while it closes what is open.
    """
    ignores = "try:\n    signal.raise_signal(signal.SIGTERM)\n    time.sleep(0.3)\nexcept BaseException:\n    pass\n"
    (tmp_path / "slow.py").write_text(f"import signal, time\n{ignores}")
    package = tmp_path / Path(file).parent
    package.mkdir(exist_ok=True)
    normals = "def normals():\n" + textwrap.indent(ignores, "    ")
    if package != tmp_path:
        (package / "slow.py").write_text(f"import signal, time\n{normals}")
        (package / "__init__.py").write_text("")
    script = (
        "import importlib, time\n"
        "from covray.cli.app import main\n"
        "import covray.cli.app as app\n"
        f"def load():\n    return importlib.import_module({file.replace('/', '.')!r})\n"
        "def command(**_):\n"
        "    try:\n"
        f"        {statement}\n"
        "        time.sleep(20)\n"
        "    finally:\n"
        "        time.sleep(1.5)\n"
        "        print('closed', flush=True)\n"
        "app.app = command\n"
        "main()\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (143, "closed\n"), done.stderr


def test_a_stop_that_python_would_ignore_ends_the_command() -> None:
    """An exception in a finaliser is printed and forgotten, that of a signal too."""
    script = (
        "import signal\n"
        "from covray.cli.app import _ended_by_signals\n"
        "class Finalised:\n"
        "    def __del__(self):\n"
        "        signal.raise_signal(signal.SIGTERM)\n"
        "with _ended_by_signals():\n"
        "    Finalised()\n"
        "    print('went on')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr == "covray: stopped; run the same command again to continue\n"


@pytest.mark.parametrize("arguments", [["inspect", "absent", "--debug"], ["--debug", "inspect", "absent"]])
def test_debug_shows_the_cause_above_the_line(tmp_path: Path, arguments: list[str]) -> None:
    process = _start(*arguments)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Traceback" in err
    assert "DatasetError" in err
    assert err.splitlines()[-1].startswith("covray: absent")
