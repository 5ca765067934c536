"""Memory of a training worker that reads ten million chains, and its rate beside that on ten thousand.

    python benchmarks/chains.py
    python benchmarks/chains.py --chains 1000000 --tokens-per-image 256 --result benchmarks/results/chains.md

Writes two token files (``covray/chains/token_files.py``), as the first training on a dataset does: of a small dataset,
and of one with ``--chains`` chains of 4 pictures. Pair ids are random and distinct; the tokens are random ones that
repeat every ``BLOCK`` rows, so that the file can be written at the speed of the disk. The shards that it stands beside
hold a few rows only: a worker with a token file does not read them.

A process of its own for each dataset then does what a training's worker does: maps the file and sorts its rows
(``MappedChains``), draws an epoch, and assembles sentences of random pairs as tensors (``micro_batches``). Anonymous
memory is what the worker needs; mapped pages of the file are counted apart, as the system takes them back when another
program needs the memory. The processes take turns, and the median of their rates counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import torch
from results_file import write_result
from sentences import LENGTH, Shape, write_dataset

from covray.chains.dataset import ChainDataset
from covray.chains.mapped import MappedChains, Source
from covray.chains.sentences import Sentences, micro_batches, step_bounds
from covray.chains.token_files import FOLDER, token_file
from covray.config import SentencesConfig

SMALL = 10_000
BLOCK = 32_768
"""Rows of a record batch, whose tokens are those of every other one."""
CODES, PAIRS = 2048, 3
BATCH_TOKENS, MICRO_TOKENS = 172_032, 8192
SAMPLE_S = 0.02
MIB = 2**20


@dataclass(frozen=True)
class Figures:
    """What one process measured."""

    map_s: float
    draw_s: float
    anonymous_mib: float
    """The most while rows are sorted, an epoch is drawn and sentences are assembled, imports included."""
    imports_mib: float
    mapped_mib: float
    """Pages of files at the end."""
    cpu_rate: float
    """Tokens a second of the processor's time."""
    wall_rate: float


def shape_of(tokens_per_image: int) -> Shape:
    return Shape("chains", CODES, tokens_per_image, PAIRS, LENGTH * (PAIRS + 1) * tokens_per_image)


def write_chains(out: Path, chains: int, tokens_per_image: int) -> None:
    """Write a dataset with few rows, and beside it a token file of ``chains`` rows."""
    write_dataset(str(out), shape_of(tokens_per_image), BLOCK // 64, BLOCK)
    path = token_file(ChainDataset(str(out)), 1)
    assert path is not None
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        schema, first = reader.schema, reader.get_batch(0)
        pictures = schema.field("tokens").type.list_size // tokens_per_image
        generator = np.random.default_rng(0)
        size = BLOCK * pictures * tokens_per_image
        tokens = pa.array(generator.integers(0, CODES, size, dtype=np.uint16))
        # Distinct, in no order, and of both signs, as the beginnings of SHA-256 are.
        multiplier, offset = np.uint64(0x9E3779B97F4A7C15), np.uint64(12345)
        aside = path.with_suffix(".part")
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for start in range(0, chains, BLOCK):
                count = min(BLOCK, chains - start)
                ids = (np.arange(start, start + count, dtype=np.uint64) * multiplier + offset).view(np.int64)
                tasks = pa.array(np.where(np.arange(count) % 2, "depth", "segmentation"))
                columns = {
                    "pair_id": pa.array(ids),
                    "task": tasks,
                    "split": pa.array(["train"]).take(pa.array(np.zeros(count, np.int32))),
                    "tokens": pa.FixedSizeListArray.from_arrays(
                        tokens.slice(0, count * pictures * tokens_per_image), type=schema.field("tokens").type
                    ),
                }
                arrays = [columns.get(name, pa.nulls(count, schema.field(name).type)) for name in schema.names]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
        del first
    os.replace(aside, path)


class PeakMemory:
    """The most anonymous memory of this process, looked at every ``SAMPLE_S``."""

    def __init__(self) -> None:
        self.most_mib = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.most_mib = max(self.most_mib, status_mib("RssAnon"))

    def end(self) -> float:
        self._ended.set()
        self._thread.join()
        return max(self.most_mib, status_mib("RssAnon"))


def status_mib(key: str) -> float:
    """Return a figure of /proc/self/status in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status: has no {key}; this benchmark needs Linux")


def work(out: str, tokens_per_image: int, sentences_count: int) -> Figures:
    """Do what a worker does, and return what it took."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    config = SentencesConfig(method="diffusion", lengths=(LENGTH,), pairs=(PAIRS,))
    imports = status_mib("RssAnon")
    memory = PeakMemory()
    started = time.perf_counter()
    chains = MappedChains([Source(ChainDataset(out))], config, "train")
    map_s = time.perf_counter() - started
    sentences = Sentences(chains, config, shape_of(tokens_per_image).context, seed=0)
    started = time.perf_counter()
    sentences.rows(0)
    draw_s = time.perf_counter() - started
    count = min(sentences_count, len(sentences))
    cpu, wall, first, tokens = time.process_time(), time.perf_counter(), 0, 0
    while first < count:
        last = min(step_bounds(sentences, first, BATCH_TOKENS), len(sentences))
        for batch in micro_batches(sentences, first, last, 0, 1, MICRO_TOKENS):
            assert batch is not None  # one worker is the busiest
            tokens += len(batch.ids)
        first = last
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return Figures(map_s, draw_s, memory.end(), imports, status_mib("RssFile"), tokens / cpu, tokens / wall)


def in_process(out: Path, options: argparse.Namespace) -> Figures:
    """Run ``work`` in a new process."""
    command = [sys.executable, __file__, "--worker", str(out), "--tokens-per-image", str(options.tokens_per_image)]
    command += ["--sentences", str(options.sentences)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Figures(**json.loads(done.stdout))


def report_row(name: str, runs: list[Figures], file_bytes: int) -> str:
    rates = [run.cpu_rate / 1e6 for run in runs]
    walls = statistics.median(run.wall_rate / 1e6 for run in runs)
    return (
        f"| {name} | {file_bytes / 2**30:.2f} | {max(run.anonymous_mib for run in runs):.0f} "
        f"| {statistics.median(run.imports_mib for run in runs):.0f} | {max(run.mapped_mib for run in runs):.0f} "
        f"| {statistics.median(run.map_s for run in runs):.2f} | {statistics.median(run.draw_s for run in runs):.2f} "
        f"| {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}); wall {walls:.0f} |"
    )


def main() -> None:
    """Write the datasets, measure, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chains", type=int, default=10_000_000)
    parser.add_argument("--tokens-per-image", type=int, default=64)
    parser.add_argument("--sentences", type=int, default=100_000, help="sentences that a worker assembles, at most")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="folder for the files, which are deleted")
    parser.add_argument("--result", type=Path, help="Markdown file to write")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(asdict(work(options.worker, options.tokens_per_image, options.sentences))))
        return
    scratch = Path(tempfile.mkdtemp(dir=options.scratch))
    try:
        runs: dict[int, list[Figures]] = {SMALL: [], options.chains: []}
        sizes = {}
        seconds = 0.0
        for chains in runs:
            started = time.perf_counter()
            write_chains(scratch / str(chains), chains, options.tokens_per_image)
            seconds = time.perf_counter() - started
            sizes[chains] = sum(file.stat().st_size for file in (scratch / str(chains) / FOLDER).iterdir())
        for _ in range(options.repetitions):
            for chains, figures in runs.items():
                figures.append(in_process(scratch / str(chains), options))
    finally:
        shutil.rmtree(scratch)
    report = [
        "| chains | token file, GiB | anonymous memory, most, MiB | of it after imports, MiB | mapped pages, MiB "
        "| map and sort, s | draw an epoch, s | assembly, M tokens/s |",
        "|---|---|---|---|---|---|---|---|",
        *(report_row(f"{chains:,}", figures, sizes[chains]) for chains, figures in runs.items()),
        "",
        f"Chains of {LENGTH} pictures of {options.tokens_per_image} tokens (the file also has the frames of the linear "
        f"method), sentences of {PAIRS} + 1 chains; at most {options.sentences:,} sentences a process, "
        f"{options.repetitions} processes of each that took turns: the most of memory, medians of seconds, rates as "
        "median (range) by CPU time and median by wall time. One thread. "
        f"The machine has {psutil.virtual_memory().total / 2**30:.0f} GiB; the large file was written in "
        f"{seconds:.0f} s, with tokens that repeat every {BLOCK:,} rows.",
    ]
    print("\n".join(report))
    if options.result:
        write_result(options.result, "Ten million chains" if options.chains == 10_000_000 else "Many chains",
                     ("torch", "pyarrow", "numpy"), report)  # fmt: skip


if __name__ == "__main__":
    main()
