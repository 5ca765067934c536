"""From pictures to a drawn answer: the parts of ThinkDiff fit together, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from covray.config.think import ThinkFeaturesConfig, ThinkTrainConfig
from covray.models.aligner.aligner import load_aligner
from covray.thinking.dataset import FeatureDataset
from covray.thinking.objective import train_aligner
from covray.thinking.painters import painter_of
from tests.support.thinking import write_features
from tests.support.trainings import curve
from tests.thinking.test_painters import config_of, make_pipeline


def test_features_train_an_aligner_whose_output_is_drawn(
    features_config: Callable[..., ThinkFeaturesConfig], aligner_config: Callable[..., ThinkTrainConfig]
) -> None:
    features = write_features(features_config(thought__min_tokens=6))
    run = aligner_config(features, split__mode="none", optimizer__steps=8, optimizer__warmup_steps=0)
    train_aligner(run)
    losses = [record["loss"] for record in curve(run) if "loss" in record]  # type: ignore[arg-type]
    assert losses[-1] < losses[0]

    loaded = load_aligner(Path(run.out) / "adapter", torch.device("cpu"))
    dataset = FeatureDataset(features)
    loaded.require_fit("aligner", vlm=dataset.record.fingerprints["vlm"])
    with torch.no_grad():
        aligned = [loaded.network(own) for own in dataset.of_split("val").features([0, 1])]
    first, second = painter_of(make_pipeline("pixart"), config_of("pixart")).paint(aligned)
    assert first.shape == (1, 8, 8, 3)
    assert not np.array_equal(first, second)
