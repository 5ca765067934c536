"""Adapters of one backbone in one process: held once, and answers have the bits that they have alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from covray.config import EngineConfig, GeneratorConfig
from covray.generation.generator import Generator
from covray.generation.models import SharedModels
from covray.generation.request import Example, Request, WrittenPicture
from covray.io.images import decode
from tests.generation.conftest import ENGINE


def written(pictures: list[WrittenPicture]) -> list[bytes]:
    return [each.picture.tobytes() for each in pictures]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_share_a_backbone_and_answer_as_they_do_alone(
    dtype: str, write_run: Callable[..., str], pictures: Callable[..., list[str]], tmp_path: Path
) -> None:
    runs = [write_run(method="linear"), str(tmp_path / "other")]
    shutil.copytree(runs[0], runs[1])
    (weights,) = Path(runs[1]).rglob("adapter_model.safetensors")
    changed = {}
    for name, tensor in load_file(weights).items():
        changed[name] = -2 * tensor if "lora_B" in name else tensor
    save_file(changed, weights, {"format": "pt"})
    engine = EngineConfig.model_validate(ENGINE | {"dtype": dtype})
    configs = [GeneratorConfig(adapter=run, engine=engine, batch=4) for run in runs]
    image, label = (Path(path).read_bytes() for path in pictures(2, prefix="example"))
    queries = tuple(decode(Path(path).read_bytes()) for path in pictures(2))
    request = Request(queries, (Example(image, label),), "depth")
    alone = [written(list(Generator.load(config).stream(request))) for config in configs]
    assert alone[0] != alone[1], "the adapters differ"

    shared = SharedModels()
    generators = [Generator.load(config, shared) for config in configs]
    first, second = (generator.model.model.frozen_parameters() for generator in generators)
    assert [tensor.data_ptr() for tensor in first.values()] == [tensor.data_ptr() for tensor in second.values()]
    assert generators[0].tokenizer is generators[1].tokenizer
    assert len(shared.backbones) == 1
    for _ in range(2):
        assert [written(list(generator.stream(request))) for generator in generators] == alone
    # Picture by picture in turn: each finds the other's adapter merged in.
    in_turn: list[list[WrittenPicture]] = [[], []]
    for pair in zip(*(generator.stream(request) for generator in generators), strict=True):
        for pictures_of, picture in zip(in_turn, pair, strict=True):
            pictures_of.append(picture)
    assert [written(each) for each in in_turn] == alone
