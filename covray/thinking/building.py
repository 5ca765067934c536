"""A block of captioned pictures to rows of features; what ``covray think features`` computes, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from covray.config.think import ThinkFeaturesConfig
from covray.errors import PairError
from covray.io.device import resolve_device
from covray.io.images import Picture, decode, load_picture, picture_identity
from covray.models.vlm.checkpoint import VlmFacts, load_vlm, vlm_facts
from covray.pairs.exchanges import Exchanges, read_exchanges
from covray.seeds import seed_of
from covray.thinking.dataset import FEATURE_SCHEMA, SAMPLE_SCHEMA, pack
from covray.thinking.features import think
from covray.thinking.towers import Tower, TowerFacts, tower_facts


@dataclass(frozen=True)
class Samples:
    """Captioned pictures, each with an id of its own."""

    rows: pa.Table
    """``SAMPLE_SCHEMA``."""
    root: str | None
    """Folder that the pictures' URIs are below."""
    fingerprint: str
    """SHA-256 (hex) of pictures, captions and splits."""


def read_samples(config: ThinkFeaturesConfig) -> Samples:
    """Return the pictures of a configuration.

    Raises:
        ManifestError: The data cannot be read, or has no captions.
    """
    exchanges = read_exchanges(config.data, config.root, questions=False)
    rows = list(_rows(exchanges, config.samples))
    return Samples(pa.Table.from_pylist(rows, SAMPLE_SCHEMA), exchanges.root, exchanges.fingerprint())


def _rows(exchanges: Exchanges, most: int | None) -> Iterator[dict[str, Any]]:
    """Yield the samples: their ids follow from picture and caption; equal ones are counted."""
    repeats: dict[str, int] = {}
    per_split: dict[str, int] = {}
    for exchange in exchanges.items:
        count = per_split.get(exchange.split, 0)
        if most is not None and count >= most:
            continue
        per_split[exchange.split] = count + 1
        key = f"{picture_identity(exchange.picture)}\0{exchange.answer}"
        number = repeats[key] = repeats.get(key, 0) + 1
        yield {
            "sample": seed_of("sample", key, number),
            "split": exchange.split,
            "uri": exchange.picture.uri,
            "bytes": exchange.picture.bytes,
            "caption": exchange.answer,
        }


def facts_of(config: ThinkFeaturesConfig) -> VlmFacts | TowerFacts:
    """Return what is known of the model before its weights are loaded. Raises WeightsError."""
    return tower_facts(config.vlm) if config.variant == "clip" else vlm_facts(config.vlm)


def feature_width(facts: VlmFacts | TowerFacts) -> int:
    """Return the numbers of a feature."""
    if isinstance(facts, TowerFacts):
        return facts.width
    return int(facts.config.get_text_config().hidden_size)


class FeatureBuilder:
    """Holds the model, and turns samples into rows of features.

    A picture is computed alone, so that its features depend on it and on the configuration only.
    """

    def __init__(self, config: ThinkFeaturesConfig, root: str | None):
        """Load the model.

        Args:
            config: The configuration.
            root: Folder that the pictures' URIs are below.

        Raises:
            CovrayError: The model or the device cannot be used.
        """
        self._config, self._root = config, root
        device, dtype = resolve_device(config.engine)
        self.facts = facts_of(config)
        self.device = device.type
        self._tower: Tower | None = None
        if isinstance(self.facts, TowerFacts):
            self._tower = Tower(self.facts, dtype, device)
        else:
            self._vlm = load_vlm(self.facts, dtype, device)

    def build(self, samples: pa.Table) -> pa.Table:
        """Return the rows (``FEATURE_SCHEMA``) of a block of samples (``SAMPLE_SCHEMA``)."""
        return pa.Table.from_pylist([self._row(sample) for sample in samples.to_pylist()], FEATURE_SCHEMA)

    def save_tokenizer(self, folder: str) -> None:
        """Write the tokenizer of the vision-language model to a local folder; a tower has none."""
        if self._tower is None:
            self._vlm.prompter.tokenizer.save_pretrained(folder)

    def _row(self, sample: dict[str, Any]) -> dict[str, Any]:
        row = {"sample": sample["sample"], "split": sample["split"], "count": 0}
        try:
            picture = decode(load_picture(Picture(sample["uri"], sample["bytes"]), self._root))
        except PairError as error:
            return row | {"error": error.reason}
        if self._tower is not None:
            features = self._tower.features([picture], self._config.patches)[0]
            return row | {"text": sample["caption"], "features": pack(features), "count": len(features)}
        return row | self._thought(sample["sample"], picture)

    def _thought(self, sample: int, picture: NDArray[np.uint8]) -> dict[str, Any]:
        config = self._config
        generator = np.random.default_rng(seed_of("instruction", config.seed, sample))
        instruction = config.instructions[int(generator.integers(len(config.instructions)))]
        prompt = self._vlm.prompter.prompt([picture], instruction)
        with torch.inference_mode():
            (thought,) = think(self._vlm, [prompt], config.thought, config.places)
        features = thought.features
        if not torch.isfinite(features).all():
            return {"error": "not_finite"}
        return {
            "text": thought.text,
            "ids": thought.ids.astype(np.int32),
            "features": pack(features),
            "count": len(features),
        }
