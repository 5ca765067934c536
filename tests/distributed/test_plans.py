"""``--plan`` of a build and of a sweep refuses what the command itself would refuse, and writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from covray.chains.records import DatasetRecord
from covray.config import BuildConfig, SweepConfig, load_config
from covray.distributed.build import plan_build
from covray.distributed.sweep_checks import plan_checked_sweep
from covray.errors import CovrayError
from covray.io.model_folders import NANO_FOLDER
from covray.pairs.manifest import ManifestWriter
from covray.pairs.scenes import scene_pairs


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """A manifest of two pairs of depth."""
    path = tmp_path / "pairs.parquet"
    with ManifestWriter(str(path), None) as writer:
        for pair in scene_pairs(2, ["depth"], 16, 0, None):
            writer.add(pair)
    return path


def plan(manifest: Path, **options: Any) -> object:
    values = {"pairs": str(manifest), "out": str(manifest.parent / "chains")}
    return plan_build(
        load_config(BuildConfig, None, values | {key.replace("__", "."): options[key] for key in options})
    )


def refusal(manifest: Path, **options: Any) -> str:
    """Return the one line that the plan is refused with."""
    before = sorted(manifest.parent.rglob("*"))
    with pytest.raises(CovrayError) as refused:
        plan(manifest, **options)
    assert sorted(manifest.parent.rglob("*")) == before
    return str(refused.value)


def test_a_plan_that_can_be_writes_nothing(manifest: Path) -> None:
    before = sorted(manifest.parent.rglob("*"))
    assert plan(manifest) == plan(manifest, prior__path="stabilityai/not-downloaded-for-a-plan")
    assert sorted(manifest.parent.rglob("*")) == before


def test_models_are_checked(manifest: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(manifest, prior__path=str(tmp_path / "absent"))
    assert "no such folder" in refusal(manifest, tokenizer__path="./absent")
    assert "does not divide" in refusal(manifest, prior__steps=51)
    broken = tmp_path / "prior"
    shutil.copytree(NANO_FOLDER / "prior", broken)
    (broken / "unet" / "config.json").unlink()
    assert "unet/config.json is missing" in refusal(manifest, prior__path=str(broken))
    assert plan(manifest, prior__path=str(broken), methods=["linear"]), "needs no prior"


def test_the_folder_is_checked(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("")
    assert "holds files that" in refusal(manifest, out=str(tmp_path / "taken"))
    assert "absent" in refusal(manifest, noise_from=str(tmp_path / "absent"))


def test_a_dataset_of_another_configuration_is_refused(manifest: Path, tmp_path: Path) -> None:
    config = BuildConfig(pairs=str(manifest), out=str(tmp_path / "chains"))
    (tmp_path / "chains").mkdir()
    DatasetRecord(
        config=config.model_dump(mode="json"), identity=config.identity(), fingerprints={}, pairs=None,
        tokenizer_size_px=64, tokens_per_image=16,
    ).write(config.out)  # fmt: skip
    assert "was begun with another manifest" in refusal(manifest)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"build": {"prior": {"path": "./absent"}}}, "no such folder"),
        ({"build": {"prior": {"steps": 51}}}, "does not divide"),
        ({"out": "taken"}, "holds files that"),
        ({"train": {"compute": {"deepspeed": "zero9"}}}, "zero9"),
        ({"train": {"compute": {"deepspeed": "unknown.json"}}}, "no_such_key"),
    ],
    ids=["prior", "steps", "folder", "stage", "deepspeed-key"],
)
def test_a_sweep_is_refused_by_its_plan(
    manifest: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(manifest.parent)
    Path("taken").mkdir()
    Path("taken/file").write_text("")
    Path("unknown.json").write_text(json.dumps({"zero_optimization": {"stage": 2, "no_such_key": 1}}))
    before = sorted(manifest.parent.rglob("*"))
    values = {
        "manifest": str(manifest), "out": "sweep", "grid": {"methods": ["diffusion"], "lengths": [3], "pairs": [0]},
    }  # fmt: skip
    train = {"sentences": {"validation_split": None}, **keys.get("train", {})}
    evaluate = {"split": "train", "baselines": ["copy"], "untuned": False}
    config = SweepConfig.model_validate(values | keys | {"train": train, "evaluate": evaluate})
    with pytest.raises(CovrayError, match=message):
        plan_checked_sweep(config)
    assert sorted(manifest.parent.rglob("*")) == before
