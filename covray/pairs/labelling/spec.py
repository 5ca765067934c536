"""Which model labels, and how its answers become labels: checked from small files, before any weight is read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from covray.config.section import JsonObject
from covray.errors import ConfigError, WeightsError, one_line
from covray.io.model_folders import NANO_NAMES, fingerprint_folder, is_hub_id, resolve_folder
from covray.tasks import TASKS

MODEL_TASKS = ("depth", "normals", "segmentation", "pose")
"""Tasks that models of transformers and diffusers label."""
LOADED = ("*.json", "*.safetensors", "*.txt", "*/*.json", "*/*.safetensors", "*/*.txt")
"""Files of a model that are loaded: no pickles, no code."""
CARD = "README.md"
MOST_CLASSES = 255
"""Classes of a label: the last colour of the palette is void's."""

_METRIC_TYPES = ("depth_pro", "glpn", "zoedepth")
"""Models of transformers whose depth is in metres by their making."""
_AXES = ("x", "-x", "y", "-y", "z", "-z")

Kind = Literal["transformers", "marigold"]


@dataclass(frozen=True)
class DepthScale:
    """How a model's number d becomes metres: a d + b, or 1 / (a d + b) of an inverse depth."""

    form: Literal["linear", "inverse"] = "linear"
    a: float = 1.0
    b: float = 0.0

    def metres(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return depth [h, w] in metres; 0, which is no depth, where the formula gives none."""
        result = self.a * values.astype(np.float64) + self.b
        if self.form == "linear":
            return np.maximum(result, 0.0)
        return np.where(result > 0, 1.0 / np.where(result > 0, result, 1.0), 0.0)


def read_scale(text: str | None) -> DepthScale | None:
    """Read ``metres``, ``linear:A,B`` or ``inverse:A,B``; None for None.

    Raises:
        ConfigError: It is none of them.
    """
    if text is None:
        return None
    if text == "metres":
        return DepthScale()
    form, _, numbers = text.partition(":")
    try:
        a, b = (float(number) for number in numbers.split(","))
    except ValueError:
        a = b = float("nan")
    if not np.isfinite([a, b]).all() or (a, b) == (0, 0):
        form = ""
    if form == "linear":
        return DepthScale("linear", a, b)
    if form == "inverse":
        return DepthScale("inverse", a, b)
    raise ConfigError(
        f"--scale {text}: write metres, linear:A,B for metres = A d + B, or inverse:A,B for metres = 1 / (A d + B)"
    )


def read_axes(text: str | None) -> tuple[str, str, str] | None:
    """Read what the model's three numbers of a normal are, such as ``x,-y,-z``; None for None.

    Raises:
        ConfigError: They are not x, y and z, each once, with or without a minus.
    """
    if text is None:
        return None
    parts = tuple(part.strip() for part in text.split(","))
    if sorted(part.removeprefix("-") for part in parts) != ["x", "y", "z"] or not set(parts) <= set(_AXES):
        raise ConfigError(f"--axes {text}: write x, y and z, each once, with a minus where it points away: x,-y,-z")
    return parts  # type: ignore[return-value]


@dataclass(frozen=True)
class LabelOptions:
    """What the user says of the model and of the labels."""

    task: str
    model: str
    """A folder, or a hub id."""
    revision: str | None = None
    scale: DepthScale | None = None
    axes: tuple[str, str, str] | None = None
    """What the model's three numbers of a normal are."""
    confidence: float = 0.0
    """What a model is less sure of is left out: pixels become void, keypoints are not drawn."""
    detector: str | None = None
    """Of people, for pose: a folder or a hub id; None: the whole photograph shows one person."""
    seed: int = 0
    """Of models that sample."""


@dataclass(frozen=True)
class LabelModel:
    """A model that was found and fits its task."""

    options: LabelOptions
    kind: Kind
    folder: str
    fingerprint: str
    """SHA-256 (hex) over the files that are loaded."""
    commit: str | None
    licence: str | None
    classes: tuple[str, ...] = ()
    """Of a segmentation, by index."""

    def meta(self) -> JsonObject:
        """Return what rows keep of the model."""
        meta: JsonObject = {
            "source": "label",
            "model": self.options.model,
            "revision": self.commit,
            "licence": self.licence,
            "fingerprint": self.fingerprint,
        }
        if self.options.scale is not None:
            meta["scale"] = asdict(self.options.scale)
        if self.options.axes is not None:
            meta["axes"] = ",".join(self.options.axes)
        if self.options.confidence:
            meta["confidence"] = self.options.confidence
        if self.options.detector is not None:
            meta["detector"] = self.options.detector
        if self.classes:
            meta["classes"] = list(self.classes)
            meta["void"] = MOST_CLASSES
        return meta


def find_model(options: LabelOptions) -> LabelModel:
    """Find the model of ``options``, and check that it labels the task; no weight is read but for the fingerprint.

    Raises:
        ConfigError: The options contradict each other, or miss what the model does not say.
        WeightsError: There is no such model, it has no safetensors, or it is of another task.
    """
    _require_options(options)
    folder = model_folder(options.model, options.revision)
    config, kind = _config(folder)
    problem = _misfit(options, config, kind)
    if problem is not None:
        raise ConfigError(f"{options.model}: {problem}")
    commit, classes = options.revision, tuple[str, ...]()
    if is_hub_id(options.model):  # the folder of a snapshot is named by its commit
        commit = folder.name
    if options.task == "segmentation":
        classes = _classes(options.model, config)
    return LabelModel(
        options=options,
        kind=kind,
        folder=str(folder),
        fingerprint=fingerprint_folder(folder, LOADED),
        commit=commit,
        licence=_licence(folder),
        classes=classes,
    )


def model_folder(model: str, revision: str | None) -> Path:
    """Return the folder of a model or a hub id, which has safetensors. Raises WeightsError."""
    if model in NANO_NAMES:
        raise WeightsError(f"{model}: is no model that labels; give a folder, or a hub id (owner/name)")
    folder = resolve_folder(model, revision, "", [*LOADED, CARD])
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*/*.safetensors")):
        raise WeightsError(f"{model}: has no *.safetensors; other files of weights can run code and are not read")
    return folder


def _require_options(options: LabelOptions) -> None:
    """Refuse options that contradict each other. Raises ConfigError."""
    only = {"scale": "depth", "axes": "normals", "detector": "pose"}
    for name, task in only.items():
        if getattr(options, name) is not None and options.task != task:
            raise ConfigError(f"--{name}: is for --task {task} alone; leave it out")
    if options.task not in MODEL_TASKS:
        problem = "no model of transformers labels it" if options.task in TASKS else "no such task"
        raise ConfigError(
            f"--task {options.task}: {problem}; {', '.join(MODEL_TASKS)}; other tasks need --labeller, a plug-in"
        )
    if options.confidence and options.task not in ("segmentation", "pose"):
        raise ConfigError("--confidence: is for --task segmentation and pose; leave it out")


def _config(folder: Path) -> tuple[JsonObject, Kind]:
    """Return the configuration of a model, and which library loads it. Raises WeightsError."""
    pipeline = folder / "model_index.json"
    file = pipeline if pipeline.is_file() else folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); give a complete model folder") from error
    return config, "marigold" if file == pipeline else "transformers"


def _misfit(options: LabelOptions, config: JsonObject, kind: Kind) -> str | None:
    """Return why the model does not label the task; None where it does."""
    task = options.task
    if kind == "marigold":
        name = str(config.get("_class_name"))
        if name not in ("MarigoldDepthPipeline", "MarigoldNormalsPipeline"):
            return f"is a {name}; of diffusers MarigoldDepthPipeline and MarigoldNormalsPipeline label"
        if name != {"depth": "MarigoldDepthPipeline", "normals": "MarigoldNormalsPipeline"}.get(task):
            return f"is a {name}, which does not label {task}"
        if task == "depth" and options.scale is None:
            return "its depth is relative; say by --scale how it becomes metres (linear:A,B)"
        return None
    if "auto_map" in config and "model_type" not in config:
        return "needs code of its own, which covray does not run; give a model of transformers"
    if task == "depth" and options.scale is None and not _is_metric(config):
        return (
            "its depth may be relative: its configuration does not say that it is metric; say by --scale how it "
            "becomes metres (metres, linear:A,B, or inverse:A,B for disparity)"
        )
    if task == "normals" and options.axes is None:
        return "say by --axes what its three numbers are: x right, y up, z to the viewer, such as x,-y,-z"
    return None


def _is_metric(config: JsonObject) -> bool:
    """Return whether a model of depth says that it answers in metres."""
    return config.get("depth_estimation_type") == "metric" or config.get("model_type") in _METRIC_TYPES


def _classes(model: str, config: JsonObject) -> tuple[str, ...]:
    """Return the names of a segmentation model's classes. Raises ConfigError where they do not fit the palette."""
    names = config.get("id2label")
    if not isinstance(names, dict) or not names:
        raise ConfigError(f"{model}: its config.json names no classes (id2label); add them")
    if sorted(names) != sorted(str(number) for number in range(len(names))):
        raise ConfigError(
            f"{model}: the classes in its config.json are not numbered 0 to {len(names) - 1}; number them so"
        )
    if len(names) > MOST_CLASSES:
        raise ConfigError(
            f"{model}: has {len(names)} classes, and the palette colours for {MOST_CLASSES} and void; give a model of "
            "fewer classes"
        )
    return tuple(str(names[str(number)]) for number in range(len(names)))


def _licence(folder: Path) -> str | None:
    """Return the licence that the model's card names; None where it names none."""
    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        if not text.startswith("---"):
            return None
        header = yaml.safe_load(text.split("---")[1])
    except (OSError, ValueError, IndexError, yaml.YAMLError):
        return None
    if not isinstance(header, dict) or header.get("license") is None:
        return None
    return str(header["license"])
