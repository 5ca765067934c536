"""Labels by models: their values are the model's own output, and what a model cannot say is a reason or one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from covray.errors import ConfigError, PairError, WeightsError
from covray.io.images import Picture, decode
from covray.pairs.coco import openpose
from covray.pairs.labelling import models, pairs
from covray.pairs.labelling.models import load_labeller
from covray.pairs.labelling.pairs import label_pairs
from covray.pairs.labelling.spec import LabelOptions, find_model, read_axes, read_scale
from covray.plugins import Entry, Registry
from covray.tasks import depth, normals, pose, segmentation
from tests.support import labelling
from tests.support.labelling import photo_of, scribble, seeded
from tests.support.photographs import save

PHOTO = photo_of(1)
SIZE = PHOTO.shape[:2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a tiny model, written once."""
    root = tmp_path_factory.mktemp("models")

    def folder(write: Callable[..., Path], *arguments: Any) -> str:
        path = root / "-".join([write.__name__, *map(str, arguments)])
        if not path.exists():
            seeded(write, path, *arguments)
        return str(path)

    return folder


def labelled(options: LabelOptions) -> np.ndarray[Any, Any]:
    return load_labeller(find_model(options), "cpu")(PHOTO, 7)


def outputs(folder: str, head: str, **inputs: Any) -> tuple[Any, Any]:
    """What transformers itself answers: the output and the image processor."""
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    model = getattr(transformers, head).from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(**processor(images=[Image.fromarray(PHOTO)], return_tensors="pt", **inputs)), processor


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, "linear:0.5,1", "metres"])
def test_depth_is_the_models_own_in_metres(folders: Callable[..., str], scale: str | None) -> None:
    folder = folders(labelling.write_glpn)
    output, processor = outputs(folder, "AutoModelForDepthEstimation")
    own = processor.post_process_depth_estimation(output, target_sizes=[SIZE])[0]["predicted_depth"].numpy()
    expected = own * 0.5 + 1 if scale == "linear:0.5,1" else own
    read = depth.read(labelled(LabelOptions("depth", folder, scale=read_scale(scale))))
    assert np.abs(read - expected).max() <= 0.5 * depth.MAX_M / 255 + 1e-5


def test_inverse_depth_becomes_metres_by_its_formula(folders: Callable[..., str]) -> None:
    folder = folders(labelling.write_dpt)
    with pytest.raises(ConfigError, match=r"its depth may be relative: .* say by --scale"):
        find_model(LabelOptions("depth", folder))
    output, processor = outputs(folder, "AutoModelForDepthEstimation")
    own = processor.post_process_depth_estimation(output, target_sizes=[SIZE])[0]["predicted_depth"].numpy()
    read = depth.read(labelled(LabelOptions("depth", folder, scale=read_scale("inverse:0.5,0.2"))))
    assert np.abs(read - np.minimum(1 / (0.5 * own + 0.2), depth.MAX_M)).max() <= 0.5 * depth.MAX_M / 255 + 1e-5
    with pytest.raises(PairError, match=r"no_depth: .* correct --scale"):
        labelled(LabelOptions("depth", folder, scale=read_scale("linear:1,1000")))


@pytest.mark.parametrize("write", [labelling.write_segformer, labelling.write_maskformer])
def test_classes_are_the_models_own(folders: Callable[..., str], write: Callable[..., Path]) -> None:
    folder = folders(write)
    universal = write is labelling.write_maskformer
    output, processor = outputs(folder, f"AutoModelFor{'Universal' if universal else 'Semantic'}Segmentation")
    own = processor.post_process_semantic_segmentation(output, target_sizes=[SIZE])[0].numpy()
    model = find_model(LabelOptions("segmentation", folder))
    label = load_labeller(model, "cpu")(PHOTO, 0)
    assert np.array_equal(segmentation.read(label, model.meta()), own)
    assert model.meta()["classes"] == [f"class {number}" for number in range(4 if universal else 5)]
    if universal:
        with pytest.raises(ConfigError, match="--confidence: maskformer answers masks"):
            labelled(LabelOptions("segmentation", folder, confidence=0.5))
        return
    logits = torch.nn.functional.interpolate(output.logits, size=SIZE, mode="bilinear", align_corners=False)
    sure = logits[0].softmax(0).amax(0).numpy()
    least = float(np.median(sure))
    found = segmentation.read(labelled(LabelOptions("segmentation", folder, confidence=least)), model.meta())
    assert np.array_equal(found, np.where(sure >= least, own, 255))


@pytest.mark.parametrize("detected", [False, True])
def test_keypoints_are_the_models_own(folders: Callable[..., str], detected: bool) -> None:
    folder = folders(labelling.write_vitpose)
    boxes = [[0.0, 0.0, SIZE[1], SIZE[0]]]
    detector = None
    if detected:
        detector = folders(labelling.write_yolos, ("person",))
        output, processor = outputs(detector, "AutoModelForObjectDetection")
        found = processor.post_process_object_detection(output, threshold=0.5, target_sizes=[SIZE])[0]["boxes"].tolist()
        boxes = [[left, top, right - left, bottom - top] for left, top, right, bottom in found]
    people = []
    for box in boxes:
        output, processor = outputs(folder, "AutoModelForPoseEstimation", boxes=[[box]])
        own = processor.post_process_pose_estimation(output, boxes=[[box]])[0][0]
        people.append(np.column_stack([own["keypoints"], np.where(own["scores"] >= 0.001, 2, 0)]))
    expected = pose.render(openpose(np.array(people), *SIZE), *SIZE)
    label = labelled(LabelOptions("pose", folder, confidence=0.001, detector=detector))
    assert np.array_equal(label, expected)
    assert not labelled(LabelOptions("pose", folder, confidence=1.0)).any(), "nothing is so sure"


def test_nobody_is_a_reason(folders: Callable[..., str]) -> None:
    options = LabelOptions("pose", folders(labelling.write_vitpose), detector=folders(labelling.write_yolos, ("cat",)))
    with pytest.raises(PairError, match="nobody: the detector finds no person"):
        labelled(options)


def test_normals_are_the_models_own_in_our_axes(folders: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    def post_process(self: Any, outputs: Any, target_sizes: Any) -> list[dict[str, torch.Tensor]]:
        """As Tips' own image processor, which needs torchvision."""
        directions = torch.nn.functional.normalize(outputs.normals, dim=1)
        return [{"normals": torch.nn.functional.interpolate(directions, target_sizes[0], mode="bilinear")[0]}]

    folder = folders(labelling.write_tips)
    kind = type(transformers.AutoImageProcessor.from_pretrained(folder))
    monkeypatch.setattr(kind, "post_process_normal_estimation", post_process, raising=False)
    with pytest.raises(ConfigError, match="say by --axes"):
        find_model(LabelOptions("normals", folder))
    output, processor = outputs(folder, "AutoModelForNormalEstimation")
    own = processor.post_process_normal_estimation(output, target_sizes=[SIZE])[0]["normals"].permute(1, 2, 0).numpy()
    expected = np.stack([own[..., 0], -own[..., 1], -own[..., 2]], axis=2)
    expected /= np.linalg.norm(expected, axis=2, keepdims=True)
    read = normals.read(labelled(LabelOptions("normals", folder, axes=read_axes("x,-y,-z"))))
    assert (read * expected).sum(axis=2).min() > np.cos(np.deg2rad(0.6))


@pytest.mark.parametrize("task", ["depth", "normals"])
def test_marigold_labels_each_photograph_by_its_own_seed(folders: Callable[..., str], task: str) -> None:
    import diffusers

    folder = folders(labelling.write_marigold, task)
    name = f"Marigold{task.title()}Pipeline"
    pipeline = getattr(diffusers, name).from_pretrained(folder)
    own = pipeline(Image.fromarray(PHOTO), generator=torch.Generator().manual_seed(7)).prediction[0]
    if task == "depth":
        with pytest.raises(ConfigError, match="its depth is relative; say by --scale"):
            find_model(LabelOptions("depth", folder))
        read = depth.read(labelled(LabelOptions("depth", folder, scale=read_scale("linear:5,1"))))
        assert np.abs(read - (5 * own[..., 0] + 1)).max() <= 0.5 * depth.MAX_M / 255 + 1e-5
    else:
        read = normals.read(labelled(LabelOptions("normals", folder)))
        assert (read * own).sum(axis=2).min() > np.cos(np.deg2rad(0.6))


# --- rows -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    for number in range(3):
        save(tmp_path / "photos" / f"{number}.png", photo_of(number))
    (tmp_path / "photos" / "broken.png").write_text("no picture")
    return tmp_path / "photos"


def test_a_row_keeps_the_model_and_a_bad_photograph_its_reason(folders: Callable[..., str], photographs: Path) -> None:
    folder = folders(labelling.write_glpn)
    rows = list(label_pairs([str(photographs)], LabelOptions("depth", folder), device="cpu", splits={"val": 1}))
    assert [row.image.uri for row in rows] == ["0.png", "1.png", "2.png", "broken.png"]
    assert {row.split for row in rows} == {"val"}
    meta = rows[1].meta
    assert (meta["model"], meta["revision"], meta["licence"]) == (folder, None, "apache-2.0")
    assert len(meta["fingerprint"]) == 64
    assert np.array_equal(decode(rows[1].label.bytes or b""), labelled(LabelOptions("depth", folder)))
    assert rows[3].label == Picture()
    assert rows[3].meta["error"].startswith("not_an_image")
    (shrunk,) = label_pairs([str(photographs)], LabelOptions("depth", folder), 33, device="cpu", count=1)
    assert decode(shrunk.label.bytes or b"").shape == (33, 44, 3)
    (small,) = label_pairs([str(photographs)], LabelOptions("depth", folder), 18, device="cpu", count=1)
    assert small.meta["error"].startswith("model_answer: the model takes no photograph of 24x18 px")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda shape: torch.full(shape, float("nan")), "model_answer: the model's answer is not finite"),
        (lambda shape: torch.ones(shape[0] + 1, shape[1]), r"model_answer: the model's answer is of shape \(37, 48\)"),
    ],
)
def test_an_answer_of_nan_or_another_size_is_a_rejected_row(
    folders: Callable[..., str], photographs: Path, monkeypatch: pytest.MonkeyPatch, answer: Any, reason: str
) -> None:
    answers = {"predicted_depth": answer(SIZE)}
    monkeypatch.setattr(models._Network, "post_process", lambda *_, **__: answers)
    rows = list(label_pairs([str(photographs)], LabelOptions("depth", folders(labelling.write_glpn)), device="cpu"))
    for row in rows[:3]:
        assert row.label == Picture()
        with pytest.raises(PairError, match=reason):
            raise PairError(*row.meta["error"].split(": ", 1))


def test_no_memory_for_a_photograph_is_a_rejected_row(
    folders: Callable[..., str], photographs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(models._Network, "__call__", full)
    rows = list(label_pairs([str(photographs)], LabelOptions("depth", folders(labelling.write_glpn)), device="cpu"))
    assert [row.meta["error"].partition(":")[0] for row in rows] == [*["out_of_memory"] * 3, "not_an_image"]


# --- before the start -------------------------------------------------------------------------------------------------


def copied(folder: str, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_classes_that_do_not_fit_the_palette_are_one_line(folders: Callable[..., str], tmp_path: Path) -> None:
    folder = copied(folders(labelling.write_segformer), tmp_path / "model")
    names = {str(number): "class" for number in range(256)}
    scribble(folder, lambda config: config.update(id2label=names))
    with pytest.raises(ConfigError, match="has 256 classes, and the palette colours for 255 and void"):
        find_model(LabelOptions("segmentation", str(folder)))
    scribble(folder, lambda config: config.update(id2label={"1": "a", "2": "b"}))
    with pytest.raises(ConfigError, match="are not numbered 0 to 1"):
        find_model(LabelOptions("segmentation", str(folder)))
    scribble(folder, lambda config: config.pop("id2label"))
    with pytest.raises(ConfigError, match="names no classes"):
        find_model(LabelOptions("segmentation", str(folder)))


def test_a_model_that_cannot_label_is_one_line(folders: Callable[..., str], tmp_path: Path) -> None:
    glpn = folders(labelling.write_glpn)
    pickled = copied(glpn, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(WeightsError, match=r"has no \*.safetensors"):
        find_model(LabelOptions("depth", str(pickled)))
    coded = copied(glpn, tmp_path / "coded")
    scribble(coded, lambda config: (config.pop("model_type"), config.update(auto_map={"AutoModel": "own.Model"})))
    with pytest.raises(ConfigError, match="needs code of its own"):
        find_model(LabelOptions("depth", str(coded), scale=read_scale("metres")))
    with pytest.raises(WeightsError, match="is a segformer, which AutoModelForDepthEstimation does not load"):
        labelled(LabelOptions("depth", folders(labelling.write_segformer), scale=read_scale("metres")))
    with pytest.raises(ConfigError, match="has 16 keypoints, not COCO's 17"):
        labelled(LabelOptions("pose", folders(labelling.write_vitpose, 16)))
    with pytest.raises(ConfigError, match="is a MarigoldNormalsPipeline, which does not label depth"):
        find_model(LabelOptions("depth", folders(labelling.write_marigold, "normals")))
    with pytest.raises(WeightsError, match="is no model that labels"):
        find_model(LabelOptions("depth", "nano"))


def test_files_that_changed_after_the_start_are_refused(folders: Callable[..., str], tmp_path: Path) -> None:
    folder = copied(folders(labelling.write_glpn), tmp_path / "model")
    model = find_model(LabelOptions("depth", str(folder)))
    scribble(folder, lambda config: config.update(max_depth=20))
    with pytest.raises(WeightsError, match="differ from the driver's"):
        load_labeller(model, "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "edges"}, "no model of transformers labels it"),
        ({"task": "heat"}, "no such task"),
        ({"task": "normals", "scale": read_scale("metres")}, "--scale: is for --task depth alone"),
        ({"task": "depth", "axes": read_axes("x,y,z")}, "--axes: is for --task normals alone"),
        ({"task": "depth", "detector": "m"}, "--detector: is for --task pose alone"),
        ({"task": "depth", "confidence": 0.5}, "--confidence: is for --task segmentation and pose"),
    ],
)
def test_options_that_contradict_each_other_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_model(LabelOptions(**{"model": "absent"} | options))


@pytest.mark.parametrize("text", ["", "cm", "linear", "linear:1", "linear:0,0", "inverse:nan,1", "cubic:1,2"])
def test_a_scale_that_is_none_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--scale .*: write metres, linear:A,B"):
        read_scale(text)
    with pytest.raises(ConfigError, match=r"--axes .*: write x, y and z"):
        read_axes(text)


# --- plug-ins ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A labeller ``toy`` whose answers are those of the list."""
    answers: list[Any] = []

    def load(task: str, model: str, device: str) -> Callable[[Any], Any]:
        return lambda photo: answers.pop(0)

    entry = Entry("toy", "toy:load", "toy", "1.0", lambda: load)
    registry = Registry(pairs.LABELLERS_GROUP, "labeller", [entry], pairs._check_labeller)
    monkeypatch.setattr(pairs, "labellers", lambda: registry)
    return answers


def test_a_plugin_labels_any_task(plugin: list[Any], photographs: Path) -> None:
    edges = np.zeros(SIZE, bool)
    edges[3:5] = True
    plugin += [edges, np.zeros((2, 2), bool), "nothing"]
    rows = list(label_pairs([str(photographs)], LabelOptions("edges", "mine"), device="cpu", labeller="toy"))
    assert np.array_equal(decode(rows[0].label.bytes or b"")[..., 0] > 0, edges)
    assert rows[0].meta["labeller"] == "toy"
    assert [row.meta["error"].partition(":")[0] for row in rows[1:3]] == ["model_answer", "model_answer"]
    with pytest.raises(ConfigError, match="absent: no such labeller"):
        label_pairs([str(photographs)], LabelOptions("edges", "mine"), device="cpu", labeller="absent")
    assert json.dumps(dict(label_pairs([str(photographs)], LabelOptions("edges", ""), labeller="toy").settings))
