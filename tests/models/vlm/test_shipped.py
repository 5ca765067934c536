"""The vision-language model that ships with the package, on portraits with cells that no training has seen."""

from __future__ import annotations

import pytest

from covray.config.vlm import VlmEvaluateConfig
from covray.evaluation.vision_text import BatchAnswerer, summarize_rows
from covray.pairs.manifest import ManifestWriter
from covray.pairs.scenes.portraits import HELD_OUT_SPLIT, portrait_pairs

PORTRAITS = 24


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("portraits") / "portraits.parquet")
    with ManifestWriter(path, captions=True) as writer:
        for pair in portrait_pairs(PORTRAITS, seed=1, splits={HELD_OUT_SPLIT: 1.0}):
            writer.add(pair)
    return path


def test_it_sees_what_it_answers(manifest: str) -> None:
    config = VlmEvaluateConfig(model="nano", data=manifest, out="unused", batch=1000)
    scores = summarize_rows(BatchAnswerer(config).answer(0))
    for kind in ("style", "background"):
        accuracy = scores.questions_by_kind[kind]
        assert accuracy.mean > accuracy.most_frequent + 0.2, kind
    assert scores.facts.mean > 0.5
