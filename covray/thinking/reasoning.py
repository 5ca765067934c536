"""Reasoning episodes, answered and judged; what ``covray think evaluate`` computes, without Ray.

    episode -> demonstrations -> the model's text and states -> a picture for every row -> judge -> verdicts

An episode's rows follow from the configuration and the episode: its random numbers are its own, and its pictures are
drawn together, whatever else an actor draws.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from covray.config.evaluate import named_run
from covray.config.think import EpisodesConfig, ThinkEvaluateConfig
from covray.errors import ConfigError, PairError
from covray.evaluation.caption_facts import stated
from covray.io.device import resolve_device
from covray.io.images import decode, encode_png
from covray.models.aligner.aligner import Aligner, new_aligner
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
    episode_prompt,
    judge,
    make_episode,
    open_cobsat,
    sample_orders,
    tasks_of,
)
from covray.thinking.features import Places, Thought, read_features, write_text
from covray.thinking.judging import Judge, judge_fingerprint, load_judge
from covray.thinking.thinker import AlignerFolder, Thinker, open_aligner, require_models

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
_ANSWER = pa.struct(
    [
        pa.field("row", pa.string(), False),
        pa.field("seen_detail", pa.string()),
        pa.field("seen_object", pa.string()),
        pa.field("detail", pa.bool_(), False),
        pa.field("object", pa.bool_(), False),
        pa.field("named", pa.bool_(), False),
        pa.field("hidden", pa.bool_(), False),
        pa.field("picture", pa.binary()),
    ]
)
RESULT_SCHEMA = pa.schema(
    [
        pa.field("episode", pa.int64(), False),
        pa.field("task", pa.string(), False),
        pa.field("shots", pa.int32(), False),
        pa.field("number", pa.int32(), False),
        pa.field("words", pa.list_(pa.string())),
        pa.field("answer_detail", pa.string()),
        pa.field("answer_object", pa.string()),
        pa.field("demonstrations", pa.list_(pa.binary())),
        pa.field("text", pa.string()),
        pa.field("answers", pa.list_(_ANSWER)),
        pa.field("error", pa.string()),
    ]
)
"""A row of an evaluation; docs/formats.md describes it."""
_NEEDS_ENCODER = ("caption", "bridge", "untrained")


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


class RenderedWorld:
    """covray's portraits."""

    themes = PORTRAITS
    benchmark = "CoBSAT-style, rendered"

    def __init__(self, seed: int):
        """Render with random numbers that follow from ``seed``."""
        self._seed = seed

    def orders(self, config: EpisodesConfig) -> list[Order]:
        """See ``World``."""
        return sample_orders(config.count, config.seed)

    def demonstrations(self, episode: Episode) -> list[NDArray[np.uint8]]:
        """See ``World``."""
        return demonstration_pictures(episode, self._seed)

    def truth(self, episode: Episode) -> NDArray[np.uint8]:
        """See ``World``."""
        return answer_picture(episode, self._seed)

    def caption(self, episode: Episode) -> str:
        """See ``World``."""
        seed = seed_of("true caption", self._seed, episode.task.name, len(episode.demonstrations), episode.number)
        return answer_caption(episode, np.random.default_rng(seed))

    def stated(self, theme: Theme, text: str) -> Cell | None:
        """See ``World``: by the words that captions of portraits are made of."""
        values = stated(text)
        details, things = values.get(theme.name, set()), values["object"]
        if len(details) != 1 or len(things) != 1:
            return None
        return Cell(*details, *things)


class CobsatWorld:
    """A copy of CoBSAT's repository with its pictures."""

    themes = COBSAT
    benchmark = "CoBSAT"

    def __init__(self, folder: CobsatFolder):
        """Take an opened copy."""
        self._folder = folder
        self._captions = {theme.name: folder.captions(theme) for theme in COBSAT}

    def orders(self, config: EpisodesConfig) -> list[Order]:
        """See ``World``: those of CoBSAT's own file."""
        if config.count > len(self._folder.orders):
            raise ConfigError(
                f"episodes.count: {config.count}, but CoBSAT's file has {len(self._folder.orders)}; give fewer"
            )
        return self._folder.orders[: config.count]

    def demonstrations(self, episode: Episode) -> list[NDArray[np.uint8]]:
        """See ``World``."""
        return [self._picture(episode.task.theme, cell) for cell in episode.demonstrations]

    def truth(self, episode: Episode) -> NDArray[np.uint8]:
        """See ``World``."""
        return self._picture(episode.task.theme, episode.answer)

    def caption(self, episode: Episode) -> str:
        """See ``World``."""
        theme, cell = episode.task.theme, episode.answer
        name = self._folder.picture(theme, cell).name
        return self._captions[theme.name].get(name, f"{theme.word(cell.detail)} {theme.word(cell.object)}")

    def stated(self, theme: Theme, text: str) -> Cell | None:
        """See ``World``: by the names of the values."""
        return named_cell(theme, text)

    def _picture(self, theme: Theme, cell: Cell) -> NDArray[np.uint8]:
        return decode(self._folder.picture(theme, cell).read_bytes())


def open_world(config: ThinkEvaluateConfig) -> World:
    """Return where the episodes are from. Raises DatasetError for an incomplete copy of CoBSAT."""
    return RenderedWorld(config.seed) if config.cobsat is None else CobsatWorld(open_cobsat(Path(config.cobsat)))


def tasks_in(config: ThinkEvaluateConfig, world: World) -> list[Task]:
    """Return the tasks of an evaluation. Raises ConfigError for a name that no task has."""
    tasks = {task.name: task for task in tasks_of(world.themes)}
    for name in config.tasks or ():
        if name not in tasks:
            raise ConfigError(f"tasks: {name} is none of {', '.join(tasks)}; give one of them")
    return [task for name, task in tasks.items() if config.tasks is None or name in config.tasks]


def list_episodes(config: ThinkEvaluateConfig, world: World) -> pa.Table:
    """Return the episodes (``EPISODE_SCHEMA``) of an evaluation. Raises ConfigError."""
    rows = []
    orders = world.orders(config.episodes)
    for task in tasks_in(config, world):
        for shots in config.episodes.shots:
            for number, order in enumerate(orders):
                rows.append(
                    {
                        "episode": seed_of("reasoning", task.name, shots, number),
                        "task": task.name,
                        "shots": shots,
                        "number": number,
                        "named": order.named,
                        "hidden": order.hidden,
                    }
                )
    return pa.Table.from_pylist(rows, EPISODE_SCHEMA)


def row_names(config: ThinkEvaluateConfig) -> tuple[str, ...]:
    """Return the rows of the table in their order."""
    return (*config.rows, *(named_run(entry)[0] for entry in config.aligners))


def open_aligners(config: ThinkEvaluateConfig) -> dict[str, AlignerFolder]:
    """Return the aligners of an evaluation by name.

    Raises:
        CovrayError: One cannot be used, or reads features of a vision tower, which reasons about nothing.
    """
    aligners = {}
    for entry in config.aligners:
        name, path = named_run(entry)
        aligners[name] = open_aligner(path)
        if aligners[name].variant == "clip":
            raise ConfigError(f"aligners: {path} reads a vision tower, which answers no episode; give one of a text")
    return aligners


def require_reasoning(config: ThinkEvaluateConfig) -> dict[str, str]:
    """Check all that can be wrong, without loading weights; return the fingerprints of models, aligners and judge.

    Raises:
        CovrayError: A model, an aligner, the judge or the tasks cannot be used.
    """
    aligners = open_aligners(config)
    if not aligners:
        raise ConfigError("aligners: name at least one, which says the models of the other rows")
    words = bool(set(config.rows) & set(_NEEDS_ENCODER))
    fingerprints: dict[str, str] = {}
    for name, aligner in aligners.items():
        own = require_models(config, aligner, words=words)
        fingerprints |= {key: value for key, value in own.items() if key != "aligner"}
        fingerprints[f"{name}.aligner"] = own["aligner"]
    tasks_in(config, open_world(config))
    return fingerprints | {"judge": judge_fingerprint(config.judge)}


@dataclass(frozen=True)
class _Answer:
    """What a row of the table says of an episode."""

    picture: NDArray[np.uint8] | None
    """uint8 [h, w, 3]; None for a text."""
    seen: Cell | None


class Reasoner:
    """Holds the models, and answers episodes by every row of the table."""

    def __init__(self, config: ThinkEvaluateConfig):
        """Load everything.

        Args:
            config: The evaluation.

        Raises:
            CovrayError: A model, an aligner or the judge cannot be used.
        """
        self._config, self._world = config, open_world(config)
        self._tasks = {task.name: task for task in tasks_in(config, self._world)}
        self._folders = open_aligners(config)
        first = next(iter(self._folders.values()))
        words = bool(set(config.rows) & set(_NEEDS_ENCODER))
        self._thinker = Thinker(config, first, words=words)
        self._aligners = {name: self._thinker.load(folder) for name, folder in self._folders.items()}
        if "untrained" in config.rows:
            self._aligners["untrained"] = self._untrained(self._aligners[next(iter(self._folders))])
        device, _ = resolve_device(config.engine)
        self._judge: Judge = load_judge(config.judge, device)

    def run(self, episodes: pa.Table) -> pa.Table:
        """Return the rows (``RESULT_SCHEMA``) of a block of episodes (``EPISODE_SCHEMA``)."""
        return pa.Table.from_pylist([self._row(row) for row in episodes.to_pylist()], RESULT_SCHEMA)

    def _row(self, about: Mapping[str, Any]) -> dict[str, Any]:
        order = Order(tuple(about["named"]), tuple(about["hidden"]))
        episode = make_episode(self._tasks[about["task"]], about["number"], order, about["shots"])
        row = {key: about[key] for key in ("episode", "task", "shots", "number")}
        row |= {
            "words": episode.words,
            "answer_detail": episode.answer.detail,
            "answer_object": episode.answer.object,
        }
        try:
            shown = self._world.demonstrations(episode)
            text, answers = self._answers(episode, shown)
        except PairError as error:
            return row | {"error": error.reason}
        return row | {
            "demonstrations": [encode_png(picture) for picture in shown],
            "text": text,
            "answers": [_as_row(episode, name, answer) for name, answer in answers.items()],
        }

    def _answers(self, episode: Episode, shown: Sequence[NDArray[np.uint8]]) -> tuple[str, dict[str, _Answer]]:
        """Return the model's text, and the answer of every row of the table."""
        thoughts = self._think(episode, shown)
        text = thoughts["text"].text
        theme, rows = episode.task.theme, self._config.rows
        pictures: dict[str, NDArray[np.uint8]] = {}
        if "truth" in rows:
            pictures["truth"] = self._world.truth(episode)
        if "copy" in rows:
            pictures["copy"] = shown[-1]
        contexts = self._contexts(episode, thoughts)
        pictures |= dict(zip(contexts, self._thinker.paint(list(contexts.values())), strict=True))
        answers = {}
        for name in row_names(self._config):
            if name == "text":
                answers[name] = _Answer(None, self._world.stated(theme, text))
                continue
            (seen,) = self._judge.choose(theme, [pictures[name]])
            answers[name] = _Answer(pictures[name], seen)
        return text, answers

    def _contexts(self, episode: Episode, thoughts: Mapping[Places, Thought]) -> dict[str, Tensor]:
        """Return what the painter reads, by row."""
        contexts = {}
        if "caption" in self._config.rows:
            contexts["caption"] = self._thinker.encode(self._world.caption(episode))
        if "bridge" in self._config.rows:
            contexts["bridge"] = self._thinker.encode(thoughts["text"].text)
        for name, aligner in self._aligners.items():
            places: Places = self._folders[name].places if name in self._folders else "text"
            contexts[name] = self._thinker.align(aligner, thoughts[places].features)
        return contexts

    def _think(self, episode: Episode, shown: Sequence[NDArray[np.uint8]]) -> dict[Places, Thought]:
        """Return the text that the model writes once, with the states of its places that aligners read."""
        vlm = self._thinker.vlm
        assert vlm is not None
        prompt = episode_prompt(vlm.prompter, episode, shown, self._config.episodes.instruction)
        ids = write_text(vlm, prompt, self._thinker.thought)
        text = vlm.prompter.text(ids.tolist())
        thoughts: dict[Places, Thought] = {}
        for places in {"text", *(folder.places for folder in self._folders.values())}:
            (features,) = read_features(vlm, [prompt], [ids], places)
            thoughts[places] = Thought(ids, text, features)
        return thoughts

    def _untrained(self, trained: Aligner) -> Aligner:
        """Return the aligner that a training would begin with."""
        language = self._thinker.language
        if language is None:
            raise ConfigError("rows: untrained needs the language model; give --language-model")
        device, _ = resolve_device(self._config.engine)
        aligner = new_aligner(trained.record.input_width, language.model, "encoder", self._config.seed)
        return Aligner(aligner.network.to(device), aligner.record)


def named_cell(theme: Theme, text: str) -> Cell | None:
    """Return the one detail and the one object that a text names in whole words; None if it names none or several."""
    spoken = f" {' '.join(re.findall('[a-z0-9]+', text.lower()))} "
    named = []
    for values in (theme.details, theme.objects):
        present = [value for value in values if f" {theme.word(value).lower()} " in spoken]
        if len(present) != 1:
            return None
        named.append(present[0])
    return Cell(*named)


def _as_row(episode: Episode, name: str, answer: _Answer) -> dict[str, Any]:
    verdict = judge(episode, answer.seen)
    return {
        "row": name,
        "seen_detail": None if answer.seen is None else answer.seen.detail,
        "seen_object": None if answer.seen is None else answer.seen.object,
        **vars(verdict),
        "picture": None if answer.picture is None else encode_png(answer.picture),
    }
