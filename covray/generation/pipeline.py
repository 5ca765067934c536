"""``covray.Pipeline``: a trained run as a Python function, from pictures to an answer; it writes no files."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from covray.chains.dataset import ChainDataset
from covray.config import GeneratorConfig, SamplingConfig, TrainConfig
from covray.errors import ConfigError, DatasetError, one_line
from covray.generation.files import answer_files
from covray.generation.generator import Generator
from covray.generation.inputs import ExamplePair, PictureLike, read_examples, read_picture
from covray.generation.request import Answer, Request
from covray.generation.resolving import resolve_generator
from covray.io.drawing import html_picture
from covray.io.storage import Folder
from covray.models.lvm.adapter import read_run
from covray.models.lvm.decoding.base import GREEDY
from covray.tasks import TASKS


@dataclass(frozen=True, eq=False)
class PipelineAnswer:
    """The answer to one query."""

    raw: Answer
    """All that the generator knows of it, as arrays."""

    @property
    def image(self) -> Image.Image:
        """The answer at the query's size; with fit ``crop``, of its centre square."""
        return Image.fromarray(self.raw.picture)

    @property
    def frames(self) -> tuple[Image.Image, ...]:
        """The frames from the query to the answer, at the tokenizer's size."""
        return tuple(Image.fromarray(frame) for frame in self.raw.frames)

    @property
    def query(self) -> Image.Image:
        """The query as the model saw it, square."""
        return Image.fromarray(self.raw.query)

    @property
    def spread(self) -> Image.Image | None:
        """Where the candidates of a vote disagree, at the answer's size; None without a vote."""
        if self.raw.spread is None:
            return None
        return Image.fromarray(self.raw.spread)

    @cached_property
    def data(self) -> Any:
        """The answer as its task exports it.

        That is a class mask [h, w], metres or edge strength float32 [h, w], normals float32 [h, w, 3], or keypoints as
        a list of {name, x_px, y_px}. None where the picture itself is the answer, and without a task. A task that
        exports several files has a dictionary of them by name.
        """
        values = {name: _value(name, content) for name, content in self.raw.data.items()}
        if len(values) > 1:
            return values
        return next(iter(values.values()), None)

    @cached_property
    def files(self) -> Mapping[str, bytes]:
        """What ``covray generate`` writes of the answer, file name to content."""
        return answer_files(self.raw)

    def save(self, folder: str | os.PathLike[str]) -> list[str]:
        """Write ``files`` into ``folder``, and return their paths. Raises ConfigError where that cannot be written."""
        target = Folder(os.fspath(folder))
        for name, content in self.files.items():
            try:
                target.write_bytes(name, content)
            except OSError as error:
                raise ConfigError(f"folder {target.path}: cannot be written ({one_line(error)})") from error
        return [target.join(name) for name in self.files]

    def _repr_html_(self) -> str:
        """Show query, frames and answer in a notebook, and the answer at the query's size."""
        strip = html_picture(self.files["strip.png"], "query, frames and answer")
        return f"{strip}<br>{html_picture(self.files['answer.png'], 'answer')}"


@dataclass(frozen=True)
class StreamedPicture:
    """One picture of an answer, as soon as it is written."""

    number: int
    """The frames come first, from 0; the answer is the last."""
    is_answer: bool
    image: Image.Image
    """At the tokenizer's size."""


class Pipeline:
    """The models of a run, loaded once, as a function of pictures.

    The same run, pictures, settings and seed give the bits of ``covray generate``. An instance is for one thread.
    """

    def __init__(self, generator: Generator, tasks: Sequence[str] | None = None):
        """Use a loaded generator.

        Args:
            generator: The models.
            tasks: The tasks that they can answer; None: any.
        """
        self.generator = generator
        self.tasks = None if tasks is None else tuple(tasks)

    @classmethod
    def from_run(cls, run: str | os.PathLike[str], config: GeneratorConfig | None = None) -> Pipeline:
        """Load the models of a finished run.

        Args:
            run: The ``--out`` of a ``covray train``.
            config: Settings that differ from the run's, such as ``GeneratorConfig(length=4)``.

        Raises:
            CovrayError: The run cannot be used, or its models are not there.
        """
        path = os.fspath(run)
        # The run is the argument, also where a configuration names another adapter.
        config = (config or GeneratorConfig()).model_copy(update={"adapter": path})
        resolved = resolve_generator(config)
        return cls(Generator(resolved), _trained_tasks(path))

    def __call__(
        self,
        query: PictureLike,
        examples: Sequence[ExamplePair] | None = None,
        task: str | None = None,
        *,
        sampling: SamplingConfig = GREEDY,
        classes: int = Request.classes,
        seed: int = 0,
    ) -> PipelineAnswer:
        """Answer ``query`` after ``examples``.

        Args:
            query: A path, a PIL picture, or an array uint8 [h, w, 3] or [h, w].
            examples: Pairs (image, label) of the same kinds of pictures; None: no examples. A segmentation's label may
                be a mask of the class numbers that the run was trained on.
            task: How the answer is read as ``data``; None: the run's task, if it was trained on one.
            sampling: How tokens are chosen; by default the likeliest.
            classes: Of a segmentation without classes of its own: by whose colours the answer is read.
            seed: All random numbers follow from it and from the query.

        Raises:
            ConfigError: An argument cannot be used; the message names it.
        """
        request = self._request({"query": query}, examples, task, sampling, classes, seed)
        return PipelineAnswer(self.generator.answer(request)[0])

    def batch(
        self,
        queries: Sequence[PictureLike],
        examples: Sequence[ExamplePair] | None = None,
        task: str | None = None,
        *,
        sampling: SamplingConfig = GREEDY,
        classes: int = Request.classes,
        seed: int = 0,
    ) -> list[PipelineAnswer]:
        """Answer several queries after the same examples, in less time than one after another, with the same bits.

        The arguments are those of a call. Raises ConfigError as a call does, and for no queries.
        """
        if isinstance(queries, str) or not isinstance(queries, Sequence) or not queries:
            raise ConfigError("queries: give a list of at least one picture")
        named = {f"queries[{number}]": query for number, query in enumerate(queries)}
        request = self._request(named, examples, task, sampling, classes, seed)
        return [PipelineAnswer(answer) for answer in self.generator.answer(request)]

    def stream(
        self,
        query: PictureLike,
        examples: Sequence[ExamplePair] | None = None,
        task: str | None = None,
        *,
        sampling: SamplingConfig = GREEDY,
        classes: int = Request.classes,
        seed: int = 0,
    ) -> Iterator[StreamedPicture]:
        """Answer ``query`` picture by picture: each is yielded before the next is begun.

        Where there are several candidates, the pictures are known only when all are written. The arguments are those of
        a call, and are checked before anything is yielded.
        """
        # No generator itself: arguments are refused by the call, not when the first picture is taken.
        return self._stream(self._request({"query": query}, examples, task, sampling, classes, seed))

    def _stream(self, request: Request) -> Iterator[StreamedPicture]:
        for written in self.generator.stream(request):
            yield StreamedPicture(written.number, written.is_answer, Image.fromarray(written.picture))

    def _request(
        self,
        queries: Mapping[str, PictureLike],
        examples: Sequence[ExamplePair] | None,
        task: str | None,
        sampling: SamplingConfig,
        classes: int,
        seed: int,
    ) -> Request:
        """Return the request of a call, after all checks; ``queries`` are by the name of their argument."""
        self._require_task(task)
        if not 1 <= classes <= 256:
            raise ConfigError(f"classes {classes}: must be from 1 to 256")
        if seed < 0:
            raise ConfigError(f"seed {seed}: must be at least 0")
        pictures = tuple(read_picture(name, value) for name, value in queries.items())
        read = read_examples(examples)
        self.generator.resolved.require_context(len(read), self.generator.tokenizer.tokens_per_image)
        return Request(pictures, read, task, classes, sampling, seed)

    def _require_task(self, task: str | None) -> None:
        if task is None:
            return
        if task not in TASKS:
            raise ConfigError(f"task {task}: no such task; the tasks are {', '.join(TASKS)}")
        if self.tasks is not None and task not in self.tasks:
            raise ConfigError(f"task {task}: the run was trained on {', '.join(self.tasks)}; give one of these")


def _trained_tasks(run: str) -> tuple[str, ...] | None:
    """Return the tasks that a run was trained on; None where it does not say, and its dataset is not there."""
    config = TrainConfig.model_validate(read_run(run).config)
    if config.sentences.tasks is not None:
        return config.sentences.tasks
    try:
        audit = ChainDataset(config.data).audit
    except DatasetError:
        return None
    if audit is None:
        return None
    # A task whose pairs were all rejected was not learned.
    return tuple(task for task, counts in audit.per_task.items() if counts.written)


def _value(name: str, content: bytes) -> Any:
    """Return what an exported file holds; its bytes where its ending is not known."""
    if name.endswith(".npy"):
        return np.load(io.BytesIO(content), allow_pickle=False)
    if name.endswith(".png"):
        return np.array(Image.open(io.BytesIO(content)))
    if name.endswith(".json"):
        return json.loads(content)
    return content
