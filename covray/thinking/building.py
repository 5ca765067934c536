"""Blocks of pictures or episodes to rows of features; what ``covray think features`` computes, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from covray.config.think import ThinkFeaturesConfig
from covray.errors import PairError
from covray.io.device import resolve_device
from covray.io.images import Picture, decode, load_picture, picture_identity
from covray.models.vlm.checkpoint import VlmFacts, load_vlm, vlm_facts
from covray.models.vlm.prompts import Prompt
from covray.pairs.exchanges import Exchanges, read_exchanges
from covray.seeds import seed_of
from covray.thinking.dataset import FEATURE_SCHEMA, SAMPLE_SCHEMA, pack
from covray.thinking.episodes import episode_prompt
from covray.thinking.features import think
from covray.thinking.towers import Tower, TowerFacts, tower_facts
from covray.thinking.worlds import World, episode_of, fingerprint_episodes, list_episodes, open_world, tasks_in


@dataclass(frozen=True)
class Samples:
    """Captioned pictures or episodes, each with an id of its own."""

    rows: pa.Table
    """Pictures: ``SAMPLE_SCHEMA``. Episodes: ``EPISODE_SCHEMA``, whose id is called ``sample``, and whose task is the
    ``split``."""
    root: str | None
    """Folder that the pictures' URIs are below."""
    fingerprint: str
    """SHA-256 (hex) of pictures, captions and splits, or of episodes."""


def read_samples(config: ThinkFeaturesConfig) -> Samples:
    """Return the pictures or the episodes of a configuration.

    Raises:
        CovrayError: The data cannot be read or has no captions, or there are no such episodes.
    """
    if config.of == "episodes":
        world = open_world(config)
        episodes = list_episodes(config, world)
        # One schema for both kinds: shards are parted by the split, those of episodes by their task.
        rows = episodes.rename_columns({"episode": "sample", "task": "split"})
        return Samples(rows, None, fingerprint_episodes(episodes, world))
    assert config.data is not None
    # Captions alone are what ThinkDiff learns from.
    exchanges = read_exchanges(config.data, config.root, questions=False)
    pictures = list(_rows(exchanges, config.samples))
    return Samples(pa.Table.from_pylist(pictures, SAMPLE_SCHEMA), exchanges.root, exchanges.fingerprint())


def _rows(exchanges: Exchanges, most: int | None) -> Iterator[dict[str, Any]]:
    """Yield the samples: their ids follow from picture and caption; equal ones are counted."""
    repeats: dict[str, int] = {}
    per_split: dict[str, int] = {}
    for exchange in exchanges.items:
        count = per_split.get(exchange.split, 0)
        if most is not None and count >= most:
            continue
        per_split[exchange.split] = count + 1
        # Equal pairs of picture and caption are told apart by their count, so that every sample has an id of its own.
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
    """Return what is known of the model before its weights are loaded. Raises CovrayError."""
    if config.variant != "clip":
        return vlm_facts(config.vlm)
    facts = tower_facts(config.vlm)
    facts.count(config.patches)  # refuses a grid of which nothing is left
    return facts


def feature_width(facts: VlmFacts | TowerFacts) -> int:
    """Return the numbers of a feature."""
    if isinstance(facts, TowerFacts):
        return facts.width
    return int(facts.config.get_text_config().hidden_size)


class FeatureBuilder:
    """Holds the model, and turns samples into rows of features.

    A sample is computed alone, so that its features depend on it and on the configuration only.
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
        if config.of == "episodes":
            self._world: World = open_world(config)
            self._tasks = {task.name: task for task in tasks_in(config, self._world)}

    def build(self, samples: pa.Table) -> pa.Table:
        """Return the rows (``FEATURE_SCHEMA``) of a block of samples, as ``read_samples`` returns them."""
        rows = [self._row(sample) for sample in samples.to_pylist()]
        return pa.Table.from_pylist(rows, FEATURE_SCHEMA)

    def save_tokenizer(self, folder: str) -> None:
        """Write the tokenizer of the vision-language model to a local folder; a tower has none."""
        if self._tower is None:
            self._vlm.prompter.tokenizer.save_pretrained(folder)

    def _row(self, sample: dict[str, Any]) -> dict[str, Any]:
        row = {"sample": sample["sample"], "split": sample["split"], "count": 0}
        try:
            if self._config.of == "episodes":
                return row | self._thought(self._asked(sample))
            picture = decode(load_picture(Picture(sample["uri"], sample["bytes"]), self._root))
            if self._tower is not None:
                features = self._tower.features([picture], self._config.patches)[0]
                return row | _with_features({"text": sample["caption"]}, features)
            return row | self._thought(self._instructed(sample["sample"], picture))
        except PairError as error:
            return row | {"error": error.reason}

    def _asked(self, about: Mapping[str, Any]) -> Prompt:
        """Return the prompt of an episode. Raises PairError for a picture that cannot be used."""
        episode = episode_of(self._tasks, {**about, "task": about["split"]})
        shown = self._world.demonstrations(episode)
        return episode_prompt(self._vlm.prompter, episode, shown, self._config.episodes.instruction)

    def _instructed(self, sample: int, picture: NDArray[np.uint8]) -> Prompt:
        """Return the prompt of a picture, with the instruction that it draws."""
        # Drawn by the sample's own id, so that blocks and restarts change no prompt.
        instructions = self._config.instructions
        generator = np.random.default_rng(seed_of("instruction", self._config.seed, sample))
        instruction = instructions[int(generator.integers(len(instructions)))]
        return self._vlm.prompter.prompt([picture], instruction)

    def _thought(self, prompt: Prompt) -> dict[str, Any]:
        config = self._config
        with torch.inference_mode():
            (thought,) = think(self._vlm, [prompt], config.thought, config.places)
        return _with_features({"text": thought.text, "ids": thought.ids.astype(np.int32)}, thought.features)


def _with_features(said: dict[str, Any], features: Tensor) -> dict[str, Any]:
    """Return what is said of a sample with its features, or only an error where they cannot be stored."""
    # Shards hold float16, which ends at 65504: what overflows there is as little a feature as what did in the model.
    if not torch.isfinite(features.half()).all():
        return {"error": "not_finite"}
    return said | {"features": pack(features), "count": len(features)}
