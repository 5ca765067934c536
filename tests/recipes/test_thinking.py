"""The programme of ThinkDiff at toy size: every row, and a killed programme continues to the same table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from covray.config.vlm import VlmDecodingConfig
from covray.errors import ConfigError
from covray.evaluation.caption_facts import stated
from covray.recipes.thinking import aligners, budget, compositions, programme, rows, table, thoughts
from covray.thinking.episodes import PORTRAITS, Cell, make_episode, sample_orders, tasks_of
from tests.support.language_models import WORDS, language_model, language_tokenizer
from tests.support.nano import make_small

TINY = budget.Budget(
    portraits=30,
    steps=dict.fromkeys(("text", "vlm", "painter", "clip", "judge"), 1),
    captions=8,
    aligner_steps=2,
    aligner_batch=2,
    episodes=2,
    shots=(2,),
    seeds=1,
    painter_steps=2,
    guidance=1.0,
)


class _Killed(Exception):
    pass


def test_killed_and_continued_gives_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_small(monkeypatch)
    monkeypatch.setitem(budget.BUDGETS, "tiny", TINY)
    for module, name in ((thoughts, "SAMPLING"), (compositions, "READING")):
        monkeypatch.setattr(module, name, VlmDecodingConfig(decoder="autoregressive", max_tokens=4))
    save = aligners.save_aligner
    saved: list[Path] = []

    def killing(place: Path, aligner: object) -> None:
        if len(saved) == 2:
            raise _Killed
        saved.append(place)
        save(place, aligner)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(aligners, "save_aligner", killing)
        with pytest.raises(_Killed):
            programme.run_thinking(str(tmp_path / "out"), "tiny", 1, "cpu")
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.safetensors")}
    result = programme.run_thinking(str(tmp_path / "out"), "tiny", 1, "cpu")
    assert {file: file.stat().st_mtime_ns for file in before} == before, "nothing is made twice"
    for kind in compositions.KINDS:
        composed = result.compositions[kind]
        assert composed.keys() == {compositions.TRUE, compositions.COPY, "ThinkDiff-CLIP", "IP-Adapter-like"}
        for name, row in composed.items():
            assert row.both.episodes == 3
            assert ("below_reference" in row.to_json()) == (name != "ThinkDiff-CLIP")
    own = result.shots["2 shots"].rows
    expected = {variant.name for variant in aligners.VARIANTS}
    expected |= {rows.TRUE_RENDERS, rows.TRUE_CAPTION, rows.VLM_TEXT, rows.TEXT_BRIDGE, rows.COPY}
    assert own.keys() == expected
    for name, row in own.items():
        assert row.right.episodes == 2 * 2 * len(PORTRAITS)
        assert ("below_reference" in row.to_json()) == (name != aligners.LVLM.name)
    assert own[aligners.LVLM.name].decoded_text is not None
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written == result.to_json()
    assert list(written) == ["2 shots", "compositions"]
    assert list(written["2 shots"]["rows"][rows.TRUE_RENDERS]) == [
        "right", "right_by_seed", "named", "hidden", "seen", "held_out", "by_task", "seconds", "below_reference",
        "tasks_below_reference",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="another budget or seed"):
        programme.run_thinking(str(tmp_path / "out"), "small", 1, "cpu")


def test_a_killed_training_of_an_aligner_gives_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = [np.arange(4 + number % 3) for number in range(6)]
    states = [torch.randn((len(own), 8), generator=generator) for own in ids]
    patches = [torch.randn((3, 8), generator=generator) for _ in ids]
    known = thoughts.Thoughts(ids, ["a red ball"] * 6, states, states)
    lessons = aligners.Lessons(known, patches, torch.zeros(6, 4, 2, 2))
    family: Any = SimpleNamespace(
        language=SimpleNamespace(model=language_model(), tokenizer=language_tokenizer(), fingerprint="t"),
        vlm=SimpleNamespace(prompter=SimpleNamespace(text=lambda own: " ".join(WORDS[number] for number in own))),
        vlm_fingerprint="v", device=torch.device("cpu"),
    )  # fmt: skip
    small = replace(TINY, aligner_steps=4)
    monkeypatch.setattr(aligners, "SAVE_EVERY_S", -1.0)
    for variant in (aligners.LVLM, aligners.Variant("input tokens", reads="prompt"), aligners.CLIP):
        whole = aligners.trained_aligner(tmp_path / "whole", variant, family, lessons, small, 0)
        take = aligners.AlignerTraining.run_step

        def killing(training: Any, take: Any = take) -> float:
            if training.step == 2:
                raise _Killed
            loss: float = take(training)
            return loss

        with monkeypatch.context() as patched:
            patched.setattr(aligners.AlignerTraining, "run_step", killing)
            with pytest.raises(_Killed):
                aligners.trained_aligner(tmp_path / "killed", variant, family, lessons, small, 0)
        killed = aligners.trained_aligner(tmp_path / "killed", variant, family, lessons, small, 0)
        pairs = zip(whole.network.parameters(), killed.network.parameters(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        untrained = aligners.Variant("untrained aligner", variant.reads, loss="none")
        begun = aligners.trained_aligner(tmp_path / "whole", untrained, family, lessons, small, 0)
        first = zip(begun.network.parameters(), whole.network.parameters(), strict=True)
        assert not any(torch.equal(*pair) for pair in first), "all of it is trained"


def test_a_budget_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--budget huge: give one of full, medium, small"):
        programme.run_thinking(str(tmp_path), "huge", 1, "cpu")


def test_a_text_answers_with_the_one_cell_that_it_states() -> None:
    colour = PORTRAITS[0]
    assert rows.cell_of("A photo of a red ball. The scarlet sphere hovers.", colour) == Cell("red", "ball")
    assert rows.cell_of("A red ball and a blue ball.", colour) is None
    assert rows.cell_of("A red thing.", colour) is None


def test_the_table_pairs_episodes_and_counts_tasks() -> None:
    tasks = tasks_of(PORTRAITS)
    orders = sample_orders(40, 0)
    episodes = [make_episode(task, number, order, 2) for task in tasks for number, order in enumerate(orders)]
    count = len(episodes)
    good = rows.RowVerdicts(right=[True] * count, named=[True] * count, hidden=[True] * count, seconds=1.0)
    bad = rows.RowVerdicts(right=[False] * count, named=[False] * count, hidden=[False] * count, seconds=3.0)
    half = good.model_copy(update={"right": [place % 40 < 20 for place in range(count)]})
    result = table.table_of(
        {2: {"reference": [good, half], "bad": [bad, bad]}}, {2: {"bad": [good]}}, {2: episodes}, "reference"
    )
    reference, worse = result["2 shots"].rows["reference"], result["2 shots"].rows["bad"]
    assert reference.right.mean == 0.75, "an episode's score is its mean over seeds"
    assert reference.right_by_seed == [1.0, 0.5]
    assert reference.by_task == dict.fromkeys([task.name for task in tasks], 0.75)
    assert worse.below_reference.mean == 0.75
    assert worse.below_reference.p_value < 0.001
    assert worse.tasks_below_reference == len(tasks)
    assert worse.decoded_text.mean == 1.0
    assert worse.seconds == 3.0
    counts = [reference.seen.episodes, reference.held_out.episodes]
    assert sum(counts) == count
    assert np.isclose(counts[1] / count, 0.15, atol=0.06)


@pytest.mark.parametrize("kind", compositions.KINDS)
def test_a_composition_asks_for_what_is_shown_in_the_place_that_is_named(kind: str) -> None:
    cases = compositions.make_cases(kind, 20, 3)
    assert cases == compositions.make_cases(kind, 20, 3) != compositions.make_cases(kind, 20, 4)
    for case in cases:
        assert len(case.shown) == 1 + kind.startswith("2I")
        assert tuple(portrait.solids[0] for portrait in case.shown) == case.expected.solids
        assert bool(case.words) == kind.endswith("T")
        moved = {portrait.background for portrait in case.shown} != {case.expected.background}
        assert moved == bool(case.words), "words ask for another place, which no picture shows"
        assert not any(portrait.held_out_themes() for portrait in (*case.shown, case.expected))
        assert stated(case.words)["background"] == case.obeyed.get("background", set())
        assert compositions.true_render(case).shape == compositions.renders(case)[0].shape == (64, 64, 3)


def test_a_composition_is_right_if_all_is_kept_and_obeyed() -> None:
    (case,) = compositions.make_cases("2I + T", 1, 0)
    exact = case.kept | case.obeyed
    one_lost = exact | {"object": {case.expected.solids[0].thing}}
    disobedient = exact | {"background": {case.shown[0].background}}
    columns = compositions.verdicts([case] * 3, [exact, one_lost, disobedient])
    assert columns == {
        "facts": [1.0, 0.5, 1.0], "kept": [1.0, 0.0, 1.0], "obeyed": [1.0, 1.0, 0.0], "both": [1.0, 0.0, 0.0],
    }  # fmt: skip
