"""A map over Parquet files on a pool of actors that is exactly once: killed anywhere, continued by the same call.

Ray Data's checkpoint commits a block when what became of it is written; what is committed is not read again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.exceptions
from pyarrow import fs
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.checkpoint import CheckpointConfig

from covray.config import ActorsConfig, EngineConfig
from covray.distributed.progress import PoolProgress
from covray.distributed.session import READING_CPUS
from covray.errors import CovrayError, DatasetError, last_line
from covray.io import storage

TASK_CPUS = 0.5
"""Logical CPUs of a task that reads, decodes or writes: such tasks wait for storage, and must fit beside the actors."""
CHECKPOINT = "_checkpoint"
_COMMITTED, _PENDING = ".parquet", ".pending.parquet"
_READERS = 16


def map_exactly_once(
    files: tuple[fs.FileSystem, Sequence[str]],
    out: str,
    folder: str,
    mapping: Callable[[Dataset], Dataset],
    *,
    columns: list[str],
    id_column: str,
    rows_per_block: int,
    schema: pa.Schema,
    partition: str,
    total: int,
    unit: str,
    meter: Any,
) -> int:
    """Write ``mapping`` of the rows of ``files`` that no earlier call has written, below ``out``/``folder``.

    ``files``: storage and paths of Parquet with ``columns``, of which ``id_column`` (int64) is unique; ``mapping``
    keeps one row a row and its id; ``schema``: of what is written, a folder for every value of the column
    ``partition``; ``total`` rows, called ``unit`` where progress is shown, as ``meter`` reports it. Returns the rows of
    earlier calls. The checkpoint stays until ``delete_checkpoint``: a kill right after the end must not start afresh.
    """
    context = DataContext.get_current().copy()
    context.checkpoint_config = CheckpointConfig(
        id_column=id_column,
        checkpoint_path=absolute(storage.join(out, CHECKPOINT)),
        delete_checkpoint_on_success=False,
    )
    context.enable_progress_bars = False
    context.execution_options.verbose_progress = False
    context.execution_no_progress_timeout_s = 24 * 3600  # GPU nodes may take long to arrive
    # Ray Data would start 32 processes to read footers; one, of 128 threads, reads those of thousands of files.
    os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
    finish_commits(out)
    before = _committed_rows(out)
    with DataContext.current(context), PoolProgress(total, before, meter, unit):
        # These files and no others, whatever they are called and whatever their folders' names look like.
        filesystem, paths = files
        rows = ray.data.read_parquet(
            list(paths),
            filesystem=filesystem,
            columns=columns,
            num_cpus=TASK_CPUS,
            partitioning=None,
            file_extensions=None,
        )
        # A small file is read as one block: without this, one actor would get it all.
        blocks = rows.repartition(target_num_rows_per_block=rows_per_block)
        mapping(blocks).write_parquet(
            absolute(storage.join(out, folder)),
            partition_cols=[partition],
            ray_remote_args={"num_cpus": TASK_CPUS},
            schema=schema,
        )
    return before


def commit_again(out: str, id_column: str, ids: Callable[[], pa.ChunkedArray]) -> None:
    """Commit ``ids``, of rows that stand in ``out``, if it has no checkpoint any more: a finished result that somebody
    took files from is continued, not made a second time beside what is left of it."""
    if not storage.list_files(storage.join(out, CHECKPOINT)) and len(standing := ids()):
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.table({id_column: standing}), buffer)
        storage.write_bytes(storage.join(out, CHECKPOINT, f"standing{_COMMITTED}"), buffer.getvalue().to_pybytes())


def delete_checkpoint(out: str) -> None:
    """Forget what was committed, once the result stands."""
    filesystem, inner = storage.resolve(storage.join(out, CHECKPOINT))
    filesystem.delete_dir_contents(inner, missing_dir_ok=True)
    filesystem.delete_dir(inner)


def finish_commits(out: str) -> None:
    """Delete what announces a block that is committed all the same.

    A commit is the move of a file, and an object store moves by copying and deleting. A kill between the two leaves
    both files, and Ray Data would take the block for unwritten, delete its shards, and not compute it again.
    """
    folder = storage.join(out, CHECKPOINT)
    filesystem, inner = storage.resolve(folder)
    names = set(storage.list_files(folder, _COMMITTED))
    for name in names:
        if name.endswith(_PENDING) and name.removesuffix(_PENDING) + _COMMITTED in names:
            filesystem.delete_file(f"{inner}/{name}")


def gpus_of(actors: ActorsConfig, engine: EngineConfig) -> float:
    """GPUs of one actor."""
    if actors.gpus is not None:
        return actors.gpus
    return 1.0 if engine.device != "cpu" and ray.cluster_resources().get("GPU", 0) else 0.0


def pool_of(actors: ActorsConfig, engine: EngineConfig, cores: int, gpus: float) -> dict[str, Any]:
    """Arguments of ``map_batches`` for the actor pool: as many actors as are asked for, or fit now."""
    resources = ray.cluster_resources()
    fit = int(resources.get("GPU", 0) / gpus) if gpus else cores // engine.threads
    maximum = actors.max or max(fit, actors.min, 1)
    if actors.cpus is not None:
        cpus = actors.cpus
    elif gpus:
        cpus = 1.0
    else:  # on a small cluster the actors reserve less than they use, or nothing could be read beside them
        spare = max(0.0, resources.get("CPU", 0) - READING_CPUS)
        cpus = min(float(engine.threads), int(100 * spare / maximum) / 100)
    # The pool begins whole: actors that wait are what an autoscaler brings nodes for.
    pool = ActorPoolStrategy(min_size=actors.min, max_size=maximum, initial_size=maximum)
    return {"compute": pool, "num_cpus": cpus, "resources": on(actors.node_type)} | ({"num_gpus": gpus} if gpus else {})


def on(node_type: str | None) -> dict[str, float]:
    """What to reserve of a custom resource so as to stand on a node that has it."""
    return {} if node_type is None else {node_type: 0.001}


def require_fresh(out: str, what: str) -> None:
    """Refuse an output that cannot be written or holds something else, before work is put in."""
    storage.require_writable(out)  # what is wrong with the models may still end the command: it leaves nothing behind
    if storage.list_files(out):
        raise DatasetError(f"{out}: holds files that are no {what} of covray; give another --out")


def read_description(path: str, keys: Sequence[str] = ("config", "identity")) -> dict[str, Any] | None:
    """What a build, an evaluation or a sweep wrote first, of itself, with ``keys``; None where none has begun. Raises
    DatasetError."""
    try:
        description = storage.read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: cannot be read ({last_line(error)}); give another --out") from error
    if not isinstance(description, dict) or description.get("version") != 1 or not set(keys) <= set(description):
        raise DatasetError(f"{path}: is no description of this version; give another --out")
    return description


def absolute(path: str) -> str:
    """``path`` as it means the same in a worker's folder."""
    return path if "://" in path else storage.resolve(path)[1]


def _committed_rows(out: str) -> int:
    """Rows that earlier calls have committed."""
    folder = storage.join(out, CHECKPOINT)
    filesystem, inner = storage.resolve(folder)
    names = [name for name in storage.list_files(folder, _COMMITTED) if not name.endswith(_PENDING)]

    def rows(name: str) -> int:
        return int(pq.read_metadata(f"{inner}/{name}", filesystem=filesystem).num_rows)

    with ThreadPoolExecutor(_READERS) as readers:  # a file a block: of an object store each takes requests
        return sum(readers.map(rows, names))


class one_line_errors:
    """Whatever Ray wraps a failure in, the user gets our own error, or one line about the storage or the worker.

    ``what`` writes to ``out``: a build, an evaluation.
    """

    def __init__(self, out: str, what: str):
        self._out, self._what = out, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or not isinstance(error, Exception):
            return
        causes = [cause for cause in _causes(error) if not isinstance(cause, ray.exceptions.RayError)] or [error]
        for cause in causes:
            if isinstance(cause, CovrayError):
                raise type(cause)(str(cause)) from error
        again = "run the same command again to continue"
        for cause in causes:
            if isinstance(cause, OSError) and not isinstance(cause, ConnectionError):
                raise DatasetError(f"{self._out}: storage failed ({last_line(cause)}); mend it and {again}") from error
        raise DatasetError(
            f"the {self._what} failed in a worker: {last_line(causes[-1])}; mend it and {again}"
        ) from error


def _causes(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        queue += [getattr(current, "cause", None), current.__cause__, current.__context__]
