"""What can be wrong with a sweep, found before Ray is started: ``covray sweep --plan``."""

from __future__ import annotations

from typing import Any

from covray.chains.model_checks import require_models
from covray.config import SweepConfig
from covray.distributed.resumable import Output
from covray.distributed.trackers.base import require_trackers
from covray.io import storage
from covray.sweeps.grid import grid_of
from covray.sweeps.plan import SweepPlan, plan_sweep
from covray.sweeps.records import SweepRecord
from covray.training.zero import check_settings


def plan_checked_sweep(config: SweepConfig, tokens_per_s: float | None = None) -> SweepPlan:
    """Return what a sweep would do, after the checks that it makes before its first trial; nothing is started.

    Args:
        config: The sweep.
        tokens_per_s: Speed of one worker at the smallest scale of the grid, for the hours.

    Raises:
        CovrayError: The sweep, its build or one of its trials would be refused.
    """
    config = absolute_paths(config)
    output = Output(config.out, SweepRecord, "covray sweep")
    output.inspect()
    if output.begun is not None:
        output.require_same(output.begun.identity, config.identity())
    grid = grid_of(config)
    if grid.build is not None:
        require_models(grid.build)
    for settings in {trial.train.compute.deepspeed for trial in grid.trials} - {"auto", "none"}:
        check_settings(settings)
    require_trackers(config)
    return plan_sweep(config, tokens_per_s)


def absolute_paths(config: SweepConfig) -> SweepConfig:
    """Return ``config`` with paths that mean the same in a worker's folder."""
    update: dict[str, Any] = {}
    for key in ("out", "data", "manifest"):
        path = getattr(config, key)
        if path is not None and "://" not in path:
            update[key] = storage.resolve(path)[1]
    return config.model_copy(update=update)
