"""The probe of tokenizers: what it is shown, what it learns, and that labels come from the judge alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from covray.config import EngineConfig, TokenizerConfig
from covray.errors import ConfigError
from covray.models.tokenizer.vqgan import Tokenizer, load_tokenizer
from covray.recipes.nano import probe, recipe
from covray.recipes.nano.data import KINDS, scene_pictures
from covray.tasks import TASKS


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader of one layer and small batches: the tests are about what goes in and comes out."""
    monkeypatch.setattr(probe, "LAYERS", 1)
    monkeypatch.setattr(probe, "BATCH", 8)


@pytest.fixture(scope="module")
def judge() -> Tokenizer:
    """A tokenizer of 8 x 8 tokens."""
    return load_tokenizer(TokenizerConfig(path="nano"), EngineConfig(image_batch=8))


@pytest.fixture(scope="module")
def scenes() -> np.ndarray:
    """Two scenes, uint8 [2, 8, 64, 64, 3]."""
    return np.stack(list(scene_pictures("train", range(2), 0)))


@pytest.mark.parametrize("grid", [8, 12, 16])
def test_every_token_of_a_query_changes_what_is_read_and_none_of_another_query(grid: int) -> None:
    torch.manual_seed(0)
    reader = probe.QueryReader(32, grid, 16).eval()
    tokens = torch.randint(0, 31, (2, grid**2))
    tasks = torch.tensor([0, 3])
    before = reader(tokens, tasks)
    assert before.shape == (2, 64, 16)
    for place in (0, grid + 1, grid**2 - 1):
        changed = tokens.clone()
        changed[0, place] += 1
        after = reader(changed, tasks)
        assert not torch.equal(after[0], before[0])
        assert torch.equal(after[1], before[1])


def test_the_tokens_of_a_cell_are_folded_into_its_position() -> None:
    """With 16 x 16 tokens, the four of cell (0, 0) are 0, 1, 16 and 17: without layers only its position sees them."""
    torch.manual_seed(0)
    reader = probe.QueryReader(32, 16, 16)
    reader.blocks = torch.nn.ModuleList()
    tokens = torch.randint(0, 31, (1, 256))
    before = reader(tokens, torch.tensor([0]))
    for place in (0, 1, 16, 17):
        changed = tokens.clone()
        changed[0, place] += 1
        moved = (reader(changed, torch.tensor([0])) != before).any(-1)[0]
        assert moved.nonzero().flatten().tolist() == [0]


def test_queries_and_labels_are_those_of_the_tasks(scenes: np.ndarray, judge: Tokenizer) -> None:
    labels = probe.label_tokens(scenes, judge)
    pixels = probe.probe_data(scenes, labels, None)
    tokens = probe.probe_data(scenes, labels, judge)
    assert pixels.queries.shape == (2, 3, 64, 64, 3)
    assert tokens.queries.shape == (2, 3, 64)
    for index, task in enumerate(TASKS):
        query = {"colorization": "grey", "low_light": "dark"}.get(task, "colour")
        label = "colour" if task in ("colorization", "low_light") else task
        kind = int(probe.input_kinds()[index])
        assert torch.equal(pixels.queries[:, kind], torch.from_numpy(scenes[:, KINDS.index(query)]))
        expected = judge.encode(np.ascontiguousarray(scenes[:, KINDS.index(label)]))
        assert np.array_equal(labels[:, index], expected)


def test_a_reader_learns_its_pairs_by_heart_and_the_same_seed_gives_the_same_bits(
    scenes: np.ndarray, judge: Tokenizer
) -> None:
    data = probe.probe_data(scenes, probe.label_tokens(scenes, judge), judge)

    def trained(steps: int) -> probe.QueryReader:
        torch.manual_seed(0)
        reader = probe.QueryReader(judge.codes, 8, judge.codes)
        probe.train_reader(reader, data, steps, 0)
        return reader

    untrained = np.mean(list(probe.read_answers(trained(0), data)[1].values()))
    first, second = trained(40), trained(40)
    learned = np.mean(list(probe.read_answers(first, data)[1].values()))
    assert learned < untrained / 3
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


def test_tokenizers_of_other_sizes_are_refused_before_anything_is_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: Tokenizer
) -> None:
    monkeypatch.setattr(recipe, "pictures", lambda *_: pytest.fail("pictures were rendered"))
    with pytest.raises(ConfigError, match="--judge: writes 256 tokens a picture; give a tokenizer that writes 64"):
        recipe.probe("pixels", tmp_path, "nano-2", 2, 1, torch.get_num_threads(), 0)
    large = load_tokenizer(TokenizerConfig(path="nano", size_px=128), EngineConfig(image_batch=8))
    with pytest.raises(ConfigError, match="query: reads pictures of 128 px; give a tokenizer of 64 px"):
        probe.require_probe(judge, large)


def test_a_probe_scores_every_task_and_writes_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "PROBE_TEST_SCENES", 1)
    threads = torch.get_num_threads()
    result = recipe.probe("nano", tmp_path, "nano", 2, 1, threads, 0)
    assert set(result.scores) == set(result.perplexity) == set(result.ceiling) == set(TASKS)
    assert result.tokens_per_image == 64
    # A label that the judge has written and read is nearer to itself than what one step has learned.
    assert result.ceiling["depth"]["abs_rel"] < result.scores["depth"]["abs_rel"]
    written = json.loads((tmp_path / "probe-nano.json").read_text())
    assert written["scores"] == result.scores
    pixels = recipe.probe("pixels", tmp_path, "nano", 2, 1, threads, 0)
    assert pixels.tokens_per_image is None
    assert pixels.ceiling == {}
