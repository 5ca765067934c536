"""ThinkDiff's parts behind the server: the pictures of ``covray think generate``, and refusals before Ray starts."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from ray import serve

from covray.config import EngineConfig, ServeConfig, load_config
from covray.config.serve import ThinkServeConfig
from covray.config.think import ThinkGenerateConfig
from covray.errors import ConfigError, CovrayError, WeightsError
from covray.serve.app import TOKEN_VARIABLE, application, require_servable
from covray.serve.schemas import Refusal, ThoughtResponse
from covray.serve.thinking import ThoughtModels, ThoughtQuery, open_parts
from covray.thinking.answering import generate
from tests.support.commands import free_port
from tests.support.thinking import write_parts
from tests.support.vlms import picture

ENGINE = EngineConfig(device="cpu")
Parts = Callable[[str], str]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, think_folders: dict[str, str]) -> Parts:
    """Gives a folder of parts of a variant."""
    made: dict[str, str] = {}

    def folder(variant: str) -> str:
        if variant not in made:
            made[variant] = str(write_parts(tmp_path_factory.mktemp(variant), think_folders, variant))
        return made[variant]

    return folder


def think(folder: str) -> ThinkServeConfig:
    return ThinkServeConfig(folder=folder, steps=4, instruction="what is it")


@pytest.mark.parametrize(
    ("variant", "asked"),
    [
        ("lvlm", {"words": ("red", "blue")}),
        ("lvlm", {"prompt": "what is it"}),
        ("lvlm", {"prompt": "what is it", "is_bridge": True}),
        ("clip", {}),
        ("clip", {"prompt": "a red box"}),
    ],
)
def test_a_thought_is_what_think_generate_writes(
    variant: str, asked: dict[str, Any], parts: Parts, tmp_path: Path
) -> None:
    folder, shown = parts(variant), picture(0, 28, 28)
    Image.fromarray(shown).save(tmp_path / "shown.png")
    models = ThoughtModels(open_parts(think(folder), ENGINE))
    response = models.think(ThoughtQuery((shown,), **asked))
    assert isinstance(response, ThoughtResponse)
    options = {key: list(value) if key == "words" else value for key, value in asked.items() if key != "is_bridge"}
    options |= {
        "run": f"{folder}/aligner", "out": str(tmp_path / "out"), "images": [str(tmp_path / "shown.png")],
        "vlm.path": f"{folder}/{'clip' if variant == 'clip' else 'vlm'}", "language_model.path": f"{folder}/text",
        "painter.kind": "unet", "painter.path": f"{folder}/painter", "painter.steps": 4, "painter.guidance": 3.0,
        "engine.device": "cpu", "instruction": "what is it", "route": "text" if asked.get("is_bridge") else "aligned",
    }  # fmt: skip
    record = generate(load_config(ThinkGenerateConfig, None, options))
    assert response.text == record.text
    expected = (tmp_path / "out" / "answer.png").read_bytes()
    assert [base64.b64decode(one) for one in response.pictures] == [expected]


@pytest.mark.parametrize("variant", ["lvlm", "clip"])
def test_a_strip_is_a_refusal_and_is_not_scaled_up(variant: str, parts: Parts) -> None:
    models = ThoughtModels(open_parts(think(parts(variant)), ENGINE))
    refused = models.think(ThoughtQuery((picture(0, 2, 500),), prompt="what is it"))
    assert isinstance(refused, Refusal)
    assert refused.reason == "unsupported"
    assert refused.message.endswith("500x2 px; vision models read pictures up to 200 times as long as wide")


def test_what_a_model_refuses_is_a_refusal(parts: Parts) -> None:
    models = ThoughtModels(open_parts(think(parts("lvlm")), ENGINE))
    prompter = models._thinker.vlm.prompter  # type: ignore[union-attr]
    placeholder = prompter.tokenizer.convert_ids_to_tokens(prompter._image_id)
    refusal = models.think(ThoughtQuery((), prompt=f"{placeholder} what"))
    assert isinstance(refusal, Refusal)
    assert "has a placeholder of a picture in it" in refusal.message


@pytest.mark.parametrize(
    ("missing", "kind", "message"),
    [
        ("aligner", WeightsError, "aligner: is neither a finished run of covray think train nor"),
        ("vlm", WeightsError, "vlm: no such folder"),
        ("text", WeightsError, "text: no such folder"),
        ("painter", WeightsError, "painter: no such folder"),
    ],
)
def test_a_part_that_is_missing_is_named_before_the_server_starts(
    missing: str, kind: type[CovrayError], message: str, parts: Parts, write_run: Callable[..., str], tmp_path: Path
) -> None:
    for part in Path(parts("lvlm")).iterdir():
        if part.name != missing:
            (tmp_path / part.name).symlink_to(part)
    options = {"adapters": [write_run(method="none")], "port": free_port(), "think.folder": str(tmp_path)}
    with pytest.raises(kind, match=message) as error:
        require_servable(load_config(ServeConfig, None, options), None)
    assert "\n" not in str(error.value)


def test_the_painters_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"think\.steps"):
        load_config(ServeConfig, None, {"adapters": ["run"], "think.steps": 0})


def test_a_cluster_serves_the_parts_too(
    parts: Parts, write_run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "0123456789abcdef")
    arguments = {"adapters": [write_run(method="none")], "replicas.gpus": 0.5, "think.folder": parts("clip")}
    assert isinstance(application(arguments), serve.Application)
    with pytest.raises(WeightsError, match="aligner: is neither a finished run"):
        application(arguments | {"think.folder": "/absent"})
