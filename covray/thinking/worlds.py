"""Where the episodes of a benchmark are from: covray's portraits, or a copy of CoBSAT."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from covray.config.think import EpisodesConfig, ThinkEvaluateConfig, ThinkFeaturesConfig
from covray.errors import ConfigError
from covray.evaluation.caption_facts import stated
from covray.io.images import decode
from covray.seeds import seed_of
from covray.thinking.cells import answer_caption, answer_picture, demonstration_pictures
from covray.thinking.episodes import (
    COBSAT,
    PORTRAITS,
    Cell,
    CobsatFolder,
    Episode,
    Order,
    Task,
    Theme,
    make_episode,
    open_cobsat,
    sample_orders,
    tasks_of,
)

AskedEpisodes = ThinkEvaluateConfig | ThinkFeaturesConfig
"""Configurations that say which episodes are asked."""
EPISODE_SCHEMA = pa.schema(
    [
        pa.field("episode", pa.int64(), False),
        pa.field("task", pa.string(), False),
        pa.field("shots", pa.int32(), False),
        pa.field("number", pa.int32(), False),
        pa.field("named", pa.list_(pa.int32()), False),
        pa.field("hidden", pa.list_(pa.int32()), False),
    ]
)
"""What the actors read: an episode by its task, its shots and its order."""


class World(Protocol):
    """Where the pictures of episodes are from."""

    @property
    def themes(self) -> tuple[Theme, ...]:
        """The themes of its tasks."""

    @property
    def benchmark(self) -> str:
        """What results are called."""

    def orders(self, config: EpisodesConfig) -> list[Order]:
        """Return the orders of the episodes. Raises ConfigError where there are too few."""

    def demonstrations(self, episode: Episode) -> list[NDArray[np.uint8]]:
        """Return the pictures that are shown. Raises PairError."""

    def truth(self, episode: Episode) -> NDArray[np.uint8]:
        """Return a picture of the answer. Raises PairError."""

    def caption(self, episode: Episode) -> str:
        """Return a caption of the answer."""

    def stated(self, theme: Theme, text: str) -> Cell | None:
        """Return the one detail and the one object of a theme that a text names; None if it names none or several."""

    def files(self) -> list[Path]:
        """Return the files that its pictures are from; rendered pictures have none."""


class RenderedWorld:
    """covray's portraits."""

    themes = PORTRAITS
    benchmark = "CoBSAT-style, rendered"

    def __init__(self, seed: int):
        """Render with random numbers that follow from ``seed``."""
        self._seed = seed

    def orders(self, config: EpisodesConfig) -> list[Order]:
        """Return the orders of the episodes."""
        return sample_orders(config.count, config.seed)

    def demonstrations(self, episode: Episode) -> list[NDArray[np.uint8]]:
        """Return the pictures that are shown."""
        return demonstration_pictures(episode, self._seed)

    def truth(self, episode: Episode) -> NDArray[np.uint8]:
        """Return a picture of the answer."""
        return answer_picture(episode, self._seed)

    def caption(self, episode: Episode) -> str:
        """Return a caption of the answer."""
        seed = seed_of("true caption", self._seed, episode.task.name, len(episode.demonstrations), episode.number)
        return answer_caption(episode, np.random.default_rng(seed))

    def stated(self, theme: Theme, text: str) -> Cell | None:
        """Return the one cell that a text names: by the words that captions of portraits are made of."""
        values = stated(text)
        details, things = values.get(theme.name, set()), values["object"]
        if len(details) != 1 or len(things) != 1:
            return None
        return Cell(*details, *things)

    def files(self) -> list[Path]:
        """Return the files that its pictures are from."""
        return []


class CobsatWorld:
    """A copy of CoBSAT's repository with its pictures."""

    themes = COBSAT
    benchmark = "CoBSAT"

    def __init__(self, folder: CobsatFolder):
        """Take an opened copy."""
        self._folder = folder
        self._captions = {theme.name: folder.captions(theme) for theme in COBSAT}

    def orders(self, config: EpisodesConfig) -> list[Order]:
        """Return the orders of the episodes: those of CoBSAT's own file."""
        if config.count > len(self._folder.orders):
            raise ConfigError(
                f"episodes.count: {config.count}, but CoBSAT's file has {len(self._folder.orders)}; give fewer"
            )
        return self._folder.orders[: config.count]

    def demonstrations(self, episode: Episode) -> list[NDArray[np.uint8]]:
        """Return the pictures that are shown."""
        return [self._picture(episode.task.theme, cell) for cell in episode.demonstrations]

    def truth(self, episode: Episode) -> NDArray[np.uint8]:
        """Return a picture of the answer."""
        return self._picture(episode.task.theme, episode.answer)

    def caption(self, episode: Episode) -> str:
        """Return a caption of the answer."""
        theme, cell = episode.task.theme, episode.answer
        name = self._folder.picture(theme, cell).name
        return self._captions[theme.name].get(name, f"{theme.word(cell.detail)} {theme.word(cell.object)}")

    def stated(self, theme: Theme, text: str) -> Cell | None:
        """Return the one cell that a text names: by the names of the values."""
        return named_cell(theme, text)

    def files(self) -> list[Path]:
        """Return the files that its pictures are from."""
        pictures = []
        for theme in COBSAT:
            for detail in theme.details:
                for thing in theme.objects:
                    pictures.append(self._folder.picture(theme, Cell(detail, thing)))
        return pictures

    def _picture(self, theme: Theme, cell: Cell) -> NDArray[np.uint8]:
        return decode(self._folder.picture(theme, cell).read_bytes())


def open_world(config: AskedEpisodes) -> World:
    """Return where the episodes are from. Raises DatasetError for an incomplete copy of CoBSAT."""
    return RenderedWorld(config.seed) if config.cobsat is None else CobsatWorld(open_cobsat(Path(config.cobsat)))


def tasks_in(config: AskedEpisodes, world: World) -> list[Task]:
    """Return the tasks of an evaluation. Raises ConfigError for a name that no task has, and for no name at all."""
    tasks = {task.name: task for task in tasks_of(world.themes)}
    if config.tasks is not None and not config.tasks:
        raise ConfigError("tasks: there is none; name at least one, or leave tasks out for all of them")
    for name in config.tasks or ():
        if name not in tasks:
            raise ConfigError(f"tasks: {name} is none of {', '.join(tasks)}; give one of them")
    # In the world's order, however they are named: the same tasks are the same evaluation.
    return [task for name, task in tasks.items() if config.tasks is None or name in config.tasks]


def list_episodes(config: AskedEpisodes, world: World) -> pa.Table:
    """Return the episodes (``EPISODE_SCHEMA``) of an evaluation. Raises ConfigError."""
    rows = []
    orders = world.orders(config.episodes)
    for task in tasks_in(config, world):
        for shots in config.episodes.shots:
            for number, order in enumerate(orders):
                rows.append(
                    {
                        # Seeded by what the episode is, so that its id is the same in every evaluation.
                        "episode": seed_of("reasoning", task.name, shots, number),
                        "task": task.name,
                        "shots": shots,
                        "number": number,
                        "named": order.named,
                        "hidden": order.hidden,
                    }
                )
    return pa.Table.from_pylist(rows, EPISODE_SCHEMA)


def episode_of(tasks: Mapping[str, Task], about: Mapping[str, Any]) -> Episode:
    """Return the episode of a row of ``list_episodes``; ``tasks`` are by name."""
    order = Order(tuple(about["named"]), tuple(about["hidden"]))
    return make_episode(tasks[about["task"]], about["number"], order, about["shots"])


def fingerprint_episodes(episodes: pa.Table, world: World) -> str:
    """Return a SHA-256 (hex) of what episodes ask, and of the files of their pictures."""
    whole = hashlib.sha256(json.dumps([world.benchmark, episodes.to_pylist()]).encode())
    # Names of CoBSAT's pictures say what they should show; copies of it differ in their bytes.
    for file in world.files():
        with file.open("rb") as opened:
            whole.update(f"{file.name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def named_cell(theme: Theme, text: str) -> Cell | None:
    """Return the one detail and the one object that a text names in whole words; None if it names none or several."""
    # Blanks at both ends and between words, so that a word is not found inside another.
    spoken = f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "
    named = []
    for values in (theme.details, theme.objects):
        present = [value for value in values if f" {theme.word(value).lower()} " in spoken]
        if len(present) != 1:
            return None
        named.append(present[0])
    return Cell(*named)
