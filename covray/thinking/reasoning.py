"""Reasoning episodes, answered and judged; what ``covray think evaluate`` computes, without Ray.

    episode -> demonstrations -> the model's text and states -> a picture for every row -> judge -> verdicts

An episode's rows follow from the configuration and the episode: its random numbers are its own, and its pictures are
drawn together, whatever else an actor draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from torch import Tensor

from covray.config.evaluate import named_run
from covray.config.think import ThinkEvaluateConfig
from covray.errors import ConfigError, PairError
from covray.io.device import resolve_device
from covray.io.images import encode_png
from covray.models.aligner.aligner import Aligner, new_aligner
from covray.thinking.episode_features import EpisodeFeatures
from covray.thinking.episodes import Cell, Episode, episode_prompt, judge
from covray.thinking.features import Places, Thought, read_features, write_text
from covray.thinking.judging import Judge, judge_fingerprint, load_judge
from covray.thinking.rows import RESULT_SCHEMA, AnswerRow, EpisodeRow
from covray.thinking.thinker import AlignerFolder, FeatureSource, Thinker, open_aligner, require_models
from covray.thinking.worlds import episode_of, fingerprint_episodes, list_episodes, open_world, tasks_in

_NEEDS_ENCODER = ("caption", "bridge", "untrained")


def row_names(config: ThinkEvaluateConfig) -> tuple[str, ...]:
    """Return the rows of the table in their order."""
    names = [named_run(entry)[0] for entry in config.aligners]
    return (*config.rows, *names)


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
    world = open_world(config)
    tasks_in(config, world)
    further: dict[str, str] = {}
    source = None
    if config.cobsat is not None:
        further["cobsat"] = fingerprint_episodes(list_episodes(config, world), world)
    # Features that were taken before stand in for the vision-language model.
    if config.features is not None:
        features = EpisodeFeatures(config.features)
        features.require_fit(config, aligners)
        further["features"] = features.fingerprint()
        source = FeatureSource(config.features, features.width, features.vlm)
    words = bool(set(config.rows) & set(_NEEDS_ENCODER))
    fingerprints: dict[str, str] = {}
    for name, aligner in aligners.items():
        own = require_models(config, aligner, words=words, source=source)
        # All aligners share the models around them; their own weights tell them apart.
        aligner_fingerprint = own.pop("aligner")
        fingerprints |= own
        fingerprints[f"{name}.aligner"] = aligner_fingerprint
    return fingerprints | further | {"judge": judge_fingerprint(config.judge)}


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
        # The models around the first aligner serve all of them.
        first = next(iter(self._folders.values()))
        words = bool(set(config.rows) & set(_NEEDS_ENCODER))
        self._features = None if config.features is None else EpisodeFeatures(config.features)
        self._thinker = Thinker(config, first, words=words, features=self._features is None)
        self._aligners = {name: self._thinker.load(folder) for name, folder in self._folders.items()}
        if "untrained" in config.rows:
            self._aligners["untrained"] = self._untrained(self._aligners[next(iter(self._folders))])
        device, _ = resolve_device(config.engine)
        self._judge: Judge = load_judge(config.judge, device)

    def run(self, episodes: pa.Table) -> pa.Table:
        """Return the rows (``RESULT_SCHEMA``) of a block of episodes (``EPISODE_SCHEMA``)."""
        rows = [asdict(self._row(about)) for about in episodes.to_pylist()]
        return pa.Table.from_pylist(rows, RESULT_SCHEMA)

    def _row(self, about: Mapping[str, Any]) -> EpisodeRow:
        episode = episode_of(self._tasks, about)
        row = EpisodeRow(
            episode=about["episode"],
            task=about["task"],
            shots=about["shots"],
            number=about["number"],
            words=episode.words,
            answer_detail=episode.answer.detail,
            answer_object=episode.answer.object,
        )
        try:
            shown = self._world.demonstrations(episode)
            thoughts = self._think(about["episode"], episode, shown)
            text, answers = self._answers(episode, shown, thoughts)
        except PairError as error:
            # An episode that fails is a row with its reason, and counts as wrong.
            return replace(row, error=error.reason)
        return replace(
            row,
            demonstrations=list(map(encode_png, shown)),
            text=text,
            answers=[_as_row(episode, name, answer) for name, answer in answers.items()],
        )

    def _answers(
        self, episode: Episode, shown: Sequence[NDArray[np.uint8]], thoughts: Mapping[Places, Thought]
    ) -> tuple[str, dict[str, _Answer]]:
        """Return the model's text, and the answer of every row of the table.

        Args:
            episode: The episode.
            shown: Pictures of its demonstrations.
            thoughts: What the model thought of it.
        """
        text = thoughts["text"].text
        theme, rows = episode.task.theme, self._config.rows
        pictures: dict[str, NDArray[np.uint8]] = {}
        if "truth" in rows:
            pictures["truth"] = self._world.truth(episode)
        if "copy" in rows:
            pictures["copy"] = shown[-1]
        # All rows of aligners are painted together: the painter computes batches.
        contexts = self._contexts(episode, thoughts)
        pictures |= dict(zip(contexts, self._thinker.paint(list(contexts.values())), strict=True))
        answers = {}
        for name in row_names(self._config):
            # The text is judged by its words; all other rows by what the judge sees in a picture.
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
            # The untrained aligner has no folder, and reads texts as ThinkDiff does.
            places: Places = self._folders[name].places if name in self._folders else "text"
            contexts[name] = self._thinker.align(aligner, thoughts[places].features)
        return contexts

    def _think(self, number: int, episode: Episode, shown: Sequence[NDArray[np.uint8]]) -> dict[Places, Thought]:
        """Return the text that the model writes once, with the states of its places that aligners read.

        Args:
            number: Id of the episode.
            episode: The episode.
            shown: Pictures of its demonstrations.

        Raises:
            PairError: The features of the evaluation have none of the episode.
        """
        # Written and read when the features were taken.
        if self._features is not None:
            return {"text": self._features.thought(episode.task.name, number)}
        vlm = self._thinker.vlm
        assert vlm is not None
        prompt = episode_prompt(vlm.prompter, episode, shown, self._config.episodes.instruction)
        ids = write_text(vlm, prompt, self._thinker.thought)
        text = vlm.prompter.text(ids.tolist())
        thoughts: dict[Places, Thought] = {}
        all_places = {folder.places for folder in self._folders.values()}
        for places in {"text", *all_places}:
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


def _as_row(episode: Episode, name: str, answer: _Answer) -> AnswerRow:
    return AnswerRow(
        **vars(judge(episode, answer.seen)),
        row=name,
        seen_detail=None if answer.seen is None else answer.seen.detail,
        seen_object=None if answer.seen is None else answer.seen.object,
        picture=None if answer.picture is None else encode_png(answer.picture),
    )
