"""Pictures and words in, a text and a picture out; what cannot be drawn is refused before a model is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from covray.config import load_config
from covray.config.think import ThinkFeaturesConfig, ThinkGenerateConfig, ThinkTrainConfig
from covray.errors import ConfigError, CovrayError, DatasetError, WeightsError
from covray.io.images import decode
from covray.models.aligner.aligner import load_aligner
from covray.thinking.answering import generate, read_pictures
from covray.thinking.objective import train_aligner
from covray.thinking.painters import load_painter
from tests.support.thinking import write_features, write_painter
from tests.support.vlms import picture, write_vlm

Make = Callable[..., ThinkGenerateConfig]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, think_folders: dict[str, str]) -> dict[str, str]:
    """A run of each variant, a painter of the language model's width, and a picture."""
    root = tmp_path_factory.mktemp("runs")
    made = {"painter": str(write_painter(root / "painter"))}
    for variant in ("lvlm", "clip"):
        features = load_config(
            ThinkFeaturesConfig,
            None,
            {
                "data": think_folders["manifest"], "out": str(root / f"{variant}-features"), "variant": variant,
                "vlm.path": think_folders["vlm" if variant == "lvlm" else "clip"], "instructions": ["what is it"],
                "thought.max_tokens": 6, "thought.min_tokens": 2, "engine.device": "cpu",
            },
        )  # fmt: skip
        run = load_config(
            ThinkTrainConfig,
            None,
            {
                "data": write_features(features), "out": str(root / variant), "optimizer.steps": 1,
                "language_model.path": think_folders["text"], "optimizer.batch": 4, "compute.device": "cpu",
                "compute.dtype": "float32", "compute.deepspeed": "none", "tracking.uri": "none",
            },
        )  # fmt: skip
        train_aligner(run)
        made[variant] = run.out
    for number, name in enumerate(("image", "second")):
        Image.fromarray(picture(number, 28, 28)).save(root / f"{name}.png")
        made[name] = str(root / f"{name}.png")
    return made


@pytest.fixture
def make(runs: dict[str, str], tmp_path: Path) -> Make:
    """Gives configurations, with dotted keys on top."""

    def config(out: str = "answer", **changes: Any) -> ThinkGenerateConfig:
        options: dict[str, Any] = {
            "run": runs["lvlm"], "out": str(tmp_path / out), "painter.kind": "unet", "painter.path": runs["painter"],
            "painter.steps": 4, "images": [runs["image"]], "engine.device": "cpu",
        }  # fmt: skip
        options |= {key.replace("__", "."): value for key, value in changes.items()}
        return load_config(ThinkGenerateConfig, None, options)

    return config


def drawn(config: ThinkGenerateConfig) -> Any:
    return decode(Path(config.out, "answer.png").read_bytes())


def test_words_and_pictures_give_a_text_and_what_the_painter_draws_of_its_features(
    make: Make, think_folders: dict[str, str], runs: dict[str, str]
) -> None:
    from covray.models.vlm.checkpoint import load_vlm, vlm_facts
    from covray.thinking.features import think

    config = make(words=["red", "blue"], instruction="what is it")
    answer = generate(config)
    about = json.loads(Path(config.out, "answer.json").read_text())
    assert answer.files == ("answer.png", "text.txt")
    assert Path(config.out, "text.txt").read_text().strip() == answer.text == about["text"]
    vlm = load_vlm(vlm_facts(config.vlm or _vlm(think_folders)), torch.float32, torch.device("cpu"))
    prompt = vlm.prompter.turn(["what is it\n\nWord 1: red, ", picture(0, 28, 28), "\n\nWord 2: blue, "])
    (thought,) = think(vlm, [prompt], _thought(runs))
    aligner = load_aligner(Path(runs["lvlm"], "adapter"), torch.device("cpu"))
    with torch.no_grad():
        (expected,) = load_painter(config.painter, config.engine).paint([aligner.network(thought.features)])
    assert np.array_equal(drawn(config), expected[0])


def test_the_text_may_be_drawn_in_place_of_the_features(make: Make) -> None:
    aligned, bridge = make("aligned", prompt="what is it"), make("bridge", prompt="what is it", route="text")
    texts = [generate(config).text for config in (aligned, bridge)]
    assert texts[0] == texts[1]
    assert not np.array_equal(drawn(aligned), drawn(bridge))


def test_a_tower_takes_pictures_and_a_text_behind_them(make: Make, runs: dict[str, str]) -> None:
    pictures = {}
    for name, images, prompt in (("i", 1, ""), ("it", 1, "a red box"), ("ii", 2, ""), ("iit", 2, "a red box")):
        config = make(name, run=runs["clip"], images=[runs["image"], runs["second"]][:images], prompt=prompt)
        answer = generate(config)
        assert (answer.text, answer.files) == (None, ("answer.png",))
        pictures[name] = drawn(config).tobytes()
    assert len(set(pictures.values())) == 4


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"run": "/absent", "prompt": "what"}, WeightsError, "neither a finished run of covray think train nor"),
        ({"images": ["/absent.png"], "prompt": "what"}, ConfigError, "--image /absent.png: cannot be read"),
        ({}, ConfigError, "asks a vision-language model; give --prompt, or a --word for each picture"),
        ({"painter__path": "/absent", "prompt": "what"}, WeightsError, "no such folder"),
        ({"painter__kind": "flux", "prompt": "what"}, WeightsError, "does not say joint_attention_dim"),
        ({"vlm__path": "/absent", "prompt": "what"}, WeightsError, "no such folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_one_line(
    changes: dict[str, Any], kind: type[CovrayError], message: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*arguments: object, **more: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("covray.thinking.answering.Thinker", loaded)
    config = make(**changes)
    with pytest.raises(kind, match=message) as error:
        generate(config)
    assert "\n" not in str(error.value)
    assert not Path(config.out).exists()


def test_models_that_the_aligner_was_not_trained_between_are_refused(
    make: Make, runs: dict[str, str], tmp_path: Path
) -> None:
    write_vlm(tmp_path / "other", "llava")
    with pytest.raises(WeightsError, match=r"was trained with the vision-language model .*, not with"):
        generate(make(vlm__path=str(tmp_path / "other"), prompt="what"))
    wide = write_painter(tmp_path / "wide", width=24)
    assert UNet2DConditionModel.load_config(wide / "unet")["cross_attention_dim"] == 24
    with pytest.raises(WeightsError, match=r"reads features 24 wide, .* writes 16; give a painter of the same"):
        generate(make(painter__path=str(wide), prompt="what"))
    with pytest.raises(ConfigError, match="has a vision tower, which writes no text"):
        generate(make(run=runs["clip"], words=["red", "blue"]))


def test_words_pair_with_pictures_and_a_folder_of_others_is_kept(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="words: 3 words for 1 pictures; give one for each, and one to ask for"):
        make(words=["a", "b", "c"])
    with pytest.raises(ConfigError, match="prompt: does not go with words"):
        make(words=["a", "b"], prompt="what")
    (tmp_path / "answer").mkdir()
    (tmp_path / "answer" / "mine.txt").write_text("mine")
    with pytest.raises(DatasetError, match="holds files that covray think generate did not write"):
        generate(make(prompt="what"))


def _vlm(think_folders: dict[str, str]) -> Any:
    from covray.config.vlm import VlmModelConfig

    return VlmModelConfig(path=think_folders["vlm"])


def _thought(runs: dict[str, str]) -> Any:
    from covray.config.think import ThoughtConfig

    about = json.loads(Path(runs["lvlm"], "adapter", "aligner.json").read_text())
    return ThoughtConfig.model_validate(about["features"]["thought"])


def test_an_aligner_of_another_covray_is_refused_in_one_line(make: Make, runs: dict[str, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(Path(runs["lvlm"], "adapter"), tmp_path / "aligner"))
    about = json.loads((folder / "aligner.json").read_text())
    about["features"]["thought"]["pace"] = 3
    (folder / "aligner.json").write_text(json.dumps(about))
    with pytest.raises(WeightsError, match=r"aligner\.json: describes its models in another way than this") as error:
        generate(make(run=str(folder), prompt="what"))
    assert "\n" not in str(error.value)


def test_a_strip_is_refused(tmp_path: Path) -> None:
    Image.fromarray(picture(0, 2, 500)).save(tmp_path / "strip.png")
    with pytest.raises(ConfigError, match=r"--image .*strip.png: unsupported: 500x2 px; .*; give another picture"):
        read_pictures([str(tmp_path / "strip.png")])
