"""Commands that start together in one folder and are killed at random moments write everything once.

The commands are processes without Ray, so that many moments can be tried; ``tests/chaos`` tries the real ones.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.commands import environment

ROWS = 40
SEEDS = int(os.environ.get("COVRAY_TEST_SEEDS", "3"))
COMMAND = """
import os, sys, time, uuid
from pathlib import Path
from typing import ClassVar

from covray.distributed.resumable import Output
from covray.errors import CovrayError
from covray.io.records import Record


class Description(Record):
    FILE = "_thing.json"
    FIX = "make it again"


out, rows, go = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
while not go.exists():
    time.sleep(0.002)
try:
    with Output(str(out), Description, "covray make", result="result.json") as output:
        if not output.finished:
            Description().write(output.folder)
            (out / "rows").mkdir(exist_ok=True)
            written = {int(path.name.split("-")[0]) for path in (out / "rows").iterdir()}
            for row in sorted(set(range(rows)) - written):
                time.sleep(0.04)
                (out / "rows" / f"{row}-{uuid.uuid4()}").touch()
            (out / "result.json").touch()
except CovrayError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def start(out: Path, go: Path) -> subprocess.Popen[str]:
    """Start a command that begins once the file ``go`` is there."""
    command = [sys.executable, "-c", COMMAND, str(out), str(ROWS), str(go)]
    return subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_row_is_written_once_however_often_commands_start_together_and_die(tmp_path: Path, seed: int) -> None:
    rng, out = random.Random(seed), tmp_path / "out"
    refusals: list[str] = []
    for number, kills in enumerate((rng.randint(1, 3), rng.randint(0, 2))):
        go = tmp_path / f"go-{number}"
        commands = [start(out, go) for _ in range(3)]
        time.sleep(0.5)
        go.touch()
        time.sleep(rng.uniform(0, 3))
        for command in rng.sample(commands, kills):
            command.kill()
        for command in commands:
            message = command.communicate(timeout=60)[1]
            assert command.returncode in (0, 2, -signal.SIGKILL), message
            if command.returncode == 2:
                refusals.append(message)
    last = start(out, go)
    assert last.wait(60) == 0, "it finishes what is left, and waits for nobody"

    written = Counter(int(path.name.split("-")[0]) for path in (out / "rows").iterdir())
    assert written == dict.fromkeys(range(ROWS), 1)
    assert sorted(path.name for path in out.iterdir()) == ["_thing.json", "result.json", "rows"]
    print(f"{len(refusals)} of 6 were refused")
    assert all("covray make (process " in refusal and refusal.count("\n") == 1 for refusal in refusals)
