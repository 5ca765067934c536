"""A build of a million pairs whose work costs nothing: what Ray Data, the checkpoint and the audit cost by themselves.

    python benchmarks/rows.py --rows 1000000 --result benchmarks/results/rows.md

The manifest has a million rows; every step of ``covray build`` is the real one but two: pictures are not read, and an
actor copies random tokens. The build is killed when nine tenths are written, and continued. Shown: memory of the
driver, pairs a second, files, and how long the continuation takes until an actor works.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from results_file import write_result

from covray.chains.shard_rows import frame_order, shard_schema, union_alphas
from covray.config import BuildConfig, load_config
from covray.distributed import build as building
from covray.io.images import Picture
from covray.pairs.manifest import ManifestWriter, Pair
from covray.tasks import TASKS

TOKENS = 64
STARTED = "started"
"""A file of the build's folder's neighbour: when the first actor of a run took a block."""


def prepare(table: pa.Table, **_: Any) -> pa.Table:
    """Instead of reading pictures: the columns that the stub needs."""
    return table.select(["pair_id", "task", "split"])


class Stub:
    """Instead of a ``ChainActor``: random tokens, some microseconds a row."""

    def __init__(self, config: BuildConfig, facts: Any, meter: Any):
        del facts
        self.meter, self.out = meter, config.out
        self.frames = frame_order(config.methods, union_alphas(config.lengths))
        self.codes = np.random.default_rng(0).integers(0, 1024, 1 << 20).astype(np.uint16)
        meter.join.remote("stub")

    def __call__(self, table: pa.Table) -> pa.Table:
        started = time.time()
        Path(f"{self.out}.{STARTED}").touch()
        rows, frames = len(table), len(self.frames)

        def tokens(count: int) -> pa.Array:
            offsets = pa.array(np.arange(count + 1, dtype=np.int32) * TOKENS)
            return pa.ListArray.from_arrays(offsets, pa.array(self.codes[: count * TOKENS]))

        of_frames = pa.StructArray.from_arrays(
            [
                pa.array([method for method, _ in self.frames] * rows),
                pa.array(np.tile(np.array([alpha for _, alpha in self.frames], np.float32), rows)),
                tokens(rows * frames),
            ],
            ["method", "alpha", "tokens"],
        )
        schema = shard_schema(False)
        columns = {name: table[name] for name in ("pair_id", "task", "split")}
        columns |= {"source": tokens(rows), "label": tokens(rows)}
        columns["frames"] = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * frames), of_frames)
        columns |= {field.name: pa.nulls(rows, field.type) for field in schema if field.name not in columns}
        done = pa.table({field.name: columns[field.name] for field in schema}).cast(schema)
        self.meter.report.remote("stub", started, time.time(), rows, 0, 0, 0)
        return done


def run(pairs: str, out: str, rows_per_block: int) -> None:
    """The build, as its own process."""
    building.prepare, building.ChainActor = prepare, Stub
    options = {"pairs": pairs, "out": out, "rows_per_block": rows_per_block, "actors.max": 1, "check_endpoints": 0}
    print(json.dumps(building.build(load_config(BuildConfig, None, options)).to_json()))


def write_manifest(path: Path, rows: int) -> None:
    """``rows`` pairs of pictures that need not exist."""
    tasks = list(TASKS)
    with ManifestWriter(str(path)) as writer:
        for number in range(rows):
            image = Picture(uri=f"images/{number // 7:08d}.jpg")
            writer.add(Pair(tasks[number % 7], "train", image, Picture(uri=f"labels/{number:08d}.png"), {}))


def committed(out: Path) -> int:
    """Rows whose files are committed."""
    files = [file for file in (out / "_checkpoint").glob("*.parquet") if "pending" not in file.name]
    return sum(pq.read_metadata(file).num_rows for file in files)


class Watch(threading.Thread):
    """The largest memory of a process without its children, in MiB, twice a second."""

    def __init__(self, process: subprocess.Popen[str]):
        super().__init__(daemon=True)
        self.process, self.largest, self.samples = process, 0.0, []  # type: ignore[var-annotated]

    def run(self) -> None:
        while self.process.poll() is None:
            try:
                used = psutil.Process(self.process.pid).memory_info().rss / 2**20
            except psutil.NoSuchProcess:
                return
            self.samples.append((time.time(), used))
            self.largest = max(self.largest, used)
            time.sleep(0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rows-per-block", type=int, default=1024)
    parser.add_argument("--result", type=Path)
    parser.add_argument("--run", nargs=2, metavar=("PAIRS", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        run(*given.run, given.rows_per_block)
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Path(folder), given.rows, given.rows_per_block)
    print("\n".join(lines))
    if given.result:
        write_result(given.result, "A build without its work", ("ray", "pyarrow"), lines)


def measure(folder: Path, rows: int, rows_per_block: int) -> list[str]:
    """The table of the result."""
    pairs, out = folder / "pairs.parquet", folder / "chains"
    began = time.monotonic()
    write_manifest(pairs, rows)
    writing = time.monotonic() - began
    command = [sys.executable, __file__, "--rows-per-block", str(rows_per_block), "--run", str(pairs), str(out)]
    start = functools.partial(subprocess.Popen, command, stdout=subprocess.PIPE, text=True)
    first_block = Path(f"{out}.{STARTED}")

    def to_first_block(began: float) -> float:
        while not first_block.exists():
            time.sleep(0.02)
        return time.time() - began

    begun = time.time()
    process = start()
    watch = Watch(process)
    watch.start()
    starting = to_first_block(begun)
    while committed(out) < 0.9 * rows:
        assert process.poll() is None, f"ended with {process.returncode}"
        time.sleep(0.5)
    until_killed = time.time() - begun
    process.kill()
    process.wait()
    before = committed(out)
    first_block.unlink()

    begun = time.time()
    process = start()
    again = Watch(process)
    again.start()
    resuming = to_first_block(begun)
    said, _ = process.communicate()
    finishing = time.time() - begun
    assert process.returncode == 0, said
    audit = json.loads(said.splitlines()[-1])
    assert audit["written"] == rows, audit
    shards = list((out / "shards").rglob("*.parquet"))
    size = sum(file.stat().st_size for file in shards)
    quarter = [used for at, used in watch.samples if at < watch.samples[0][0] + until_killed / 4]
    return [
        "| what | measured |",
        "|---|---|",
        f"| pairs, of a block | {rows:,}, {rows_per_block:,} |",
        f"| manifest written | {writing:.0f} s, {rows / writing:,.0f} pairs/s |",
        f"| first block taken after | {starting:.0f} s |",
        f"| killed after | {until_killed:.0f} s, {before:,} pairs committed |",
        f"| pairs a second | {before / (until_killed - starting):,.0f} |",
        f"| memory of the driver, first quarter and whole | {max(quarter):,.0f} and {watch.largest:,.0f} MiB |",
        f"| continued: first block taken after | {resuming:.0f} s |",
        f"| continued: done, with the audit, after | {finishing:.0f} s |",
        f"| memory of the continuing driver | {again.largest:,.0f} MiB |",
        f"| shards | {len(shards):,} files, {size / 2**20:,.0f} MiB |",
    ]


if __name__ == "__main__":
    main()
