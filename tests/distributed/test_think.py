"""What ``covray think`` refuses before Ray is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from covray.config.think import ThinkFeaturesConfig, ThinkTrainConfig
from covray.distributed.features import take_features
from covray.distributed.reason import read_rows
from covray.distributed.train_aligner import plan_train, train_aligner
from covray.errors import ConfigError, CovrayError, DatasetError, ManifestError, WeightsError
from covray.thinking.records import FeaturesRecord
from covray.thinking.rows import RESULT_SCHEMA, AnswerRow, EpisodeRow
from tests.support.thinking import write_features


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def started() -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("covray.distributed.features.ray_session", started)
    monkeypatch.setattr("covray.distributed.train.ray_session", started)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"data": "/absent.parquet"}, ManifestError, "absent"),
        ({"vlm__path": "/absent"}, WeightsError, "no such folder"),
        ({"variant": "clip", "vlm__path": "/absent"}, WeightsError, "no such folder"),
    ],
)
def test_features_that_cannot_be_taken_are_refused_in_one_line(
    changes: dict[str, Any], kind: type[CovrayError], message: str,
    features_config: Callable[..., ThinkFeaturesConfig],
) -> None:  # fmt: skip
    config = features_config(**changes)
    with pytest.raises(kind, match=message) as error:
        take_features(config)
    assert "\n" not in str(error.value)
    assert not list(Path(config.out).glob("*.json"))


def test_a_folder_of_features_keeps_its_model_and_its_data(
    features_config: Callable[..., ThinkFeaturesConfig], think_folders: dict[str, str]
) -> None:
    config = features_config()
    write_features(config)
    assert take_features(config).samples == 12, "a finished folder only gives its result again"
    with pytest.raises(DatasetError, match=r"thought.max_tokens was 6, is 7"):
        take_features(features_config(thought__max_tokens=7))
    record = FeaturesRecord.read(config.out)
    record.model_copy(update={"fingerprints": {**record.fingerprints, "vlm": "0"}}).write(config.out)
    with pytest.raises(DatasetError, match="was begun with another configuration: vlm was '0'"):
        take_features(config)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"data": "/absent"}, DatasetError, "holds no features; give the --out of a covray think features"),
        ({"train_split": "test"}, DatasetError, "split test has no features to use; its splits are train, val"),
        ({"validation_split": "test"}, DatasetError, "split test has no features to use"),
        ({"language_model__path": "/absent"}, WeightsError, "no such folder"),
        ({"workers__count": 5}, ConfigError, "5 workers, but a step has 4 captions"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_one_line(
    changes: dict[str, Any], kind: type[CovrayError], message: str,
    features_config: Callable[..., ThinkFeaturesConfig], aligner_config: Callable[..., ThinkTrainConfig],
) -> None:  # fmt: skip
    data = changes.get("data") or write_features(features_config())
    config = aligner_config(data, **{key: value for key, value in changes.items() if key != "data"})
    with pytest.raises(kind, match=message) as error:
        train_aligner(config)
    assert "\n" not in str(error.value)
    assert not list(Path(config.out).glob("*.json"))


@pytest.mark.parametrize("change", ["compute__compile", "compute__recompute"])
def test_what_an_aligner_does_not_need_is_refused(change: str, aligner_config: Callable[..., ThinkTrainConfig]) -> None:
    with pytest.raises(ConfigError, match="is not supported for an aligner"):
        aligner_config("features", **{change: True})
    with pytest.raises(ConfigError, match=r"compute.deepspeed: an aligner is small and needs none; give none"):
        aligner_config("features", compute__deepspeed="zero2")


def test_a_plan_writes_nothing(
    features_config: Callable[..., ThinkFeaturesConfig], aligner_config: Callable[..., ThinkTrainConfig]
) -> None:
    config = aligner_config(write_features(features_config()))
    planned = plan_train(config)
    assert (planned.steps, planned.captions) == (6, 24)
    assert planned.aligner_parameters == 16 * (32 + 16 + 2) + 16
    assert not Path(config.out).exists()


def test_rows_of_reasoning_are_read_as_they_were_written_with_pictures_or_without(tmp_path: Path) -> None:
    assert [field.name for field in fields(EpisodeRow)] == RESULT_SCHEMA.names
    answers = [
        AnswerRow(True, False, True, False, "copy", "red", "car", b"png"),
        AnswerRow(True, True, True, True, "text", None, None),
    ]
    whole = EpisodeRow(7, "Colour-I", 2, 1, ["red", "blue", "green"], "green", "ball", [b"a", b"b"], "a ball", answers)
    failed = EpisodeRow(3, "Colour-I", 2, 0, ["red", "blue", "green"], "green", "ball", error="not_an_image")
    folder = tmp_path / "rows" / "task=Colour-I"
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist([asdict(whole), asdict(failed)], RESULT_SCHEMA)
    pq.write_table(table.drop_columns("task"), folder / "0.parquet")
    assert read_rows(str(tmp_path), pictures=True) == [failed, whole]
    assert read_rows(str(tmp_path), pictures=True, episodes=[7]) == [whole]
    without = replace(whole, demonstrations=None, answers=[replace(answer, picture=None) for answer in answers])
    assert read_rows(str(tmp_path), pictures=False) == [failed, without]
