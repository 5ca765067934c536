"""Tokens a second from Parquet to the tensors of a training step, on one core.

    python benchmarks/sentences.py
    python benchmarks/sentences.py --rows-per-file 64 --result benchmarks/results/sentences.md

Writes datasets of random tokens in covray's own layout, by both methods at L = 4, then times four things separately:
reading the shards into memory (``Chains.load``; tokens kept, not tokens read past), mapping their token file, which is
there after the first repetition (``MappedChains``), assembling an epoch of its sentences as tensors
(``micro_batches``), and drawing the epoch (who meets whom), which happens once in it. The budget is 2
million tokens a second each; a step of the paper has 172,032. Files hold 64 rows, as a build writes for one task, or 9,
about what it writes when seven tasks are mixed: small ones, whose opening costs more than their tokens.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from results_file import write_result

from covray.chains.audit import audit_dataset
from covray.chains.dataset import ChainDataset
from covray.chains.loading import Chains
from covray.chains.mapped import MappedChains, Source
from covray.chains.sentences import Sentences, micro_batches, step_bounds
from covray.chains.shard_rows import alphas_of, frame_order, shard_schema
from covray.config import SentencesConfig
from covray.io import storage

TASKS = ("depth", "segmentation")
METHODS = ("diffusion", "linear")
LENGTH = 4
BATCH_TOKENS, MICRO_TOKENS = 172_032, 8192


@dataclass(frozen=True)
class Shape:
    """What is measured: pictures of so many tokens in sentences of so many pairs."""

    name: str
    codes: int
    tokens_per_image: int
    pairs: int
    context: int


SHAPES = (Shape("nano", 2048, 64, 3, 1024), Shape("LVM", 8192, 256, 3, 4096))


def write_dataset(out: str, shape: Shape, rows: int, rows_per_file: int) -> None:
    """A finished dataset folder of ``rows`` pairs a task with random tokens, which no encoding can shorten."""
    generator = np.random.default_rng(0)
    order = frame_order(METHODS, alphas_of(LENGTH))
    config = {"lengths": [LENGTH], "alphas": [], "methods": list(METHODS), "keep_noise": False}
    storage.write_json(
        storage.join(out, "_dataset.json"),
        {
            "version": 1,
            "config": config,
            "identity": {},
            "fingerprints": {},
            "tokenizer_size_px": 16,
            "tokens_per_image": shape.tokens_per_image,
        },
    )

    def pictures(count: int) -> pa.Array:
        flat = generator.integers(0, shape.codes, count * shape.tokens_per_image, dtype=np.uint16)
        return pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * shape.tokens_per_image, flat)

    schema = shard_schema(keep_noise=False)
    pair_ids = generator.permutation(len(TASKS) * rows)
    for number, task in enumerate(TASKS):
        folder = Path(out, "shards", f"task={task}")
        folder.mkdir(parents=True)
        for at in range(0, rows, rows_per_file):
            count = min(rows_per_file, rows - at)
            methods = pa.array([method for method, _ in order] * count)
            alphas = pa.array([alpha for _, alpha in order] * count, pa.float32())
            frames = pa.StructArray.from_arrays(
                [methods, alphas, pictures(count * len(order))], fields=list(schema.field("frames").type.value_type)
            )
            columns = {
                "pair_id": pa.array(pair_ids[number * rows + at :][:count]),
                "split": pa.array(["train"] * count),
                "source": pictures(count),
                "label": pictures(count),
                "frames": pa.ListArray.from_arrays(np.arange(count + 1, dtype=np.int32) * len(order), frames),
            }
            arrays = [columns.get(name, pa.nulls(count, schema.field(name).type)) for name in schema.names]
            table = pa.Table.from_arrays(arrays, schema=schema).drop_columns("task")
            pq.write_table(table, folder / f"{at:08}.parquet")
    audit_dataset(out, pair_ids).write(out)


class Clock:
    """Seconds of CPU time (all threads of this process) and of wall time since it was made."""

    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def read(self) -> np.ndarray:
        """[CPU, wall]."""
        return np.array([time.process_time() - self.cpu, time.perf_counter() - self.wall])


def measure(shape: Shape, dataset: ChainDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens a second of loading, mapping and assembly, and seconds of drawing an epoch; each by [CPU, wall]."""
    config = SentencesConfig(method="diffusion", lengths=(LENGTH,), pairs=(shape.pairs,))
    clock = Clock()
    size = Chains.load(dataset, config, "train").tokens.size
    loaded = clock.read()
    clock = Clock()
    chains = MappedChains([Source(dataset)], config, "train")
    mapped = clock.read()
    sentences = Sentences(chains, config, shape.context, seed=0)
    clock = Clock()
    sentences.rows(0)
    drawn = clock.read()
    clock = Clock()
    first = tokens = 0
    while first < len(sentences):
        last = min(step_bounds(sentences, first, BATCH_TOKENS), len(sentences))
        for batch in micro_batches(sentences, first, last, 0, 1, MICRO_TOKENS):
            assert batch is not None  # one worker is the busiest
            tokens += len(batch.ids)
        first = last
    return size / loaded, size / mapped, tokens / clock.read(), drawn


def main() -> None:
    """Measure both shapes, print, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048, help="pairs of each of the two tasks")
    parser.add_argument("--rows-per-file", type=int, nargs="+", default=[64, 9])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--result", type=Path, help="Markdown file to write")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    report = [
        "| | tokens an image | sentence | rows a file | from Parquet, M tokens/s | mapped, M tokens/s "
        "| assembly, M tokens/s | drawing an epoch, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, rows_per_file in itertools.product(SHAPES, options.rows_per_file):
        with tempfile.TemporaryDirectory() as scratch:
            write_dataset(scratch, shape, options.rows, rows_per_file)
            runs = [measure(shape, ChainDataset(scratch)) for _ in range(options.repetitions)]
        loading, mapping, assembly, drawing = (list(figures) for figures in zip(*runs, strict=True))
        report.append(
            f"| {shape.name} | {shape.tokens_per_image} | {LENGTH} x ({shape.pairs} + 1) = {shape.context} tokens "
            f"| {rows_per_file} | {spread(loading)} | {spread(mapping)} | {spread(assembly)} "
            f"| {statistics.median(cpu for cpu, _ in drawing) * 1e3:.1f} |"
        )
    report += [
        "",
        f"{len(TASKS) * options.rows} pairs, {options.repetitions} repetitions: "
        "median (range) by CPU time, which the neighbours on a shared machine do not change, and median by wall time. "
        "One thread; the files are in the page cache.",
    ]
    print("\n".join(report))
    if options.result:
        packages = ("torch", "pyarrow", "numpy")
        write_result(options.result, "Visual sentences from Parquet", packages, report)


def spread(figures: list[np.ndarray]) -> str:
    """Median and range by CPU time, and the median by wall time, in millions."""
    cpu, wall = (np.array(column) / 1e6 for column in zip(*figures, strict=True))
    return f"{np.median(cpu):.1f} ({cpu.min():.1f} to {cpu.max():.1f}); wall {np.median(wall):.1f}"


if __name__ == "__main__":
    main()
