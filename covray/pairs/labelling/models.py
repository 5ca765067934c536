"""Models of transformers and diffusers as functions from a photograph to a label's picture.

Weights are read from safetensors alone, and no code of a repository is run. Photographs are labelled one by one, so
that a label depends on its photograph alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image

from covray.errors import ConfigError, PairError, WeightsError, one_line
from covray.io.device import choose_device
from covray.io.model_folders import fingerprint_folder, require_whole
from covray.pairs.coco import KEYPOINTS, openpose
from covray.pairs.labelling.spec import LOADED, MOST_CLASSES, LabelModel, model_folder
from covray.progress import stage
from covray.tasks import TASKS, depth, normals, pose

Photo = NDArray[np.uint8]
Labeller = Callable[[Photo, int], Photo]
"""Draws the label of a photograph [h, w, 3], in its size; the number seeds models that sample. Raises PairError."""

PERSON = "person"


def load_labeller(model: LabelModel, device: str) -> Labeller:
    """Load ``model`` on ``device`` (``auto``, ``cpu`` or ``cuda``).

    Raises:
        WeightsError: It cannot be loaded, lacks tensors, is of another task, or is not the one that was found.
        ConfigError: There is no such device, or the options do not fit the model.
    """
    options = model.options
    folder = model_folder(options.model, options.revision)
    if fingerprint_folder(folder, LOADED) != model.fingerprint:
        raise WeightsError(
            f"{options.model}: this node's files differ from the driver's; give the same model everywhere"
        )
    place = choose_device(device, "--device")
    transformers.utils.logging.disable_progress_bar()
    make = _Marigold if model.kind == "marigold" else _LABELLERS[options.task]
    try:
        with stage(f"loading {options.model}"):
            return make(model, folder, place)
    except torch.OutOfMemoryError as error:
        raise WeightsError(f"{options.model}: does not fit in the memory of {place}; give --device cpu") from error


class _Network:
    """A model of transformers with its image processor."""

    def __init__(self, folder: Path, place: torch.device, *heads: str):
        """Load by the first of the auto classes ``heads`` that knows the model. Raises WeightsError."""
        try:
            self.config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
            head = self._head(folder, heads)
            network, report = head.from_pretrained(
                folder, config=self.config, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
            self.processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            raise WeightsError(
                f"{folder}: cannot be loaded ({one_line(error)}); give a complete model folder"
            ) from error
        require_whole(folder, report)
        self.network = network.to(place).eval()
        self.place = place

    def _head(self, folder: Path, heads: tuple[str, ...]) -> Any:
        for name in heads:
            head = getattr(transformers, name)
            if type(self.config) in head._model_mapping:
                return head
        raise WeightsError(f"{folder}: is a {self.config.model_type}, which {' or '.join(heads)} does not load")

    def __call__(self, photo: Photo, **inputs: Any) -> Any:
        """Return the model's output for a photograph. Raises PairError where the model takes none of its size."""
        extra = {}
        if getattr(getattr(self.config, "backbone_config", None), "num_experts", 1) > 1:
            extra["dataset_index"] = torch.zeros(1, dtype=torch.int64, device=self.place)  # ViTPose++: COCO's expert
        try:
            prepared = self.processor(images=[Image.fromarray(photo)], return_tensors="pt", **inputs)
            with torch.inference_mode():
                return self.network(**prepared.to(self.place), **extra)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:
            size = f"{photo.shape[1]}x{photo.shape[0]} px"
            raise PairError("model_answer", f"the model takes no photograph of {size} ({one_line(error)})") from error

    def post_process(self, name: str, output: Any, photo: Photo, **settings: Any) -> Any:
        """Return the processor's reading of an output, in the size of the photograph."""
        function = getattr(self.processor, name, None)
        if function is None:
            raise WeightsError(f"{self.config.model_type}: its image processor has no {name}; give another model")
        size = photo.shape[:2]
        known = inspect.signature(function).parameters
        for key in ("target_sizes", "source_sizes"):
            if key in known:
                settings[key] = [size]
        return function(output, **settings)[0]


class _Depth:
    def __init__(self, model: LabelModel, folder: Path, place: torch.device):
        self._network = _Network(folder, place, "AutoModelForDepthEstimation")
        self._scale = model.options.scale

    def __call__(self, photo: Photo, seed: int) -> Photo:
        """Return the depth of ``photo`` as the picture of a label; ``seed`` is for labellers that sample."""
        output = self._network(photo)
        # transformers resizes the model's depth to the size of the photograph; it is relative until it is scaled.
        answer = self._network.post_process("post_process_depth_estimation", output, photo)
        return _drawn_depth(_array(answer["predicted_depth"], photo.shape[:2]), self._scale)


def _drawn_depth(values: NDArray[np.floating], scale: Any) -> Photo:
    metres = values if scale is None else scale.metres(values)
    if not ((metres >= depth.MIN_M) & (metres < depth.MAX_M)).any():
        raise PairError(
            "no_depth",
            f"the model answers {values.min():.4g} to {values.max():.4g}, none of it within {depth.MAX_M:g} m; correct "
            "--scale",
        )
    return depth.render(metres)


class _Normals:
    def __init__(self, model: LabelModel, folder: Path, place: torch.device):
        self._network = _Network(folder, place, "AutoModelForNormalEstimation")
        self._axes = model.options.axes

    def __call__(self, photo: Photo, seed: int) -> Photo:
        output = self._network(photo)
        answer = self._network.post_process("post_process_normal_estimation", output, photo)
        vectors = _array(answer["normals"].permute(1, 2, 0), (*photo.shape[:2], 3))
        return _drawn_normals(vectors, self._axes)


def _drawn_normals(vectors: NDArray[np.floating], axes: tuple[str, str, str] | None) -> Photo:
    """Draw directions [h, w, 3], whose components ``axes`` names, at unit length."""
    ordered = vectors
    if axes is not None:
        ordered = np.empty_like(vectors)
        for channel, axis in enumerate(axes):
            sign = -1 if axis.startswith("-") else 1
            ordered[..., "xyz".index(axis[-1])] = sign * vectors[..., channel]
    length = np.linalg.norm(ordered, axis=2, keepdims=True)
    if not (length > 1e-6).any():
        raise PairError("no_normals", "the model answers no directions")
    return normals.render(np.where(length > 1e-6, ordered / np.maximum(length, 1e-6), 0))


class _Segmentation:
    def __init__(self, model: LabelModel, folder: Path, place: torch.device):
        self._network = _Network(folder, place, "AutoModelForSemanticSegmentation", "AutoModelForUniversalSegmentation")
        self._classes = len(model.classes)
        self._least = model.options.confidence
        if self._least and not _has_pixel_logits(self._network.config):
            raise ConfigError(
                f"--confidence: {self._network.config.model_type} answers masks without probabilities of pixels"
                "; leave it out"
            )

    def __call__(self, photo: Photo, seed: int) -> Photo:
        size = photo.shape[:2]
        output = self._network(photo)
        answer = self._network.post_process("post_process_semantic_segmentation", output, photo)
        indices = _array(answer, size)
        if self._least:
            logits = torch.nn.functional.interpolate(
                output.logits.float(), size=size, mode="bilinear", align_corners=False
            )
            sure = logits[0].softmax(dim=0).amax(dim=0) >= self._least
            indices = np.where(_array(sure, size), indices, MOST_CLASSES)
        unknown = (indices < 0) | ((indices >= self._classes) & (indices != MOST_CLASSES))
        if unknown.any():
            raise PairError(
                "unknown_class", f"the model answers {indices[unknown][0]}, and names {self._classes} classes"
            )
        return TASKS["segmentation"].render(indices.astype(np.uint8))


def _has_pixel_logits(config: Any) -> bool:
    return type(config) in transformers.AutoModelForSemanticSegmentation._model_mapping


class _Pose:
    def __init__(self, model: LabelModel, folder: Path, place: torch.device):
        self._network = _Network(folder, place, "AutoModelForPoseEstimation")
        self._least = model.options.confidence
        keypoints = self._network.config.num_labels
        if keypoints != len(KEYPOINTS):
            raise ConfigError(
                f"{model.options.model}: has {keypoints} keypoints, not COCO's {len(KEYPOINTS)}; give another"
            )
        self._detector = None
        if model.options.detector is not None:
            self._detector = _Network(model_folder(model.options.detector, None), place, "AutoModelForObjectDetection")

    def __call__(self, photo: Photo, seed: int) -> Photo:
        height_px, width_px = photo.shape[:2]
        people = []
        for box in self._boxes(photo):
            output = self._network(photo, boxes=[[box]])
            answer = self._network.processor.post_process_pose_estimation(output, boxes=[[box]])[0][0]
            points = _array(answer["keypoints"], (len(KEYPOINTS), 2))
            sure = _array(answer["scores"], (len(KEYPOINTS),)) >= self._least
            people.append(np.column_stack([points, 2 * sure]))
        return pose.render(openpose(np.array(people), height_px, width_px), height_px, width_px)

    def _boxes(self, photo: Photo) -> list[list[float]]:
        """Return a box (left, top, width, height) in pixels for each person. Raises PairError for nobody."""
        height_px, width_px = photo.shape[:2]
        if self._detector is None:
            return [[0.0, 0.0, float(width_px), float(height_px)]]
        output = self._detector(photo)
        answer = self._detector.post_process("post_process_object_detection", output, photo, threshold=0.5)
        boxes = []
        for label, box in zip(answer["labels"].tolist(), answer["boxes"].tolist(), strict=True):
            if self._detector.config.id2label.get(label) == PERSON:
                left, top, right, bottom = box
                boxes.append([left, top, right - left, bottom - top])
        if not boxes:
            raise PairError("nobody", "the detector finds no person")
        return boxes


class _Marigold:
    """Depth or normals by diffusers' Marigold; a pass of its own seed for each photograph."""

    def __init__(self, model: LabelModel, folder: Path, place: torch.device):
        import diffusers

        diffusers.utils.logging.disable_progress_bar()
        name = {"depth": "MarigoldDepthPipeline", "normals": "MarigoldNormalsPipeline"}[model.options.task]
        try:
            pipeline = getattr(diffusers, name).from_pretrained(folder, use_safetensors=True, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
            raise WeightsError(
                f"{folder}: cannot be loaded ({one_line(error)}); give a complete model folder"
            ) from error
        self._pipeline = pipeline.to(place)
        self._pipeline.set_progress_bar_config(disable=True)
        self._options = model.options

    def __call__(self, photo: Photo, seed: int) -> Photo:
        generator = torch.Generator("cpu").manual_seed(seed)
        answer = self._pipeline(Image.fromarray(photo), generator=generator, output_type="np").prediction[0]
        if self._options.task == "depth":
            return _drawn_depth(_array(answer[..., 0], photo.shape[:2]), self._options.scale)
        return _drawn_normals(_array(answer, photo.shape), self._options.axes)


_LABELLERS: dict[str, Callable[[LabelModel, Path, torch.device], Labeller]] = {
    "depth": _Depth,
    "normals": _Normals,
    "segmentation": _Segmentation,
    "pose": _Pose,
}


def _array(answer: Any, shape: tuple[int, ...]) -> NDArray[Any]:
    """Return an answer as an array of ``shape``. Raises PairError where it has another, or is not finite."""
    values = answer.detach().cpu().numpy() if isinstance(answer, torch.Tensor) else np.asarray(answer)
    if values.shape != shape:
        raise PairError("model_answer", f"the model's answer is of shape {values.shape}, not {shape}")
    if not np.isfinite(values).all():
        raise PairError("model_answer", "the model's answer is not finite (NaN or infinite)")
    return values
