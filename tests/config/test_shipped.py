"""The files of configs/ and cluster/ are found by name: in a clone, and where the package is installed."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

from covray.config import BuildConfig, TrainConfig, load_config, shipped
from covray.config.shipped import find_config, shipped_files
from covray.errors import ConfigError

ROOT = Path(__file__).parents[2]
TRAIN = {"data": "chains", "out": "run"}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package folder with what the wheel puts into it, and nothing beside it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    for source, target in wheel["force-include"].items():
        shutil.copytree(ROOT / source, tmp_path / target)
    package = tmp_path / "covray"
    monkeypatch.setattr(shipped, "_PACKAGE", package)
    monkeypatch.chdir(tmp_path)
    return package


def test_every_file_has_one_name_in_a_clone_and_installed(request: pytest.FixtureRequest) -> None:
    in_clone = shipped_files()
    files = {path.name for folder in ("configs", "cluster") for path in (ROOT / folder).rglob("*.yaml")}
    assert {path.name for path in in_clone.values()} == files | {"Dockerfile"}
    package = request.getfixturevalue("installed")
    assert list(shipped_files()) == list(in_clone)
    for name, path in shipped_files().items():
        assert path.is_relative_to(package)
        assert path.read_bytes() == in_clone[name].read_bytes()


@pytest.mark.parametrize("name", ["paper/train-7b", "paper/train-7b.yaml", "configs/paper/train-7b.yaml"])
def test_a_configuration_is_found_outside_a_clone(name: str, installed: Path) -> None:
    config = load_config(TrainConfig, name, TRAIN)
    assert config == load_config(TrainConfig, ROOT / "configs" / "paper" / "train-7b.yaml", TRAIN)
    assert config.backbone.scale == "7b"


def test_a_file_of_the_user_comes_first(installed: Path) -> None:
    own = Path("paper")
    own.mkdir()
    (own / "build").write_text("seed: 1")
    assert find_config("paper/build") == Path("paper/build")
    assert find_config(Path("paper/build.yaml")).is_relative_to(installed)


@pytest.mark.parametrize("name", ["none", "../configs/paper/build", "paper", "/paper/build", ""])
def test_a_name_that_is_none_is_refused(name: str, installed: Path) -> None:
    with pytest.raises(ConfigError, match=r"--config .*; give a YAML file, or a name that covray config lists"):
        load_config(BuildConfig, name, {"pairs": "pairs.parquet", "out": "chains"})
