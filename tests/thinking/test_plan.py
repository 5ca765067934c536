"""Plans of published sizes need no weights: 1.7 million features are 780 GB."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from covray.config import load_config
from covray.config.think import ThinkFeaturesConfig, ThinkTrainConfig
from covray.errors import ConfigError, WeightsError
from covray.thinking.plan import plan_aligner, plan_features

PAPER = Path(__file__).parents[2] / "configs" / "paper"


def test_the_papers_features_are_780_gigabytes() -> None:
    options = {"data": "none.json", "out": "none", "thought.max_tokens": 64}
    config = load_config(ThinkFeaturesConfig, PAPER / "thinkdiff-lvlm.yaml", options)
    planned = plan_features(config, 1_700_000, 100.0)
    assert (planned.features_per_row, planned.width) == (64, 3584)
    assert planned.gigabytes == pytest.approx(779.9, abs=0.1)
    assert planned.hours == pytest.approx(4.72, abs=0.01)
    clip = load_config(ThinkFeaturesConfig, PAPER / "thinkdiff-clip.yaml", {"data": "none.json", "out": "none"})
    assert plan_features(clip, 10, None).features_per_row == 65


def test_the_papers_decoder_is_13_gigabytes_on_every_trainer() -> None:
    config = load_config(ThinkTrainConfig, PAPER / "thinkdiff-lvlm.yaml", {"data": "features", "out": "run"})
    planned = plan_aligner(config, 3584, 64, encoder=False)
    assert planned.aligner_parameters == pytest.approx(31.5e6, rel=0.01)
    assert planned.language_gigabytes == pytest.approx(13, abs=0.5)
    assert planned.captions == 25_000 * 96
    both = plan_aligner(config, 3584, 64, encoder=True)
    assert both.language_gigabytes == pytest.approx(22.3, abs=0.5)
    assert planned.total_gigabytes == pytest.approx(
        planned.language_gigabytes + planned.aligner_gigabytes + planned.batch_gigabytes
    )


def test_a_plan_counts_the_data_and_reads_sizes_of_folders(
    features_config: Callable[..., ThinkFeaturesConfig],
) -> None:
    planned = plan_features(features_config(), None, None)
    assert (planned.rows, planned.features_per_row, planned.width) == (12, 6, 32)
    assert planned.hours is None
    assert plan_features(features_config(variant="clip"), None, None).features_per_row == 5
    with pytest.raises(ConfigError, match="places: prompt has as many features as a prompt has tokens"):
        plan_features(features_config(places="prompt"), None, None)
    with pytest.raises(ConfigError, match="patches: 4 patches on a side cannot be made 8 times fewer"):
        plan_features(features_config(variant="clip", patches=8), None, None)


def test_a_published_grid_that_is_pooled_away_is_refused() -> None:
    options = {"data": "none.json", "out": "none", "patches": 32}
    config = load_config(ThinkFeaturesConfig, PAPER / "thinkdiff-clip.yaml", options)
    with pytest.raises(ConfigError, match="patches: 16 patches on a side cannot be made 32 times fewer"):
        plan_features(config, 10, None)


def test_a_folder_that_is_no_t5_is_refused(tmp_path: Path) -> None:
    options = {"data": "features", "out": "run", "language_model.path": str(tmp_path)}
    config = load_config(ThinkTrainConfig, PAPER / "thinkdiff-lvlm.yaml", options)
    with pytest.raises(WeightsError, match=r"cannot be read .*; get the folder again"):
        plan_aligner(config, 3584, 64, encoder=False)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(WeightsError, match="is of type llama; give a T5"):
        plan_aligner(config, 3584, 64, encoder=False)
