"""``covray generate``: the right prompt, the right files, the same answer alone and among others, and its refusals."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from covray.chains.build import BlockBuilder
from covray.chains.prepare import prepare_block
from covray.cli import app as cli
from covray.config import (
    BackboneConfig,
    BuildConfig,
    GenerateConfig,
    GeneratorConfig,
    PriorConfig,
    SamplingConfig,
    TokenizerConfig,
    load_config,
)
from covray.errors import ConfigError, CovrayError
from covray.generation import models
from covray.generation.files import generate
from covray.generation.generator import Generator
from covray.generation.request import Example, Request
from covray.generation.resolving import ResolvedGenerator
from covray.io import storage
from covray.io.images import square
from covray.models.lvm.adapter import save_adapter
from covray.models.lvm.decoding.decoder import LvmDecoder
from covray.models.lvm.draft import Draft
from covray.models.lvm.lora import Diffusion, Lora
from covray.pairs.manifest import MANIFEST_SCHEMA
from covray.tasks import TASKS, pose, segmentation
from tests.generation.conftest import ENGINE, LORA
from tests.support.backbones import load, write_llama
from tests.support.commands import error_line
from tests.support.datasets import CODES, TOKENS

Generate = Callable[..., dict[str, Any]]


@pytest.fixture
def answered(tmp_path: Path) -> Generate:
    """``generate`` into ``tmp_path / out``."""

    def answered(**options: Any) -> dict[str, Any]:
        base: dict[str, Any] = {"out": str(tmp_path / "out"), "engine": ENGINE, "batch": 4}
        return generate(GenerateConfig.model_validate(base | options)).to_json()

    return answered


def read_png(*path: str | Path) -> np.ndarray:
    return np.array(Image.open(Path(*path)))


# --- answers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["linear", "diffusion", "none"])
def test_the_model_reads_the_chains_that_a_build_makes_and_its_answer_is_written(
    method: str, answered: Generate, write_run: Callable[..., str], pictures: Callable[..., list[str]],
    llama_folder: Path, prior_folder: Path, vqgan_folder: Path, tmp_path: Path,
) -> None:  # fmt: skip
    images, labels, queries = pictures(2), pictures(2, 80, 60, "label"), pictures(1, 48, 33, "query")
    examples = list(zip(images, labels, strict=True))
    result = answered(adapter=write_run(method=method), examples=examples, queries=queries, task="depth")

    build = load_config(
        BuildConfig, None,
        {"pairs": "", "out": "", "lengths": (4,), "prior.path": str(prior_folder), "prior.steps": 4,
         "tokenizer.path": str(vqgan_folder), "engine": ENGINE, "check_endpoints": 0},
    )  # fmt: skip
    builder = BlockBuilder(build)
    table = [
        {"pair_id": number, "task": "depth", "split": "", "meta": "{}", "image": {"bytes": Path(image).read_bytes()},
         "label": {"bytes": Path(label).read_bytes()}}
        for number, (image, label) in enumerate(examples)
    ]  # fmt: skip
    prepared = prepare_block(pa.Table.from_pylist(table, MANIFEST_SCHEMA), builder.config, builder.models(), None)
    prompt: list[list[int]] = []
    for row in builder.build(prepared)[0].to_pylist():
        frames = [frame["tokens"] for frame in row["frames"] if frame["method"] == method]
        assert len(frames) == (0 if method == "none" else 2)
        prompt += [row["source"], *frames, row["label"]]
    query = builder.tokenizer.encode(square(read_png(queries[0]), 16)[None])
    decoder = LvmDecoder(load(llama_folder, LORA), CODES, TOKENS, batch=4)
    written = decoder.decode(np.array(prompt).ravel(), query, 1 if method == "none" else 3)

    assert result["prompt_tokens"] == len(prompt) * TOKENS
    (answer,) = result["answers"]
    likelihood = answer["log_likelihood"]
    assert [*likelihood["frames"], likelihood["answer"]] == written.image_log_likelihood[0].tolist()
    expected = builder.tokenizer.decode(written.ids[0])[-1]
    shown = read_png(tmp_path, "out", "query0", "answer.png")
    assert np.array_equal(shown, np.array(Image.fromarray(expected).resize((48, 33), Image.Resampling.NEAREST)))
    strip = Image.open(tmp_path / "out" / "query0" / "strip.png")
    assert strip.width // 128 == (2 if method == "none" else 4)
    assert json.loads((tmp_path / "out" / "generation.json").read_text()) == result


def test_chains_without_frames_need_no_spacing() -> None:
    # Of a run on plain pairs, whose dataset has frames at alphas of its own.
    for method, length in (("none", None), ("linear", 2)):
        config = GeneratorConfig(
            method=method, length=length, spacing=(0.6, 0.9), prior=PriorConfig(), tokenizer=TokenizerConfig(),
            fit="stretch",
        )  # fmt: skip
        resolved = ResolvedGenerator(config, cast(Any, None), None, None, None, None)
        built = resolved.build_config()
        assert (built.methods, built.lengths, built.spacing) == ((), (2,), "even")


def test_alphas_of_examples_ascend() -> None:
    with pytest.raises(ConfigError, match=r"^spacing: give even, path, or alphas that ascend"):
        load_config(GenerateConfig, None, {"queries": ["a.png"], "out": "out", "spacing": [0.9, 0.6]})


def test_the_run_decides_and_options_win(answered: Generate, write_run: Callable[..., str], pictures: Any) -> None:
    run = write_run(method="none", tasks=("pose",), lengths=(3, 6))
    config = answered(adapter=run, queries=pictures(1))["config"]
    assert (config["method"], config["task"], config["backbone"]["scale"]) == ("none", "pose", "custom")
    config = answered(adapter=run, queries=pictures(1), method="linear", task="depth", length=3)["config"]
    assert (config["method"], config["task"], config["length"]) == ("linear", "depth", 3)


def test_a_query_is_answered_alike_alone_and_among_others(
    answered: Generate, write_run: Callable[..., str], pictures: Any, tmp_path: Path
) -> None:
    run, paths = write_run(method="none"), pictures(3)
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "picture1.png").write_bytes(Path(paths[2]).read_bytes())
    sampling = {"temperature": 1.0, "best_of": 3}
    options = {"adapter": run, "sampling": sampling, "examples": [paths[:2]]}
    several = answered(queries=[*paths, str(tmp_path / "else" / "picture1.png")], **options)["answers"]
    shown = [read_png(tmp_path, "out", answer["folder"], "answer.png") for answer in several]
    assert [answer["folder"] for answer in several] == ["picture0", "picture1", "picture2", "picture1-2"]
    assert np.array_equal(shown[2], shown[3])  # the same picture
    (alone,) = answered(queries=paths[2:], **options)["answers"]
    assert alone == several[2]
    assert np.array_equal(read_png(tmp_path, "out", "picture2", "answer.png"), shown[2])
    (other,) = answered(queries=paths[2:], seed=1, **options)["answers"]
    assert other["log_likelihood"] != alone["log_likelihood"]


@pytest.mark.parametrize("task", [*TASKS, None])
def test_an_answer_is_written_as_what_its_task_reads(
    task: str | None, answered: Generate, write_run: Callable[..., str], pictures: Any, tmp_path: Path
) -> None:
    result = answered(adapter=write_run(method="none"), queries=pictures(1, 50, 20), task=task)
    folder = tmp_path / "out" / "picture0"
    answer = read_png(folder, "answer.png")
    assert answer.shape == (20, 50, 3)
    (data,) = set(result["answers"][0]["files"]) - {"strip.png", "answer.png"} or {None}
    if task in ("colorization", "low_light", None):
        assert data is None
        return
    expected = TASKS[task].read(answer)
    if data == "classes.png":
        found = read_png(folder, data)
    elif data == "keypoints.json":
        found = np.zeros((18, 3), np.float32)
        for point in json.loads((folder / data).read_text()):
            found[pose.KEYPOINTS.index(point["name"])] = point["x_px"], point["y_px"], 1
    else:
        found = np.load(folder / data)
    assert found.dtype == expected.dtype
    assert np.array_equal(found, expected)


def test_a_segmentation_is_read_by_the_classes_that_are_asked_for(
    answered: Generate, write_run: Callable[..., str], pictures: Any, tmp_path: Path
) -> None:
    answered(adapter=write_run(method="none"), queries=pictures(1), task="segmentation", classes=134)
    folder = tmp_path / "out" / "picture0"
    expected = segmentation.read_classes(read_png(folder, "answer.png"), 134)
    assert np.array_equal(read_png(folder, "classes.png"), expected)
    assert expected.max() > 20


def test_cropped_answers_are_of_the_centre_square(
    answered: Generate, write_run: Callable[..., str], pictures: Any, tmp_path: Path
) -> None:
    answered(adapter=write_run(method="none"), queries=pictures(1, 50, 20), fit="crop")
    assert read_png(tmp_path, "out", "picture0", "answer.png").shape == (20, 20, 3)


def test_without_a_run_the_backbone_answers(
    answered: Generate, write_run: Callable[..., str], pictures: Any, llama_folder: Path, vqgan_folder: Path
) -> None:
    plain = {"backbone": BackboneConfig(scale="custom", path=str(llama_folder)), "method": "none"}
    paths = pictures(1)
    untuned = answered(queries=paths, tokenizer={"path": str(vqgan_folder)}, **plain)
    assert untuned["fingerprints"]["adapter"] is None
    tuned = answered(queries=paths, adapter=write_run(method="none"))
    assert tuned["answers"][0]["log_likelihood"] != untuned["answers"][0]["log_likelihood"]


# --- one generator, many requests ------------------------------------------------------------------------------------


def test_a_generator_answers_again_without_loading_or_making_chains_again(
    write_run: Callable[..., str], pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = pictures(4)
    example = Example(Path(paths[0]).read_bytes(), Path(paths[1]).read_bytes())
    queries = tuple(read_png(path) for path in paths[2:])
    config = GeneratorConfig.model_validate({"adapter": write_run(method="diffusion"), "engine": ENGINE, "batch": 4})
    generator = Generator.load(config)
    together = generator.answer(Request(queries, (example,), task="depth"))
    monkeypatch.setattr(models, "load_backbone", None)
    monkeypatch.setattr(BlockBuilder, "build", None)
    (alone,) = generator.answer(Request(queries[1:], (example,), task="depth"))
    assert alone.log_likelihood == together[1].log_likelihood
    assert np.array_equal(alone.picture, together[1].picture)
    assert alone.data.keys() == {"depth_m.npy"}
    assert generator.answer(Request(queries[1:], task="depth"))[0].log_likelihood != alone.log_likelihood


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0}, {"temperature": 1.0, "best_of": 3}, {"temperature": 1.0, "vote": 3}]
)
def test_a_stream_yields_the_pictures_of_the_answers_one_by_one(
    sampling: dict[str, Any], write_run: Callable[..., str], pictures: Any
) -> None:
    config = GeneratorConfig.model_validate({"adapter": write_run(method="linear"), "engine": ENGINE, "batch": 4})
    generator = Generator.load(config)
    request = Request(
        tuple(read_png(path) for path in pictures(2)), sampling=SamplingConfig.model_validate(sampling), seed=3
    )
    answers = generator.answer(request)
    stream = list(generator.stream(request))
    assert len(stream) == 2 * 3
    for query, answer in enumerate(answers):
        written = [each for each in stream if each.query == query]
        assert [each.number for each in written] == [0, 1, 2]
        assert [each.is_answer for each in written] == [False, False, True]
        assert np.array_equal([each.picture for each in written], [*answer.frames, answer.small])


def test_a_run_of_blocks_is_answered_by_blocks(
    write_run: Callable[..., str], pictures: Any, llama_folder: Path
) -> None:
    run = write_run(method="linear")
    plain = storage.read_json(f"{run}/_run.json")
    blocks = {"objective": "block_diffusion", "block_diffusion": {"block": TOKENS // 2}}
    storage.write_json(f"{run}/_run.json", plain | {"config": plain["config"] | blocks})
    lora = Lora(LORA.rank, LORA.alpha, LORA.targets, Diffusion(CODES + 1, TOKENS // 2))
    save_adapter(load(llama_folder, lora), f"{run}/adapter", str(llama_folder))
    generator = Generator.load(GeneratorConfig.model_validate({"adapter": run, "engine": ENGINE, "batch": 4}))
    queries = tuple(read_png(path) for path in pictures(2))
    decoder = generator.model.decoder
    assert isinstance(decoder, LvmDecoder)
    generator.answer(Request(queries, sampling=SamplingConfig(passes=1)))
    assert decoder.passes == 3 * 2 * 2, "three pictures of two blocks, each written and kept"
    generator.answer(Request(queries, sampling=SamplingConfig(decoder="sequential")))
    assert decoder.passes == 12 + 3 * TOKENS - 1


def test_a_run_with_drafts_is_answered_by_them_and_one_without_is_refused(
    answered: Generate, write_run: Callable[..., str], pictures: Any, llama_folder: Path
) -> None:
    run = write_run(method="linear")
    options = {"adapter": run, "queries": pictures(1)}
    with pytest.raises(ConfigError, match=f"speculative needs a run trained with objective=draft, which {run} is not"):
        answered(sampling={"decoder": "speculative"}, **options)
    plain = answered(**options)
    record = storage.read_json(f"{run}/_run.json")
    trained = {"objective": "draft", "draft": {"rank": 2, "alpha": 4.0, "tokens": 3}}
    storage.write_json(f"{run}/_run.json", record | {"config": record["config"] | trained})
    lora = Lora(LORA.rank, LORA.alpha, LORA.targets, draft=Draft(2, 4.0, LORA.targets, CODES + 1, 3))
    save_adapter(load(llama_folder, lora), f"{run}/adapter", str(llama_folder))
    drafted = answered(sampling={"decoder": "speculative"}, **options)
    assert drafted["fingerprints"] == plain["fingerprints"]
    likelihoods = [each["answers"][0]["log_likelihood"]["answer"] for each in (plain, drafted)]
    assert likelihoods[0] == pytest.approx(likelihoods[1], rel=1e-4)


def test_expected_tokens_are_for_continuous_labels(
    answered: Generate, write_run: Callable[..., str], pictures: Any, tmp_path: Path
) -> None:
    options = {"adapter": write_run(method="linear"), "queries": pictures(1, 16, 16)}
    for task, differ in (("depth", True), ("segmentation", False)):
        answers = []
        for expected in (None, 100.0):  # so hot that every token is the most central code
            answered(sampling={"expected": expected}, task=task, **options)
            answers.append(read_png(tmp_path, "out", "picture0", "answer.png"))
        assert np.array_equal(*answers) != differ


# --- votes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["segmentation", "depth", "normals", "colorization", None])
def test_a_vote_without_chance_is_the_greedy_answer_read_and_rendered(
    task: str | None, answered: Generate, write_run: Callable[..., str], pictures: Any, tmp_path: Path
) -> None:
    options = {"adapter": write_run(method="linear"), "queries": pictures(1, 16, 16), "task": task}
    greedy = answered(**options)["answers"][0]
    picture = read_png(tmp_path, "out", "picture0", "answer.png")
    voted = answered(sampling={"vote": 3}, **options)["answers"][0]
    if task is not None:
        picture = TASKS[task].render(TASKS[task].read(picture))
    assert np.array_equal(read_png(tmp_path, "out", "picture0", "answer.png"), picture)
    assert not read_png(tmp_path, "out", "picture0", "spread.png").any()
    assert (greedy.get("samples"), voted["samples"]) == (None, 3)
    assert voted["log_likelihood"] == greedy["log_likelihood"]
    assert set(voted["files"]) - set(greedy["files"]) == {"spread.png"}


def test_a_vote_joins_the_candidates_of_a_query_alone_and_among_others(
    answered: Generate, write_run: Callable[..., str], pictures: Any, llama_folder: Path, vqgan_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Seven candidates fill batches of four, with those of other queries beside them."""
    paths = pictures(3, 16, 16)
    sampling = {"temperature": 1.0, "vote": 7}
    options = {"adapter": write_run(method="linear"), "examples": [paths[:2]], "task": "depth", "sampling": sampling}
    several = answered(queries=paths, **options)["answers"]
    shown = [read_png(tmp_path, "out", "picture2", file) for file in ("answer.png", "spread.png")]
    (alone,) = answered(queries=paths[2:], **options)["answers"]
    assert alone == several[2]
    for file, expected in zip(("answer.png", "spread.png"), shown, strict=True):
        assert np.array_equal(read_png(tmp_path, "out", "picture2", file), expected)

    config = GeneratorConfig.model_validate({"adapter": options["adapter"], "engine": ENGINE, "batch": 4})
    generator = Generator.load(config)
    example = Example(*(Path(path).read_bytes() for path in paths[:2]))
    request = Request((read_png(paths[2]),), (example,), "depth", sampling=SamplingConfig.model_validate(sampling))
    prompt, _, tokens, seeds = generator._read(request)
    decoded = generator.model.decoder.decode(prompt, tokens, 3, request.sampling, seeds)
    assert len(np.unique(decoded.candidate_ids[0, :, :-1].reshape(7, -1), axis=0)) == 7, "each writes its own frames"
    answers = generator.tokenizer.decode(decoded.candidate_ids[0, :, -1])
    assert np.array_equal(shown[0], TASKS["depth"].mean(answers, robust=True))
    assert shown[1].any()
    fewer = SamplingConfig.model_validate(sampling | {"vote": 2})
    first = generator.model.decoder.decode(prompt, tokens, 3, fewer, seeds).candidate_ids[0]
    assert np.array_equal(first, decoded.candidate_ids[0, :2]), "the first candidates do not depend on their number"


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def mistake(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line that a mistaken ``covray generate`` answers with, exit code 2, before any backbone is loaded."""

    def mistake(*arguments: object) -> str:
        capsys.readouterr()  # what preparing a test has said
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["covray", "generate", *map(str, arguments)])
            patched.setattr("covray.generation.models.load_backbone", None)
            with pytest.raises(SystemExit) as end:
                cli.main()
        out, err = capsys.readouterr()
        assert end.value.code == 2
        assert out == ""
        return error_line(err)

    return mistake


def test_files_that_are_no_pictures_are_refused(mistake: Callable[..., str], pictures: Any, tmp_path: Path) -> None:
    good, out = pictures(1)[0], tmp_path / "out"
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert "--query" in mistake("--query", tmp_path / "none.png", "--out", out)
    assert "not_an_image" in mistake("--query", text, "--out", out)
    assert "--example" in mistake("--query", good, "--example", good, text, "--out", out)
    assert "cannot be read" in mistake("--query", tmp_path, "--out", out)
    assert not out.exists()


def test_options_that_do_not_add_up_are_refused(mistake: Callable[..., str], pictures: Any, tmp_path: Path) -> None:
    first, second = pictures(2)
    out = ("--out", tmp_path / "out")
    assert "2 images and 1 labels" in mistake("--query", first, "--example", first, second, "--example", first, *out)
    assert "0 images and 1 labels" in mistake("--query", first, second, *out)
    assert "queries" in mistake(*out)
    assert "out: is required" in mistake("--query", first)
    assert "task" in mistake("--query", first, "--task", "cooking", *out)
    assert "set a temperature" in mistake("--query", first, "--best-of", 3, *out)
    expected = ("--set", "sampling.expected=0.5")
    assert "say which task it is" in mistake("--query", first, *expected, *out)
    assert "set the temperature to 0" in mistake("--query", first, *expected, "--temperature", 1, *out)
    both = ("--temperature", 1, "--best-of", 3, "--vote", 3)
    assert "set one of them to 1" in mistake("--query", first, *both, *out)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("")
    assert "no generation of covray" in mistake("--query", first, *out)
    assert "cannot be written" in mistake("--query", first, "--out", tmp_path / "out" / "thesis.txt")
    assert "cannot be written" in mistake("--query", first, "--out", "/proc/out")


def test_runs_that_cannot_answer_are_refused(
    mistake: Callable[..., str], write_run: Callable[..., str], pictures: Any, tmp_path: Path
) -> None:
    first, second = pictures(2)
    command = ("--query", first, "--out", tmp_path / "out")
    assert "not a run" in mistake("--adapter", tmp_path, *command)
    run = write_run(lengths=(3, 6), method="linear")
    command = ("--adapter", run, *command)
    assert "chains of 3 and 6 pictures" in mistake(*command)
    command = (*command, "--length", 4)
    other = write_llama(tmp_path / "other", num_hidden_layers=1)
    assert "adapts backbone" in mistake("--backbone", other, *command)
    example = ("--example", first, second)
    room = mistake(*command, *example * 4)
    assert "20 pictures x 16 tokens = 320 tokens exceed the context of 256 (16 pictures)" in room
    (Path(run) / "_result.json").unlink()
    assert "is unfinished" in mistake(*command)


def test_a_dataset_that_is_gone_asks_for_the_tokenizer(
    mistake: Callable[..., str], answered: Generate, write_run: Callable[..., str], pictures: Any, vqgan_folder: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    run = write_run(method="none")
    (tmp_path / "chains" / "_dataset.json").unlink()
    assert "--tokenizer" in mistake("--adapter", run, "--query", pictures(1)[0], "--out", tmp_path / "out")
    assert answered(adapter=run, queries=pictures(1), tokenizer={"path": str(vqgan_folder)})["answers"]


def test_a_tokenizer_of_other_codes_is_refused(
    answered: Generate, write_run: Callable[..., str], pictures: Any
) -> None:
    with pytest.raises(CovrayError, match="tokens of different tokenizers do not mix"):
        answered(adapter=write_run(method="none"), queries=pictures(1), tokenizer={"path": "nano"})


def test_a_label_of_another_shape_is_refused(answered: Generate, write_run: Callable[..., str], pictures: Any) -> None:
    example = [*pictures(1), *pictures(1, 40, 40, "label")]
    with pytest.raises(CovrayError, match="label_shape"):
        answered(adapter=write_run(method="linear"), queries=pictures(1), examples=[example])


def test_the_command_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write_run: Callable[..., str], pictures: Any,
    tmp_path: Path,
) -> None:  # fmt: skip
    first, second, third = pictures(3)
    command = [
        "covray", "generate", "--adapter", write_run(method="linear"), "--query", third, "--example", first, second,
        "--example", second, first, "--query", first, "--out", str(tmp_path / "out"), "--task", "depth",
        "--set", "batch=2",
    ]  # fmt: skip
    for arguments in (command, [*command, "--json"]):
        monkeypatch.setattr(sys, "argv", arguments)
        cli.app(standalone_mode=False)
    out = capsys.readouterr().out
    assert "picture2/depth_m.npy" in out
    result = json.loads(out.splitlines()[-1])
    assert result["config"]["examples"] == [[first, second], [second, first]]
    assert result["config"]["queries"] == [third, first]
    assert torch.get_num_threads() == 1
