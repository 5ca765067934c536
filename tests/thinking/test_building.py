"""Rows of features follow from the picture and the configuration alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from covray.config.think import ThinkFeaturesConfig
from covray.errors import ConfigError, DatasetError
from covray.io.images import decode, encode_png
from covray.models.vlm.checkpoint import load_vlm, vlm_facts
from covray.thinking.building import FeatureBuilder, facts_of, feature_width, read_samples
from covray.thinking.dataset import SAMPLE_SCHEMA, SHARDS, FeatureDataset, unpack
from covray.thinking.features import think
from tests.support.thinking import PICTURES, write_features
from tests.support.vlms import picture


@pytest.mark.parametrize("variant", ["lvlm", "clip"])
def test_a_row_is_the_same_alone_and_among_others(
    variant: str, features_config: Callable[..., ThinkFeaturesConfig]
) -> None:
    config = features_config(variant=variant)
    samples = read_samples(config)
    builder = FeatureBuilder(config, samples.root)
    together = builder.build(samples.rows)
    assert len(set(together["sample"].to_pylist())) == PICTURES
    for number in (0, 3, PICTURES - 1):
        alone = builder.build(samples.rows.slice(number, 1))
        assert alone.to_pylist() == together.slice(number, 1).to_pylist()
    assert together["error"].to_pylist() == ["not_an_image", *[None] * (PICTURES - 1)]
    assert together["features"][0].as_py() is None


def test_features_are_the_states_of_the_text(features_config: Callable[..., ThinkFeaturesConfig]) -> None:
    config = features_config()
    samples = read_samples(config)
    row = FeatureBuilder(config, samples.root).build(samples.rows.slice(1, 1)).to_pylist()[0]
    vlm = load_vlm(vlm_facts(config.vlm), torch.float32, torch.device("cpu"))
    shown = decode(samples.rows["bytes"][1].as_py())
    (thought,) = think(vlm, [vlm.prompter.prompt([shown], "what is it")], config.thought)
    assert row["ids"] == thought.ids.tolist()
    assert row["text"] == thought.text
    assert row["count"] == len(thought.ids) <= 6
    assert torch.equal(unpack(row["features"], 32), thought.features.half().float())


def test_every_picture_draws_one_instruction(features_config: Callable[..., ThinkFeaturesConfig]) -> None:
    several = features_config(instructions=["what is it", "where is it", "what colour is it"])
    texts = {}
    for seed in (0, 1):
        config = several.model_copy(update={"seed": seed})
        samples = read_samples(config)
        texts[seed] = FeatureBuilder(config, samples.root).build(samples.rows)["features"].to_pylist()
    assert texts[0] != texts[1]
    with pytest.raises(ConfigError, match="instructions: one is empty; write what the model is asked"):
        features_config(instructions=["what is it", " "])


def test_a_tower_has_its_class_token_and_the_pooled_patches(
    features_config: Callable[..., ThinkFeaturesConfig],
) -> None:
    config = features_config(variant="clip")
    samples = read_samples(config)
    builder = FeatureBuilder(config, samples.root)
    row = builder.build(samples.rows.slice(1, 1)).to_pylist()[0]
    assert row["count"] == 1 + 2 * 2
    assert (row["text"], row["ids"]) == ("a red ball on the left", None)
    assert unpack(row["features"], 16).shape == (5, 16)


def test_equal_pictures_with_equal_captions_have_ids_of_their_own(
    features_config: Callable[..., ThinkFeaturesConfig], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from PIL import Image

    folder = tmp_path_factory.mktemp("list")
    Image.fromarray(picture(3)).save(folder / "a.png")
    (folder / "list.csv").write_text("image,caption\na.png,a ball\na.png,a ball\na.png,a box\n")
    samples = read_samples(features_config(data=str(folder / "list.csv")))
    assert len(set(samples.rows["sample"].to_pylist())) == 3
    few = read_samples(features_config(data=str(folder / "list.csv"), samples=2))
    assert few.rows["sample"].to_pylist() == samples.rows["sample"].to_pylist()[:2]


def test_readers_want_a_finished_folder_and_a_split_that_has_features(
    features_config: Callable[..., ThinkFeaturesConfig],
) -> None:
    config = features_config()
    with pytest.raises(DatasetError, match="holds no features; give the --out of a covray think features"):
        FeatureDataset(config.out)
    dataset = FeatureDataset(write_features(config))
    assert len(dataset.of_split("train")) == PICTURES - 5  # but the broken one
    assert len(dataset.of_split("val", most=2)) == 2
    with pytest.raises(DatasetError, match="split test has no features to use; its splits are train, val"):
        dataset.of_split("test")
    with pytest.raises(DatasetError, match="split train has no features to use"):
        dataset.of_split("train", fewest_tokens=100)
    rows = dataset.of_split("train")
    assert isinstance(rows._rows, pa.Table)
    assert rows._rows["sample"].to_pylist() == sorted(rows._rows["sample"].to_pylist())


def test_a_split_is_found_whose_name_arrow_escapes(features_config: Callable[..., ThinkFeaturesConfig]) -> None:
    dataset = FeatureDataset(write_features(features_config()))
    shards = Path(dataset.path, SHARDS)
    val = pq.read_table(shards / "split=val", partitioning=None)
    named = val.append_column("split", pa.array(["held out/2"] * len(val)))
    pq.write_to_dataset(named, shards, partition_cols=["split"], row_group_size=1)
    assert not (shards / "split=held out/2").exists()
    assert len(dataset.of_split("held out/2")) == len(dataset.of_split("val")) == 4
    assert dataset.longest("held out/2") == dataset.longest("val") > 0


def test_a_grid_of_which_nothing_is_left_is_refused(features_config: Callable[..., ThinkFeaturesConfig]) -> None:
    assert feature_width(facts_of(features_config(variant="clip", patches=4))) == 16
    with pytest.raises(ConfigError, match="patches: 4 patches on a side cannot be made 5 times fewer; give at most 4"):
        facts_of(features_config(variant="clip", patches=5))


@pytest.mark.parametrize("value", [float("nan"), 1e5])
def test_features_that_a_shard_cannot_hold_are_a_row_with_its_reason(
    value: float, features_config: Callable[..., ThinkFeaturesConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = features_config(variant="clip")
    samples = read_samples(config)
    builder = FeatureBuilder(config, samples.root)
    monkeypatch.setattr(builder._tower, "features", lambda *_: torch.full((1, 5, 16), value))
    (row,) = builder.build(samples.rows.slice(1, 1)).to_pylist()
    assert (row["error"], row["features"], row["count"]) == ("not_finite", None, 0)


@pytest.mark.parametrize("variant", ["lvlm", "clip"])
def test_a_strip_is_a_row_with_its_reason(variant: str, features_config: Callable[..., ThinkFeaturesConfig]) -> None:
    config = features_config(variant=variant)
    (sample,) = read_samples(config).rows.slice(1, 1).to_pylist()
    strip = sample | {"bytes": encode_png(picture(0, 2, 500))}
    (row,) = FeatureBuilder(config, None).build(pa.Table.from_pylist([strip], SAMPLE_SCHEMA)).to_pylist()
    assert (row["error"], row["features"]) == ("unsupported", None)
