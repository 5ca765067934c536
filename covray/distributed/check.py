"""``covray pairs check`` of a large manifest: its pictures are opened on every CPU of the machine or the cluster.

Nothing is written, so nothing has to be continued.
"""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import ray
from ray.data import DataContext

from covray.distributed.pool import TASK_CPUS, one_line_errors
from covray.distributed.session import ray_session
from covray.io import storage
from covray.pairs.check import COLUMNS, check_block
from covray.pairs.manifest_reading import ManifestInfo

PAIRS_PER_BLOCK = 256


def checked_on_ray(manifest: str, info: ManifestInfo) -> Iterator[pa.Table]:
    """Yield the checked rows of ``manifest``, as ``check_block`` returns them, in any order."""
    with ray_session(), one_line_errors(manifest, "check"):
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.verbose_progress = False
        rows = ray.data.read_parquet(
            list(info.files),
            filesystem=storage.resolve(manifest)[0],
            columns=list(COLUMNS),
            num_cpus=TASK_CPUS,
            partitioning=None,
            file_extensions=None,
        )
        blocks = rows.repartition(target_num_rows_per_block=PAIRS_PER_BLOCK)
        checked = blocks.map_batches(
            check_block, batch_size=None, batch_format="pyarrow", fn_kwargs={"root": info.root}, num_cpus=1
        )
        yield from checked.iter_batches(batch_size=None, batch_format="pyarrow")
