"""The launcher file passes Ray's own check."""

from pathlib import Path

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

GPU = Path(__file__).parents[1] / "cluster" / "gpu.yaml"


def test_the_launcher_takes_the_file() -> None:
    config = yaml.safe_load(GPU.read_text())
    validate_config(prepare_config(config))
    assert any(f"=={ray.__version__}" in command for command in config["setup_commands"]), "pins the tested Ray"
    commands = config["head_start_ray_commands"] + config["worker_start_ray_commands"]
    assert all("RAY_AUTH_MODE=token" in line for line in commands if "ray start" in line)


def test_the_check_refuses_what_it_does_not_know() -> None:
    config = yaml.safe_load(GPU.read_text()) | {"idle_timeout": 10}
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(prepare_config(config))
