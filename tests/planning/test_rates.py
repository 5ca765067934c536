"""Rates: the FLOPs are those that are known, and a calibration is the file that was written, for what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from covray.config import AssumedConfig, BuildConfig, TrainConfig
from covray.distributed.build import plan_build
from covray.errors import ConfigError
from covray.models.lvm.scales import llama_config
from covray.pairs.manifest import ManifestWriter, Pair, Picture
from covray.planning.flops import (
    assumed_build,
    assumed_training,
    build_flops,
    evaluations_per_pair,
    inversions_per_pair,
    pictures_per_pair,
)
from covray.planning.rates import (
    BuildRates,
    Calibration,
    RowCost,
    TrainRates,
    identity_of,
    measured_build,
    measured_training,
    read_calibration,
    write_calibration,
)

SD = {"path": "sd-2.1", "size_px": 512}


def build(**values: Any) -> BuildConfig:
    return BuildConfig(pairs="pairs", out="out", **values)


def scaled(config: BuildConfig, calibration: Calibration) -> tuple[BuildRates, float]:
    """The rates of ``calibration`` for a build, and how many times the measured row one of it costs."""
    return measured_build(config, calibration, RowCost(evaluations_per_pair(config), pictures_per_pair(config)))


def train(**values: Any) -> TrainConfig:
    return TrainConfig(data="chains", out="run", **values)


@pytest.fixture
def calibration() -> Calibration:
    """Of a nano build with four evaluations of ten steps a row, and a nano training."""
    measured = build(prior={"steps": 10}, check_endpoints=0.0)
    return Calibration(
        hardware="a laptop",
        date="2026-11-21",
        build=BuildRates(
            identity=identity_of("build", measured.identity()), rows_per_block=16, actors=2, start_s=12, load_s=9,
            row_s=0.5, evaluations=40, pictures=6, tokens_per_image=64, row_bytes=900, shard_bytes=5000,
            audit_shard_s=0.002,
        ),
        train=TrainRates(
            identity=identity_of("train", train().identity()), workers=1, start_s=15, token_s=1e-4,
            validation_token_s=4e-5, checkpoint_s=0.05, checkpoint_bytes=1e6,
        ),
    )  # fmt: skip


def test_evaluations_are_those_that_a_build_counts(tmp_path: Path) -> None:
    with ManifestWriter(str(tmp_path / "pairs.parquet")) as writer:
        for number in range(10):
            writer.add(Pair("depth", "train", Picture(uri=f"{number}.png"), Picture(uri="label.png")))
    for values in ({}, {"lengths": (4, 8)}, {"methods": ("linear",)}, {"lengths": (2,)}, {"prior": {"steps": 20}}):
        config = build(**values).model_copy(update={"pairs": str(tmp_path / "pairs.parquet")})
        assert plan_build(config).unet_evaluations == round(10 * evaluations_per_pair(config))


def test_a_shared_image_is_inverted_once_a_block() -> None:
    config = build(check_endpoints=0.0, rows_per_block=16)
    assert evaluations_per_pair(config) == 50 * (2 + 2)
    rows, shared = 16, 7
    images = np.arange(70) // shared
    met = np.mean([len(set(images[begin : begin + rows])) for begin in range(shared)])
    assert evaluations_per_pair(config, shared) == pytest.approx(50 * (met / rows + 1 + 2))
    assert inversions_per_pair(build(rows_per_block=1), shared) == 2


def test_the_flops_of_a_pair_are_the_published_parts() -> None:
    """161 TF in the UNet and 7 in the VAE for two frames at 512 px; the tokenizer reads six pictures."""
    config = build(prior=SD, check_endpoints=0.0)
    assert build_flops(config) == pytest.approx((160.9 + 7.3 + 6 * 0.2163) * 1e12, rel=1e-3)
    linear = build(prior=SD, methods=("linear",))
    assert build_flops(linear) == pytest.approx(4 * 0.2163e12)
    small = build(prior=SD | {"size_px": 256}, check_endpoints=0.0)
    assert build_flops(small) < build_flops(config) / 4


def test_assumed_rates_go_with_the_peak_and_the_share_of_it() -> None:
    config = build(prior=SD)
    a100 = assumed_build(config, AssumedConfig(), "A100", 1, 1)
    assert a100.row_s == pytest.approx(build_flops(config) / (0.386 * 312e12))
    assert a100.tokens_per_image == 256
    half = assumed_build(config, AssumedConfig(build_utilisation=0.193), "A100", 1, 1)
    assert half.row_s == pytest.approx(2 * a100.row_s)
    llama = llama_config("7b")
    rates = assumed_training(train(backbone={"scale": "7b"}), llama, AssumedConfig(), "H100")
    assert 1 / rates.token_s == pytest.approx(0.406 * 989e12 / (4 * 6.544e9), rel=1e-3)


def test_a_shard_of_random_tokens_has_the_bytes_of_its_codes() -> None:
    """Six pictures of 256 codes of 13 bits, beside a dictionary of the codes, are near 2 bytes a token."""
    rates = assumed_build(build(prior=SD, rows_per_block=256), AssumedConfig(), "A100", 1, 1)
    assert 13 / 8 * 6 * 256 < rates.row_bytes < 2.5 * 6 * 256
    noise = assumed_build(build(prior=SD, rows_per_block=16, keep_noise=True), AssumedConfig(), "A100", 1, 1)
    assert noise.row_bytes == pytest.approx(2 * 4 * 4 * 64 * 64, rel=0.1)


@pytest.mark.parametrize("name", ["calibration.yaml", "calibration.json"])
def test_a_calibration_is_read_as_it_was_written(name: str, tmp_path: Path, calibration: Calibration) -> None:
    path = str(tmp_path / name)
    write_calibration(path, calibration)
    assert read_calibration(path) == calibration


def test_a_calibration_is_scaled_by_evaluations_and_pictures(calibration: Calibration) -> None:
    rates, times = scaled(build(check_endpoints=0.0), calibration)
    assert times == pytest.approx(5)
    assert rates.row_s == pytest.approx(2.5)
    longer, times = scaled(build(prior={"steps": 10}, check_endpoints=0.0, lengths=(6,)), calibration)
    assert times == pytest.approx(6 / 4)
    assert longer.row_bytes == pytest.approx(900 * 10 / 6)


@pytest.mark.parametrize(
    "values", [{"prior": {"path": "sd"}}, {"engine": {"batch": 8}}, {"keep_noise": True}, {"tokenizer": {"path": "t"}}]
)
def test_another_prior_tokenizer_or_engine_is_not_what_was_measured(
    values: dict[str, Any], calibration: Calibration
) -> None:
    begun = calibration.model_dump(mode="json")
    begun["build"]["identity"]["engine"]["batch"] = 32
    with pytest.raises(ConfigError, match=r"^calibration: build .* was .*; run covray benchmark"):
        scaled(build(**values), Calibration(**begun))


def test_another_backbone_or_nothing_was_not_measured_either(calibration: Calibration) -> None:
    assert measured_training(train(optimizer={"steps": 3}), calibration) == calibration.train
    with pytest.raises(ConfigError, match=r"backbone\.scale was 'nano', is '7b'"):
        measured_training(train(backbone={"scale": "7b"}), calibration)
    with pytest.raises(ConfigError, match="has no training"):
        measured_training(train(), calibration.model_copy(update={"train": None}))
    hardly = calibration.model_dump(mode="json")
    hardly["build"]["evaluations"] = 1e-300
    with pytest.raises(ConfigError, match="with and without a prior"):
        scaled(build(), Calibration(**hardly))
    with pytest.raises(ConfigError, match="with and without a prior"):
        scaled(build(methods=("linear",)), calibration)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"build": {"surprise": 1}}, r"build\.surprise: no such key"),
        ({"build": {"row_s": -1}}, r"build\.row_s: Input should be greater than"),
        ({"build": {"row_s": 1e308}}, r"build\.row_s: Input should be less than"),
        ({"build": {"load_s": float("inf")}}, r"build\.load_s"),
        ({"build": {"row_s": None}}, r"build\.row_s"),
        ({"version": 2}, "version"),
        ({"hardware": None}, "hardware"),
    ],
)
def test_a_file_that_is_no_calibration_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path, calibration: Calibration
) -> None:
    values = calibration.model_dump(mode="json")
    for key, value in change.items():
        values[key] = values[key] | value if isinstance(value, dict) else value
    path = tmp_path / "calibration.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError, match=f"^calibration {re.escape(str(path))}: .*{message}") as error:
        read_calibration(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"- 1", b"a: [", b"\xff\xfe\x00", b"!!python/object/apply:os.system [ls]", b"build: " + b"[" * 700,
        b"build: &b {identity: *b}", b"1: 2",
    ],
)  # fmt: skip
def test_other_content_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "calibration.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^calibration ") as error:
        read_calibration(str(path))
    assert "\n" not in str(error.value)
