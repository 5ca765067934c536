"""Unlabelled photographs to pairs, by a model of the user's (``models``) or by a plug-in's labeller."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from covray.errors import ConfigError, PairError, one_line
from covray.io.images import decode, encode_png, load_picture
from covray.pairs.labelling.spec import LabelModel, LabelOptions, find_model
from covray.pairs.manifest import Pair, Picture
from covray.pairs.photographs import find_photographs
from covray.pairs.photos import SPLITS, shrunk, split_of
from covray.pairs.sources import draw
from covray.pairs.values import unknown_task
from covray.pairs.work import Maker, PairWork, one_by_one
from covray.plugins import Refused, Registry
from covray.seeds import hash_number
from covray.tasks import TASKS
from covray.tasks.base import Meta

LABELLERS_GROUP = "covray.labellers"
"""Entry points of labellers: functions as ``PluginLabeller``."""


class PluginLabeller(Protocol):
    """What an entry point of ``covray.labellers`` names: it loads a model for a task, mostly one of the package's own.

    What it returns is called with each photograph, uint8 [h, w, 3], and answers what the task's ``render`` takes, or
    raises ``covray.errors.PairError``. The picture that ``render`` draws has the photograph's size.
    """

    def __call__(self, task: str, model: str, device: str) -> Callable[[NDArray[np.uint8]], Any]:
        """Return what labels photographs for ``task`` by ``model``, which may be empty, on ``device``."""


@dataclass(frozen=True)
class PhotoRules:
    """How photographs are read and shared out."""

    root: str
    size_px: int
    shares: dict[str, float]


def label_pairs(
    places: Sequence[str],
    options: LabelOptions,
    size_px: int = 512,
    splits: Mapping[str, float] | None = None,
    count: int | None = None,
    *,
    device: str = "auto",
    labeller: str | None = None,
) -> PairWork:
    """Return a pair for every photograph of ``places``, labelled by a model; the photographs stay where they are.

    A photograph that cannot be read, or whose answer is no label, is a pair without label and with the reason as
    ``meta["error"]``.

    Args:
        places: Folders and patterns: see ``covray.pairs.photographs``.
        options: The task, the model, and how its answers become labels.
        size_px: Photographs are shrunk so that the shorter side is at most this before they are labelled.
        splits: Each split's share, as ``photo_pairs``.
        count: Only so many photographs, sampled by the seed and their paths.
        device: ``auto``, ``cpu`` or ``cuda``.
        labeller: Name of a plug-in's labeller; None: the model is one of transformers or diffusers.

    Raises:
        ConfigError: The options do not fit the model or each other.
        WeightsError: There is no such model.
        ManifestError: A place holds no photographs.
    """
    root, names = find_photographs(places)
    rules = PhotoRules(root, size_px, dict(SPLITS if splits is None else splits))
    if labeller is None:
        model = find_model(options)
        load: Callable[[], Maker] = functools.partial(_load_model, model, rules, device)
        settings = {"fingerprint": model.fingerprint}
    else:
        labellers().find(labeller)
        if options.task not in TASKS:
            raise ConfigError(f"--task: {unknown_task(options.task)}")
        load = functools.partial(_load_plugin, labeller, options, rules, device)
        settings = {"labeller": labeller}
    settings |= {"source": "label", **asdict(options), **asdict(rules)}
    items = [(name, None) for name in draw(names, count, options.seed)]
    return PairWork(items, load, settings, unit="photographs", uses_gpu=device != "cpu", loads_model=True)


@functools.cache
def labellers() -> Registry[PluginLabeller]:
    """Return the labellers of installed packages, which are loaded when they are asked for."""
    return Registry(LABELLERS_GROUP, "labeller", [], _check_labeller)


def _check_labeller(labeller: Any) -> None:
    if not callable(labeller):
        raise Refused("is no labeller: it cannot be called")


def _load_model(model: LabelModel, rules: PhotoRules, device: str) -> Maker:
    from covray.pairs.labelling.models import load_labeller  # PyTorch: where labels are made

    draw_label = load_labeller(model, device)
    return one_by_one(functools.partial(_labelled, draw_label, rules, model.options, model.meta()))


def _load_plugin(name: str, options: LabelOptions, rules: PhotoRules, device: str) -> Maker:
    try:
        answer = labellers().find(name)(options.task, options.model, device)
    except Exception as error:
        raise ConfigError(f"--labeller {name}: cannot be loaded ({one_line(error)}); correct its options") from error
    draw_label = functools.partial(_render_answer, answer, options.task)
    meta = {"source": "label", "labeller": name, "model": options.model}
    return one_by_one(functools.partial(_labelled, draw_label, rules, options, meta))


def _render_answer(
    answer: Callable[[NDArray[np.uint8]], Any], task: str, photo: NDArray[np.uint8], seed: int
) -> NDArray[np.uint8]:
    """Return a model's answer to a photograph as a label. Raises PairError, whatever the model does."""
    try:
        label = np.asarray(TASKS[task].render(answer(photo)))
    except PairError:
        raise
    except Exception as error:
        raise PairError("model_answer", one_line(error)) from error
    if label.shape != photo.shape or label.dtype != np.uint8:
        raise PairError("model_answer", f"the label is {label.dtype} {label.shape}, the photograph {photo.shape}")
    return label


def _labelled(
    draw_label: Callable[[NDArray[np.uint8], int], NDArray[np.uint8]],
    rules: PhotoRules,
    options: LabelOptions,
    meta: Meta,
    name: str,
    _: None,
) -> list[Pair]:
    """Return the one pair of the photograph ``name``."""
    identity = f"uri:{name}"
    image = Picture(uri=name)
    known = {**meta, "photo": name}
    try:
        data = load_picture(image, rules.root)
        identity = hashlib.sha256(data).hexdigest()
        photo = shrunk(decode(data), rules.size_px)
        label = draw_label(photo, hash_number(f"label {options.seed} {identity}", bits=63))
    except PairError as error:
        return [Pair(options.task, split_of(identity, rules.shares), image, Picture(), {**known, "error": str(error)})]
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is imported only where a model is
            raise
        reason = f"out_of_memory: {photo.shape[1]}x{photo.shape[0]} px do not fit on the GPU; give a smaller --size"
        return [Pair(options.task, split_of(identity, rules.shares), image, Picture(), {**known, "error": reason})]
    return [Pair(options.task, split_of(identity, rules.shares), image, Picture(bytes=encode_png(label)), known)]
