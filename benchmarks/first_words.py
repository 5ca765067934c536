"""Measure how long each command is silent: the seconds to its first word, and the longest pause between two.

A pause ends with any output on stdout or stderr, or with the end of the command; neither is a terminal. The commands
run on the nano models, each on what the one before has written:

    python benchmarks/first_words.py --work /tmp/words
    python benchmarks/first_words.py --work /tmp/words --only pairs,view
"""

from __future__ import annotations

import argparse
import selectors
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from covray.recipes.nano.data import photograph_path


@dataclass(frozen=True)
class Silence:
    """What a person who waits for a command experiences, in seconds."""

    first_s: float
    longest_s: float
    total_s: float
    code: int


def listen(command: list[str], folder: Path) -> Silence:
    """Run a command in ``folder`` and time its output."""
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    started = last = time.monotonic()
    first_s: float | None = None
    longest_s = 0.0
    with selectors.DefaultSelector() as selector:
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                data = key.fileobj.read1()  # type: ignore[union-attr]
                now = time.monotonic()
                longest_s, last = max(longest_s, now - last), now
                if data and first_s is None:
                    first_s = now - started
                if not data:
                    selector.unregister(key.fileobj)
    code = process.wait()
    now = time.monotonic()
    total_s = now - started
    return Silence(total_s if first_s is None else first_s, max(longest_s, now - last), total_s, code)


def commands(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield the name and the words of each command, in an order in which each finds what it needs."""
    photographs = folder / "photographs"
    query = photographs / "0.png"
    yield "pairs scenes", "pairs scenes --count 20 --splits train=8,val=1,test=1 --out pairs.parquet"
    yield "pairs photos", f"pairs photos {photographs} --out photos.parquet"
    yield "build --plan", "build --plan --manifest pairs.parquet --out chains"
    yield "build", "build --manifest pairs.parquet --out chains --method linear"
    yield "view", "view chains"
    yield "inspect", "inspect chains"
    yield "train --plan", "train --plan --data chains --out run --method linear"
    yield "train", "train --data chains --out run --method linear --steps 4 --set optimizer.batch_tokens=4096"
    yield "export", "export run --merge --out merged"
    yield (
        "generate",
        f"generate --adapter run --task colorization --example {query} {query} --query {query} --out answers",
    )
    yield "evaluate", "evaluate --data chains --adapter run --out eval --episodes 2 --task depth"
    yield "report", "report eval"
    yield "sweep --plan", "sweep --plan --config sweep.yaml --data chains --out sweep"
    yield "sweep", "sweep --config sweep.yaml --data chains --out sweep --json"
    yield "plan", "plan build train"
    yield "doctor", "doctor"
    yield "fetch", "fetch"


SWEEP = """\
grid: {methods: [none], pairs: [1], lengths: [4]}
train: {optimizer: {steps: 2, batch_tokens: 2048}}
evaluate: {episodes: 1, tasks: [depth], baselines: [copy], untuned: false}
"""


def main() -> None:
    """Run the commands and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what the commands write")
    parser.add_argument("--only", help="first words of the commands to run, separated by commas")
    arguments = parser.parse_args()
    folder = arguments.work.absolute()
    (folder / "photographs").mkdir(parents=True, exist_ok=True)
    (folder / "sweep.yaml").write_text(SWEEP)
    shutil.copy(photograph_path("skimage/chelsea.png"), folder / "photographs" / "0.png")
    wanted = None if arguments.only is None else arguments.only.split(",")
    print("| command | first word | longest silence | in all | exit code |\n|---|---|---|---|---|", flush=True)
    for name, words in commands(folder):
        if wanted is not None and name.split()[0] not in wanted:
            continue
        silence = listen([sys.executable, "-m", "covray", *words.split()], folder)
        figures = f"{silence.first_s:.1f} s | {silence.longest_s:.1f} s | {silence.total_s:.1f} s | {silence.code}"
        print(f"| `{name}` | {figures} |", flush=True)


if __name__ == "__main__":
    main()
