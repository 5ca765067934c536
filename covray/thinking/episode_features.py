"""Texts and states of episodes that ``covray think features`` has written: evaluations read them without the model."""

from __future__ import annotations

from collections.abc import Mapping

from covray.config import differences
from covray.config.think import ThinkEvaluateConfig
from covray.errors import DatasetError, PairError
from covray.thinking.dataset import FeatureDataset, FeatureRows
from covray.thinking.features import Thought
from covray.thinking.thinker import AlignerFolder
from covray.thinking.worlds import fingerprint_episodes, list_episodes, open_world


class EpisodeFeatures:
    """A finished folder of features of episodes."""

    def __init__(self, path: str):
        """Read what the folder says of itself.

        Raises:
            DatasetError: The folder is not finished, or holds no features of episodes.
        """
        self._dataset = FeatureDataset(path)
        if self._dataset.of != "episodes":
            raise DatasetError(
                f"{path}: holds features of pictures; give the --out of a covray think features --of episodes"
            )
        self._tasks: dict[str, tuple[FeatureRows, Mapping[int, int]]] = {}

    @property
    def vlm(self) -> str:
        """Fingerprint of the vision-language model."""
        return self._dataset.record.fingerprints["vlm"]

    @property
    def width(self) -> int:
        """Numbers of a feature."""
        return self._dataset.record.width

    def fingerprint(self) -> str:
        """Return a SHA-256 (hex) of what decides the features."""
        return self._dataset.digest()

    def require_fit(self, config: ThinkEvaluateConfig, aligners: Mapping[str, AlignerFolder]) -> None:
        """Refuse features of other episodes, and aligners of other states than a text's.

        Args:
            config: The evaluation.
            aligners: Its aligners by name.

        Raises:
            CovrayError: They do not fit.
        """
        path, identity = self._dataset.path, self._dataset.record.identity
        for name, aligner in aligners.items():
            if aligner.places != "text":
                raise DatasetError(
                    f"{path}: holds states of texts, the aligner {name} reads those of prompts; evaluate it without "
                    "--features"
                )
        # What decides texts and states; how they are drawn and judged is the evaluation's own business.
        asked = config.model_dump(mode="json", include={"episodes", "tasks", "seed", "thought"})
        # Null means: as the features were taken.
        if config.thought is None:
            asked.pop("thought")
        other = differences({key: identity[key] for key in asked}, asked)
        world = open_world(config)
        if not other and fingerprint_episodes(list_episodes(config, world), world) != self._episodes:
            other = ["the pictures differ"]
        if other:
            raise DatasetError(
                f"{path}: holds features of other episodes: {'; '.join(other)}; give the same, or leave out --features"
            )

    def thought(self, task: str, episode: int) -> Thought:
        """Return the text of an episode, with its states in float32.

        Args:
            task: Its task.
            episode: Its id.

        Raises:
            PairError: It has none.
            DatasetError: A shard cannot be read.
        """
        # The features of all its episodes failed: each is a row with its reason, as a single one would be.
        if task not in self._dataset.result.per_split:
            raise PairError("no_features", "the features of no episode of this task could be taken")
        if task not in self._tasks:
            # Texts and ids of a task are read once; features stay on the disk until their episode asks.
            rows = self._dataset.of_split(task)
            self._tasks[task] = rows, rows.numbers()
        rows, numbers = self._tasks[task]
        number = numbers.get(episode)
        if number is None:
            raise PairError("no_features", "the features of this episode could not be taken")
        (features,) = rows.features([number])
        return Thought(rows.ids(number), rows.text(number), features)

    @property
    def _episodes(self) -> str:
        return self._dataset.record.fingerprints["data"]
