"""A map over Parquet files on a pool of actors that is exactly once: killed anywhere, continued by the same call.

Ray Data's checkpoint commits a block when its rows are written; the rows of committed blocks are not read again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.exceptions
from pyarrow import fs
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.checkpoint import CheckpointConfig

from covray.config import ActorsConfig, EngineConfig
from covray.config.fields import MOST_ROWS_PER_BLOCK
from covray.distributed.progress import BlockReport, PoolCounts, PoolProgress
from covray.distributed.session import READING_CPUS
from covray.errors import CovrayError, DatasetError, last_line
from covray.io.storage import Folder

TASK_CPUS = 0.5
"""Logical CPUs of a task that reads, decodes or writes: such tasks wait for storage, and must fit beside the actors."""
CHECKPOINT = "_checkpoint"
"""The folder, below a command's output, that says which blocks are written."""
_BLOCKS_PER_ACTOR = 4  # so that no actor waits long for the others at the end
_COMMITTED, _PENDING = ".parquet", ".pending.parquet"
_READERS = 16


@dataclass(frozen=True)
class RowsIn:
    """What a pool reads: Parquet files of one filesystem."""

    filesystem: fs.FileSystem
    files: Sequence[str]
    columns: list[str]
    id_column: str
    """An int64 column whose values are unique."""
    total: int
    """Rows of all files."""
    unit: str
    """What a row is called where progress is shown, in the plural."""


@dataclass(frozen=True)
class RowsOut:
    """What a pool writes: Parquet files below ``output``/``name``, in a folder for every value of ``partition``."""

    output: Folder
    name: str
    schema: pa.Schema
    partition: str
    parquet: Mapping[str, Any] = field(default_factory=dict)
    """How the files are written, by the names of pyarrow's writer."""


class PoolActor:
    """What the actors of all pools do beside their work: they join the progress, and report each block."""

    def __init__(self, progress: Any):
        """Join ``progress``, the handle of the ``ProgressActor``, once the actor is ready to work."""
        self._progress = progress
        self._name = ray.get_runtime_context().get_actor_id()
        progress.join.remote(self._name)

    def report(self, started: float, rows: int, rejected: int, **counts: Any) -> None:
        """Report a block that is done.

        Args:
            started: When it was begun, in seconds since the epoch.
            rows: Its rows.
            rejected: How many of them have an error.
            counts: Further fields of ``BlockReport``.
        """
        self._progress.report.remote(BlockReport(self._name, started, time.time(), rows, rejected, **counts))

    def report_rows(self, started: float, rows: pa.Table, **counts: Any) -> None:
        """Report a block whose ``rows`` are done: rejected are those with an ``error``. See ``report``."""
        self.report(started, len(rows), len(rows) - rows["error"].null_count, **counts)


@dataclass(frozen=True)
class Pool:
    """The actors that map blocks of rows."""

    actor: type[PoolActor]
    """Called with a block, it returns a row for each, with its id. Its class takes ``arguments`` and ``progress``."""
    arguments: Mapping[str, Any]
    options: PoolOptions
    """As ``pool_of`` returns them."""
    rows_per_block: int

    def map(self, blocks: Dataset, progress: Any) -> Dataset:
        """Return ``blocks`` as the actors map them, which report to ``progress``."""
        return blocks.map_batches(
            self.actor,
            fn_constructor_kwargs={**self.arguments, "progress": progress},
            batch_format="pyarrow",
            batch_size=self.rows_per_block,
            **self.options,
        )


def run_pool(pool: Pool, rows_in: RowsIn, rows_out: RowsOut, progress: Any) -> int:
    """Map rows by the actors of ``pool``; see ``map_exactly_once``."""

    def mapping(blocks: Dataset) -> Dataset:
        return pool.map(blocks, progress)

    return map_exactly_once(rows_in, rows_out, mapping, pool.rows_per_block, progress)


def map_exactly_once(
    rows_in: RowsIn, rows_out: RowsOut, mapping: Callable[[Dataset], Dataset], rows_per_block: int, progress: Any
) -> int:
    """Map the rows that no earlier call has written, and write them.

    The checkpoint stays until ``delete_checkpoint`` is called: a kill right after the end must not start afresh.

    Args:
        rows_in: The rows to map.
        rows_out: Where their images go.
        mapping: Maps blocks of rows; it keeps one row for each, with its id.
        rows_per_block: Rows of a block.
        progress: The handle of the ``ProgressActor`` that the actors of ``mapping`` report to.

    Returns:
        The rows that earlier calls have written.
    """
    output = rows_out.output
    # A copy: what else this process does with Ray Data must write no checkpoint here.
    context = DataContext.get_current().copy()
    context.checkpoint_config = CheckpointConfig(
        id_column=rows_in.id_column,
        checkpoint_path=output.inner_path(CHECKPOINT),
        override_filesystem=output.filesystem,
        delete_checkpoint_on_success=False,
    )
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = 24 * 3600  # GPU nodes may take long to arrive
    # Ray Data would start 32 processes to read footers; one, of 128 threads, reads those of thousands of files.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    # Before Ray Data looks: of a block that is still announced it deletes the shards.
    finish_commits(output)
    committed = CommittedRows(output)
    before = committed.count()

    def counts() -> PoolCounts:
        result: PoolCounts = ray.get(progress.counts.remote())
        return result

    shown = PoolProgress(rows_in.total, rows_in.unit, committed.count, counts)
    with DataContext.current(context), shown:
        # These files and no others, whatever they are called and whatever their folders' names look like.
        rows = ray.data.read_parquet(
            list(rows_in.files),
            filesystem=rows_in.filesystem,
            columns=rows_in.columns,
            num_cpus=TASK_CPUS,
            partitioning=None,
            file_extensions=None,
        )
        # A small file is read as one block: without this, one actor would get it all.
        blocks = rows.repartition(target_num_rows_per_block=rows_per_block)
        mapping(blocks).write_parquet(
            output.inner_path(rows_out.name),
            filesystem=output.filesystem,
            partition_cols=[rows_out.partition],
            ray_remote_args={"num_cpus": TASK_CPUS},
            schema=rows_out.schema,
            **rows_out.parquet,
        )
    return before


def choose_rows_per_block(configured: int | None, rows: int, actors: int, fewest: int) -> int:
    """Return the rows of a block: so few that all actors have work to the end, so many that batches are full.

    Args:
        configured: What the user wants; None: choose.
        rows: Rows of the whole job.
        actors: The most actors that will work on it.
        fewest: Rows that fill the batches of an actor.
    """
    if configured is not None:
        return configured
    # Rounded up, so that no row is left for another block.
    wanted = max(-(-rows // (_BLOCKS_PER_ACTOR * actors)), fewest)
    # Every actor gets a block, whatever that does to batches; and one actor gets two, so that progress is seen.
    share = -(-rows // max(actors, 2))
    return max(1, min(wanted, share, MOST_ROWS_PER_BLOCK))


class CommittedRows:
    """Counts the rows whose blocks are committed below an output folder."""

    def __init__(self, output: Folder):
        """Count nothing yet."""
        self._folder = output / CHECKPOINT
        self._rows: dict[str, int] = {}  # by file: a file never changes

    def count(self) -> int:
        """Return the rows that are written; reads only the files that are new since the last call."""
        names, new = [], []
        for name in self._folder.list_files(_COMMITTED):
            # Files are pending until their rows are in the output.
            if name.endswith(_PENDING):
                continue
            names.append(name)
            if name not in self._rows:
                new.append(name)
        if new:
            with ThreadPoolExecutor(min(_READERS, len(new))) as readers:  # of an object store each takes requests
                self._rows.update(zip(new, readers.map(self._count_file, new), strict=True))
        return sum(self._rows[name] for name in names)

    def _count_file(self, name: str) -> int:
        metadata = pq.read_metadata(self._folder.inner_path(name), filesystem=self._folder.filesystem)
        return int(metadata.num_rows)


def commit_again(output: Folder, id_column: str, ids: Callable[[], pa.ChunkedArray]) -> None:
    """Commit the rows that ``output`` has, where its checkpoint is gone.

    So a finished result that somebody took files from is continued, not made a second time beside what is left of it.

    Args:
        output: The folder of the command.
        id_column: The column of ids.
        ids: Reads the ids of the rows that the folder has.
    """
    if (output / CHECKPOINT).list_files():
        return
    present = ids()
    # A file in the form of a checkpoint, with the ids of all rows that are there.
    if len(present):
        (output / CHECKPOINT).write_bytes(f"standing{_COMMITTED}", parquet_bytes(pa.table({id_column: present})))


def delete_checkpoint(output: Folder) -> None:
    """Forget what was committed, once the result stands."""
    folder = output / CHECKPOINT
    if not folder.exists():
        return
    folder.filesystem.delete_dir_contents(folder.inner, missing_dir_ok=True)
    folder.filesystem.delete_dir(folder.inner)


def finish_commits(output: Folder) -> None:
    """Delete the announcements of blocks that are committed all the same.

    A commit is the move of a file, and an object store moves by copying and deleting. A kill between the two leaves
    both files, and Ray Data would take the block for unwritten, delete its shards, and not compute it again.
    """
    folder = output / CHECKPOINT
    names = set(folder.list_files(_COMMITTED))
    for name in names:
        if name.endswith(_PENDING) and name.removesuffix(_PENDING) + _COMMITTED in names:
            folder.delete_file(name)


def gpus_of(actors: ActorsConfig, engine: EngineConfig) -> float:
    """Return the GPUs of one actor."""
    if actors.gpus is not None:
        return actors.gpus
    may_use_gpu = engine.device in ("auto", "cuda")
    if may_use_gpu and ray.cluster_resources().get("GPU", 0):
        return 1.0
    return 0.0


def most_actors(actors: ActorsConfig, engine: EngineConfig, cores: int, gpus: float) -> int:
    """Return how many actors a pool may have: as many as are asked for, or fit now.

    Args:
        actors: What is asked for.
        engine: Says how many threads an actor computes with.
        cores: Cores of the cluster.
        gpus: GPUs of one actor.
    """
    if actors.max is not None:
        return actors.max
    fit = cores // engine.threads
    # A GPU may be shared by several actors: ``gpus`` is the share of each.
    if gpus:
        fit = int(ray.cluster_resources().get("GPU", 0) / gpus)
    return max(fit, actors.min, 1)


class PoolOptions(TypedDict, total=False):
    """The arguments of Ray Data's ``map_batches`` that say which actors there are, and what each takes."""

    compute: ActorPoolStrategy
    num_cpus: float
    num_gpus: float
    resources: dict[str, float]


def pool_of(actors: ActorsConfig, engine: EngineConfig, cores: int, gpus: float) -> PoolOptions:
    """Return the arguments of ``map_batches`` for a pool of ``most_actors`` actors, which has the same arguments."""
    most = most_actors(actors, engine, cores, gpus)
    if actors.cpus is not None:
        cpus = actors.cpus
    elif gpus:
        cpus = 1.0
    else:  # on a small cluster the actors reserve less than they use, or nothing could be read beside them
        spare = max(0.0, ray.cluster_resources().get("CPU", 0) - READING_CPUS)
        cpus = min(float(engine.threads), int(100 * spare / most) / 100)
    # The pool begins whole: actors that wait are what an autoscaler brings nodes for.
    strategy = ActorPoolStrategy(min_size=actors.min, max_size=most, initial_size=most)
    pool: PoolOptions = {"compute": strategy, "num_cpus": cpus, "resources": on(actors.node_type)}
    if gpus:
        pool["num_gpus"] = gpus
    return pool


def like_an_actor(gpus: float, node_type: str | None) -> dict[str, Any]:
    """Return the options of a task that runs where an actor would, with ``gpus`` GPUs on a node of ``node_type``."""
    cpus = 1
    if gpus:
        cpus = 0  # a GPU is enough to be placed by; a node whose CPUs are taken would not be found
    return {"num_cpus": cpus, "num_gpus": gpus, "resources": on(node_type), "max_retries": 2}


def on(node_type: str | None) -> dict[str, float]:
    """Return what to reserve of a custom resource so as to run on a node that has it."""
    if node_type is None:
        return {}
    return {node_type: 0.001}  # all that run there at a time fit


class one_line_errors:
    """Turns whatever Ray wraps a failure in into our own error, or into one line about the storage or the worker."""

    def __init__(self, out: str, what: str):
        """Say what writes to ``out``: "build", "evaluation"."""
        self._out, self._what = out, what

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """Raise the error that a user understands. KeyboardInterrupt and the like pass."""
        if error is None or not isinstance(error, Exception):
            return
        # What Ray raises wraps what a worker raised: the worker's own error tells what is wrong.
        causes = [cause for cause in _causes(error) if not isinstance(cause, ray.exceptions.RayError)]
        if not causes:
            causes = [error]
        for cause in causes:
            if isinstance(cause, CovrayError):
                raise type(cause)(str(cause)) from error
        again = "run the same command again to continue"
        for cause in causes:
            if isinstance(cause, OSError) and not isinstance(cause, ConnectionError):
                raise DatasetError(f"{self._out}: storage failed ({last_line(cause)}); fix it and {again}") from error
        raise DatasetError(
            f"the {self._what} failed in a worker: {last_line(causes[-1])}; fix it and {again}"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error`` and all that it came from, the nearest first."""
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        # Ray keeps what a worker raised in an attribute of its own, beside Python's links.
        queue += [getattr(current, "cause", None), current.__cause__, current.__context__]


def parquet_bytes(table: pa.Table) -> bytes:
    """Return a small table as the content of a Parquet file."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    data: bytes = buffer.getvalue().to_pybytes()
    return data
