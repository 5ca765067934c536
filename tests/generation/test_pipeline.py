"""``covray.Pipeline``: the bits of ``covray generate`` without a file, and one line for each mistake."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from covray.config import GenerateConfig, GeneratorConfig, SamplingConfig
from covray.errors import ConfigError
from covray.generation.files import generate
from covray.generation.pipeline import Pipeline
from covray.io import storage
from covray.tasks import TASKS
from tests.generation.conftest import ENGINE

CONFIG = GeneratorConfig.model_validate({"engine": ENGINE, "batch": 4})
Pictures = Callable[..., list[str]]


@pytest.fixture
def pipeline(write_run: Callable[..., str]) -> Pipeline:
    """A run of depth alone."""
    return Pipeline.from_run(write_run(method="none"), CONFIG)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "vote": 3}])
def test_the_answer_has_the_bits_that_the_command_writes(
    sampling: dict[str, Any], write_run: Callable[..., str], pictures: Pictures, tmp_path: Path
) -> None:
    run = write_run(method="linear")
    image, label, query = *pictures(1), *pictures(1, 80, 60, "label"), *pictures(1, 48, 33, "query")
    values = {
        "queries": [query], "examples": [(image, label)], "adapter": run, "task": "depth", "sampling": sampling,
        "seed": 5, "out": str(tmp_path / "out"), "engine": ENGINE, "batch": 4,
    }  # fmt: skip
    record = generate(GenerateConfig.model_validate(values)).answers[0]
    before = files_below(tmp_path)
    pipeline = Pipeline.from_run(Path(run), CONFIG)
    options: dict[str, Any] = {"sampling": SamplingConfig.model_validate(sampling), "seed": 5}
    answer = pipeline(Path(query), [(image, label)], "depth", **options)
    assert files_below(tmp_path) == before, "nothing is written"

    written = files_below(tmp_path / "out" / "query0")
    assert answer.files == written
    assert np.array_equal(answer.image, np.array(Image.open(io.BytesIO(written["answer.png"]))))
    assert np.array_equal(answer.data, np.load(io.BytesIO(written["depth_m.npy"])))
    assert (answer.spread is None) == (not sampling)
    likelihood = record.log_likelihood
    assert answer.raw.log_likelihood == (*likelihood.frames, likelihood.answer)
    assert [frame.size for frame in answer.frames] == [answer.query.size] * 2 == [(16, 16)] * 2
    streamed = list(pipeline.stream(query, [(image, label)], "depth", **options))
    assert [each.number for each in streamed] == [0, 1, 2]
    assert [each.is_answer for each in streamed] == [False, False, True]
    for frame, each in zip(answer.frames, streamed, strict=False):
        assert np.array_equal(frame, each.image)
    saved = answer.save(tmp_path / "saved")
    assert {Path(path).name: Path(path).read_bytes() for path in saved} == written


def test_paths_pil_pictures_and_arrays_are_answered_alike(pipeline: Pipeline, pictures: Pictures) -> None:
    image, label, query = pictures(3)
    expected = pipeline(query, [(image, label)])
    opened = Image.open(query)
    kinds: list[tuple[Any, Any]] = [
        (opened, [(Image.open(image), label)]),
        (np.array(opened), [[image, np.array(Image.open(label))]]),
        (opened.convert("RGBA"), ((Path(image), Image.open(label)),)),
    ]
    for query_kind, examples in kinds:
        answer = pipeline(query_kind, examples)
        assert np.array_equal(answer.image, expected.image)
        assert answer.raw.log_likelihood == expected.raw.log_likelihood
    grey = opened.convert("L")
    level = np.array(grey)
    three = np.repeat(level[..., None], 3, axis=2)
    answers = pipeline.batch([level, three, grey, three[:, ::-1][:, ::-1]], [(image, label)])
    for answer in answers:
        assert np.array_equal(answer.image, answers[0].image)
    alone = pipeline(level, [(image, label)])
    assert np.array_equal(alone.image, answers[0].image)
    assert alone.raw.log_likelihood == answers[0].raw.log_likelihood


def test_a_pil_picture_is_upright_as_its_file_is(pipeline: Pipeline, pictures: Pictures, tmp_path: Path) -> None:
    turned = Image.open(pictures(1)[0])
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    answer = pipeline(Image.open(tmp_path / "turned.png"))
    assert answer.image.size == (turned.height, turned.width)
    assert np.array_equal(answer.image, pipeline(str(tmp_path / "turned.png")).image)


@pytest.mark.parametrize("task", TASKS)
def test_data_is_what_the_task_reads_in_the_answer(
    task: str, write_run: Callable[..., str], pictures: Pictures
) -> None:
    pipeline = Pipeline.from_run(write_run(method="none", tasks=(task,)), CONFIG)
    answer = pipeline(pictures(1)[0])
    read = TASKS[task].read(np.array(answer.image))
    if task in ("colorization", "low_light"):
        assert answer.data is None
    elif task == "pose":
        shown = {(point["x_px"], point["y_px"]) for point in answer.data}
        assert shown == {(float(x), float(y)) for x, y, visible in read if visible}
    else:
        assert np.array_equal(answer.data, read)
        assert answer.data.dtype == read.dtype


def test_each_picture_is_yielded_before_the_next_is_begun(
    write_run: Callable[..., str], pictures: Pictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.from_run(write_run(method="linear"), CONFIG)
    reader = type(pipeline.generator.model.decoder)
    events = []
    write = reader.stream

    def stream(self: Any, *arguments: Any) -> Any:
        for each in write(self, *arguments):
            events.append("written")
            yield each

    monkeypatch.setattr(reader, "stream", stream)
    for _ in pipeline.stream(pictures(1)[0]):
        events.append("shown")
    assert events == ["written", "shown"] * 3


def test_a_notebook_shows_the_frames_and_the_answer(pipeline: Pipeline, pictures: Pictures) -> None:
    page = pipeline(pictures(1)[0])._repr_html_()
    assert page.count('src="data:image/png;base64,') == 2
    assert '"http' not in page


def test_a_pipeline_answers_inside_a_running_event_loop(pipeline: Pipeline, pictures: Pictures) -> None:
    async def cell() -> Any:
        return pipeline(pictures(1)[0]).image

    assert asyncio.run(cell()).size == (40, 30)


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(call: Callable[..., object], *arguments: Any, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        call(*arguments, **options)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_what_is_no_picture_is_refused_by_the_name_of_its_argument(
    pipeline: Pipeline, pictures: Pictures, tmp_path: Path
) -> None:
    good = pictures(1)[0]
    picture = np.array(Image.open(good))
    (tmp_path / "text.png").write_text("no picture")
    wrong: dict[str, Any] = {
        "float32 with values 0 to 1;": np.linspace(0, 1, 30, dtype=np.float32).reshape(5, 6),
        "int64 with values 0 to 300;": np.array([[0, 300], [1, 2]]),
        "bool with values": picture > 3,
        "object;": np.array([["a"]], object),
        "float64;": np.zeros((0, 3)),
        "shape [30, 40, 4]": np.dstack([picture, picture[..., 0]]),
        "shape [1, 30, 40, 3]": picture[None],
        "shape [0, 4, 3]": np.zeros((0, 4, 3), np.uint8),
        "too_small": np.zeros((1, 9), np.uint8),
        "mode F; convert": Image.fromarray(np.zeros((4, 4), np.float32)),
        "not_an_image": tmp_path / "text.png",
        "is not there": "none.png",
        "cannot be read": "a\0.png",
        "is a list": picture.tolist(),
        "is a NoneType": None,
    }
    for part, value in wrong.items():
        for call, argument in (
            (lambda value: pipeline(value), "query"),
            (lambda value: pipeline.stream(value), "query"),
            (lambda value: pipeline.batch([good, value]), "queries[1]"),
            (lambda value: pipeline(good, [(good, good), (value, good)]), "examples[1] image"),
            (lambda value: pipeline(good, [(good, value)]), "examples[0] label"),
        ):
            message = refusal(call, value)
            assert message.startswith((f"{argument}: ", f"{argument} ")), message
            assert part in message
    damaged = Path(good).read_bytes()[:400]
    (tmp_path / "damaged.png").write_bytes(damaged)
    assert refusal(pipeline, Image.open(tmp_path / "damaged.png")).startswith("query: ")


def test_arguments_that_cannot_be_used_are_refused(
    pipeline: Pipeline, pictures: Pictures, write_run: Callable[..., str]
) -> None:
    good = pictures(1)[0]
    assert refusal(pipeline, good, []).startswith("examples: the list is empty")
    assert refusal(pipeline.stream, good, ()).startswith("examples: the list is empty")
    assert refusal(pipeline, good, [good]).startswith("examples[0]: is not a pair")
    assert refusal(pipeline, good, good).startswith("examples: is a str")
    assert refusal(pipeline.batch, []).startswith("queries: ")
    assert refusal(pipeline.batch, good).startswith("queries: ")
    assert refusal(pipeline, good, task="cooking").startswith("task cooking: no such task")
    assert refusal(pipeline, good, task="pose") == "task pose: the run was trained on depth; give one of these"
    assert refusal(pipeline, good, classes=0).startswith("classes 0")
    assert refusal(pipeline, good, seed=-1).startswith("seed -1")
    assert "context" in refusal(pipeline, good, [(good, good)] * 60)
    assert refusal(Pipeline.from_run, "nowhere").startswith("nowhere: has no _run.json")


def test_without_a_task_the_answers_of_a_run_of_several_are_pictures(
    write_run: Callable[..., str], pictures: Pictures
) -> None:
    pipeline = Pipeline.from_run(write_run(method="none", tasks=("pose", "depth")), CONFIG)
    assert pipeline.tasks == ("depth", "pose")
    query = pictures(1)[0]
    assert pipeline(query).data is None
    assert pipeline(query, task="depth").data.shape == (30, 40)


def test_a_run_whose_dataset_is_gone_answers_any_task(write_run: Callable[..., str], pictures: Pictures) -> None:
    run = write_run(method="none")
    about = storage.read_json(f"{run}/_run.json")
    tokenizer = storage.read_json(f"{about['config']['data']}/_dataset.json")["config"]["tokenizer"]
    about["config"]["data"] = "gone"
    storage.write_json(f"{run}/_run.json", about)
    config = GeneratorConfig.model_validate({"engine": ENGINE, "batch": 4, "tokenizer": tokenizer})
    pipeline = Pipeline.from_run(run, config)
    assert pipeline.tasks is None
    (exported,) = pipeline(pictures(1)[0], task="pose").raw.data
    assert exported == "keypoints.json"


def test_a_label_of_class_numbers_is_drawn_as_the_run_has_seen_them(
    write_run: Callable[..., str], pictures: Pictures, tmp_path: Path
) -> None:
    """Its ``classes.png`` has the numbers of the run's own masks, too."""
    run = write_run(method="none", tasks=("segmentation",))
    about = storage.read_json(f"{run}/_run.json") | {"classes": {"classes": ["ground", "sky"], "class_numbers": [0, 9]}}
    storage.write_json(f"{run}/_run.json", about)
    pipeline = Pipeline.from_run(run, CONFIG)
    image, query = pictures(2)
    numbers = np.where(np.arange(40) < 20, 0, 9).astype(np.uint8)[None].repeat(30, axis=0)
    Image.fromarray(numbers).save(tmp_path / "mask.png")
    answer = pipeline(query, [(image, numbers)])
    from_file = pipeline(query, [(image, str(tmp_path / "mask.png"))])
    assert answer.files == from_file.files
    assert set(np.unique(answer.data)) <= {0, 9}
    with pytest.raises(ConfigError, match=r"examples\[0\]"):
        pipeline(query, [(image, numbers + 3)])
