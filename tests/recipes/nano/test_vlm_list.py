"""The list that the nano vision-language model learns from."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from covray.config.vlm import VlmModelConfig
from covray.evaluation.caption_facts import stated
from covray.io.images import encode_png
from covray.models.vlm.checkpoint import load_prompter, vlm_facts
from covray.pairs.exchanges import read_exchanges
from covray.recipes.nano import portrait_data, vlm, vlm_list
from covray.recipes.nano.loop import Run
from covray.thinking.cells import has_held_out
from covray.thinking.episodes import episode_prompt
from covray.training.objectives.vision_text import parts_of
from covray.training.run import train
from covray.training.worker import WorkerContext
from tests.support.nano import make_small

COUNT = 200


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(portrait_data, "SIZE_PX", 16)
        return vlm_list.write_vlm_list(portrait_data.portrait_manifest(tmp_path_factory.mktemp("nano"), COUNT, 0), 0)


def test_as_many_captions_as_episodes_and_nothing_held_out(path: Path) -> None:
    items = read_exchanges(str(path)).items
    assert {item.split for item in items} == {"train", "val"}, "the split test shows held-out cells"
    kinds = Counter(len(item.turn) > 0 for item in items)
    single = [item for item in items if not item.turn]
    captions = [item for item in single if item.prompt in vlm_list.INSTRUCTIONS]
    assert kinds[True] == pytest.approx(len(captions), rel=0.2), "few portraits have pictures for few episodes"
    assert len(single) - len(captions) == pytest.approx(len(captions) / vlm_list.QUESTION_EVERY, rel=0.1)
    assert len({item.prompt for item in captions}) == len(vlm_list.INSTRUCTIONS)
    for row in map(json.loads, path.read_text().splitlines()):
        for image in row["image"]:
            assert (path.parent / image).is_file()


def test_an_episodes_pictures_stand_behind_their_words(path: Path) -> None:
    episodes = [item for item in read_exchanges(str(path)).items if item.turn]
    shots = set()
    for item in episodes:
        texts = [part for part in item.turn if isinstance(part, str)]
        pictures = [part for part in item.turn if not isinstance(part, str)]
        shots.add(len(pictures))
        assert texts[0].startswith(f"{vlm_list.EPISODE_INSTRUCTION}\n\nWord 1: ")
        assert texts[-1].startswith(f"\n\nWord {len(pictures) + 1}: ")
        assert isinstance(item.turn[-1], str)
        values = stated(item.answer)
        assert len(values["object"]) == 1
    assert shots == set(vlm_list.SHOTS)


def test_sampled_episodes_neither_show_nor_ask_for_a_held_out_cell() -> None:
    numbers = np.random.default_rng(0)
    for _ in range(300):
        assert not has_held_out(vlm_list.sample_episode(numbers))


def test_a_portrait_of_two_solids_or_a_hidden_detail_is_no_demonstration() -> None:
    numbers = np.random.default_rng(0)
    for _ in range(300):
        portrait = portrait_data.sample_portrait(numbers)
        cells = vlm_list.cells_of(portrait)
        if len(portrait.solids) == 2:
            assert cells == []
            continue
        for theme, _, thing in cells:
            assert thing == portrait.solids[0].thing
            assert portrait.style not in ("depth", "normals", "sketch") or theme in ("style", "arrangement")


def test_an_episode_is_learned_from_the_tokens_that_it_is_asked_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_small(monkeypatch)
    vlm.write_start(tmp_path / "start", 0)
    prompter = load_prompter(vlm_facts(VlmModelConfig(path=str(tmp_path / "start"))))
    episode = vlm_list.sample_episode(np.random.default_rng(0))
    pictures = list(np.random.default_rng(0).integers(0, 256, (len(episode.demonstrations), 64, 64, 3), np.uint8))
    names = [f"{number}.png" for number in range(len(pictures))]
    for name, picture in zip(names, pictures, strict=True):
        (tmp_path / name).write_bytes(encode_png(picture))
    (tmp_path / "list.jsonl").write_text(json.dumps(vlm_list.episode_row("train", episode, names, "A ball.")))
    read = read_exchanges(str(tmp_path / "list.jsonl"))
    learned = prompter.turn(parts_of(read.items[0], read.root, "Describe the picture."))
    asked = episode_prompt(prompter, episode, pictures, vlm_list.EPISODE_INSTRUCTION)
    assert np.array_equal(learned.ids, asked.ids)
    assert torch.equal(learned.images["pixel_values"], asked.images["pixel_values"])


def test_a_training_takes_episodes(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    cpu, start = torch.device("cpu"), tmp_path / "vlm.start"
    vlm.write_start(start, 0)
    config = vlm.lessons(Run("vlm-1", tmp_path, 1, 0, cpu, vlm.ADAMW_RATE), path, start)
    metrics: list[dict[str, float]] = []
    train(config, WorkerContext(device=cpu), lambda record: metrics.append(dict(record)))
    assert np.isfinite(metrics[-1]["validation_loss"])
