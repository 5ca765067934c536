"""Without embreex, DeepSpeed or MLflow covray works; where one is needed, it says so in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.support.blocked import block

ROOT = Path(__file__).parents[1]
_SCRIPT = """
import importlib.util
import sys

for name in ("embreex", "deepspeed", "mlflow"):
    assert importlib.util.find_spec(name) is None

from covray.config import TrainConfig, load_config
from covray.distributed.trackers.base import require_trackers
from covray.errors import ConfigError, CovrayError
from covray.pairs.scenes import scene_pairs
from covray.recipes.demo import _tracking
from covray.training.zero import require_deepspeed

assert len(list(scene_pairs(1, ["depth"]))) == 1  # NumPy casts the rays


def refusal(check, *arguments):
    try:
        check(*arguments)
    except CovrayError as error:
        return str(error)
    raise AssertionError("was not refused")


assert _tracking().uri == "none"  # so the demo runs
config = {"data": "chains", "out": "run"}
require_trackers(load_config(TrainConfig, None, config | {"tracking.uri": "none"}))
print(refusal(require_trackers, load_config(TrainConfig, None, config)))
print(refusal(require_deepspeed, "zero2"))
"""


def test_without_them_covray_works_or_says_what_to_install(tmp_path: Path) -> None:
    blocked = block(tmp_path / "site", ["embreex", "deepspeed", "mlflow"])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([blocked, str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    mlflow, deepspeed = done.stdout.splitlines()
    assert mlflow.startswith("tracking.uri: MLflow is not installed; pip install mlflow")
    assert "pip install deepspeed" in deepspeed
