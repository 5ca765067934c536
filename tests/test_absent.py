"""Without embreex, DeepSpeed or MLflow covray works; where one is needed, it says so in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from covray.chains.records import Audit
from covray.config import BuildConfig, EvaluateConfig, TrainConfig
from covray.distributed.trackers.base import require_trackers
from covray.recipes import demo
from covray.training.records import TrainResult
from covray.training.run import train as train_in_process
from covray.training.zero import choose
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


@pytest.mark.parametrize("package", ["embreex", "deepspeed", "mlflow"])
def test_the_demo_runs_without_it(
    package: str, tiny_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its steps without Ray: the pairs of one scene, a training of tiny chains, and the checks before each step."""
    for name in [package, *sys.modules]:
        if name == package or name.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, name, None)  # so that Python neither finds nor imports it
    pairs = 0

    def build(config: BuildConfig) -> Audit:
        nonlocal pairs
        require_trackers(config)
        pairs = pq.read_metadata(Path(config.pairs) / "scenes.parquet").num_rows
        return Audit(asked=7, written=7, rejected=0, per_task={})

    def train(config: TrainConfig) -> TrainResult:
        require_trackers(config)
        assert choose(config, SimpleNamespace(), None) == "none"  # type: ignore[arg-type]
        result = train_in_process(tiny_config(optimizer__steps=1))
        assert isinstance(result, TrainResult)
        return result

    def evaluate(config: EvaluateConfig) -> SimpleNamespace:
        require_trackers(config)
        return SimpleNamespace(scores=[])

    monkeypatch.setattr(demo, "PHOTOGRAPHS", demo.PHOTOGRAPHS[:1])
    monkeypatch.setattr(demo, "SCENES", {"train": 1})
    monkeypatch.setattr(demo, "write_first_answers", lambda *_: None)
    monkeypatch.setattr(demo, "view", lambda *_, **__: ["index.html"])
    for step in (build, train, evaluate):
        monkeypatch.setattr(demo, step.__name__, step)
    result = demo.run_demo(tmp_path / "demo", Console(quiet=True))
    assert pairs == 7
    assert result.training.steps == 1
    assert result.to_json()["audit"] == {"version": 1, "asked": 7, "written": 7, "rejected": 0, "per_task": {}}
