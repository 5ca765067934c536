"""Answers made of the labels of examples: their mean, and that of the most similar image."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from covray.errors import PairError
from covray.evaluation.baselines import nearest_label
from covray.evaluation.pair_files import PairFile
from covray.io.images import square
from covray.io.pixels import Picture
from covray.tasks import TASKS
from covray.tasks.base import Meta


@dataclass(frozen=True, eq=False)
class _Labels:
    """The examples of a task at the tokenizer's size, without those that cannot be read."""

    pair_ids: NDArray[np.int64]
    images: NDArray[np.uint8]
    """[n, s, s, 3]."""
    labels: NDArray[np.uint8]
    """[n, s, s, 3]."""


class ExampleLabels:
    """The examples of an evaluation, read when they are first asked for."""

    def __init__(self, examples: PairFile, size_px: int, fit: Literal["stretch", "crop"]):
        """Read nothing yet.

        Args:
            examples: The pairs.
            size_px: The tokenizer's, at which they are held.
            fit: How a picture becomes square.
        """
        self._examples, self._size_px, self._fit = examples, size_px, fit
        # Episodes come sorted by subject and task.
        self._of_task = functools.lru_cache(maxsize=2)(self._load)
        self._means = functools.lru_cache(maxsize=4)(self._mean)

    def mean(self, task: str, pair_id: int, meta: Meta) -> Picture:
        """Return the mean label, without that of the query, [s, s, 3].

        Args:
            task: The query's task.
            pair_id: The query.
            meta: Of the query's row.

        Raises:
            PairError: No other example can be read.
        """
        others = self._others(task, pair_id)
        # Only these keys decide how a label is read: all else of the row's meta would defeat the cache.
        known = {key: meta.get(key) for key in TASKS[task].meta_keys}
        without = None  # one mean serves all queries that are no examples
        if not others.all():
            without = pair_id
        return self._means(task, without, json.dumps(known))

    def nearest(self, task: str, pair_id: int, image: Picture) -> Picture:
        """Return the label of the example whose image is most similar, but for the query itself, [s, s, 3].

        Args:
            task: The query's task.
            pair_id: The query.
            image: Its picture.

        Raises:
            PairError: No other example can be read.
        """
        others, labels = self._others(task, pair_id), self._of_task(task)
        # Compared at the tokenizer's size, at which the examples are held.
        return nearest_label(square(image, self._size_px, self._fit), labels.images[others], labels.labels[others])

    def _others(self, task: str, pair_id: int) -> NDArray[np.bool_]:
        """Return which examples of the task are not the query. Raises PairError where none are."""
        others: NDArray[np.bool_] = self._of_task(task).pair_ids != pair_id
        if not others.any():
            raise PairError("no_examples", f"no example of {task} has pictures that can be read")
        return others

    def _mean(self, task: str, without: int | None, reading: str) -> Picture:
        """Return the mean label of the examples of ``task``, but for pair ``without``; ``reading`` is meta as JSON."""
        labels = self._of_task(task)
        others = labels.labels
        if without is not None:
            others = others[labels.pair_ids != without]
        return TASKS[task].mean(others, json.loads(reading))

    def _load(self, task: str) -> _Labels:
        pair_ids, images, labels = [], [], []
        for pair in self._examples.read(self._examples.ids_of(task)):
            try:
                image = self._examples.picture(pair, "image", self._fit)
                label = self._examples.picture(pair, "label", self._fit)
            # An example that cannot be read is left out; only where none is left has a query no answer.
            except PairError:
                continue
            pair_ids.append(pair["pair_id"])
            images.append(square(image, self._size_px, self._fit))
            labels.append(square(label, self._size_px, self._fit, TASKS[task].resample))
        shape = (-1, self._size_px, self._size_px, 3)
        return _Labels(
            np.array(pair_ids, np.int64),
            np.array(images, np.uint8).reshape(shape),
            np.array(labels, np.uint8).reshape(shape),
        )
