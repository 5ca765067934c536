"""Words of scenes: they follow from the labels of the view, and leave the scene as it is."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
import pytest

from covray.pairs.scenes import CLASSES, View, render_scene, scene_pairs
from covray.pairs.scenes.scene_words import COLOURS, MIN_SHARE, OTHER, scene_words
from covray.pairs.words import CAPTION_TASK, Words


@pytest.fixture(scope="module")
def worded() -> list[tuple[View, Words]]:
    scenes = []
    for seed in range(150):
        view = render_scene(seed, 48)[0]
        scenes.append((view, scene_words(view, np.random.default_rng(seed))))
    return scenes


def test_captions_name_what_the_masks_show(worded: list[tuple[View, Words]]) -> None:
    for view, words in worded:
        text = set(words.caption.replace(".", "").replace(",", "").split())
        for kind, colour in COLOURS.items():
            columns = np.nonzero(view.classes == CLASSES.index(kind) + 1)[1]
            shown = len(columns) >= MIN_SHARE * view.classes.size
            assert (kind in text) == (OTHER[kind] in text) == (colour in text) == shown
            if shown:
                (solid,) = [entry for entry in words.attributes["solids"] if entry["object"] == kind]
                assert solid["place"] == ("left", "middle", "right")[min(int(3 * (columns.mean() + 0.5) / 48), 2)]


def test_answers_are_one_word_and_none_prevails(worded: list[tuple[View, Words]]) -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, words in worded:
        for question in words.questions:
            assert len(question.answer.split()) == 1
            answers[question.kind][question.answer] += 1
    for kind, counts in answers.items():
        assert kind == "count" or max(counts.values()) / counts.total() < 0.6, (kind, counts)


def test_captions_beside_tasks_change_no_pair() -> None:
    plain = list(scene_pairs(4, ["depth", "low_light"], 16, 3))
    mixed = list(scene_pairs(4, ["depth", CAPTION_TASK, "low_light"], 16, 3))
    assert [pair for pair in mixed if pair.task != CAPTION_TASK] == plain
    assert sum(pair.words is not None for pair in mixed) == 4


def test_pairs_of_all_tasks_may_carry_the_words_of_their_scene() -> None:
    """Their pictures and ids stay the same, and their caption is that of the row of the task ``caption``."""
    plain = list(scene_pairs(2, ["depth", CAPTION_TASK, "edges"], 64, 0))
    worded = list(scene_pairs(2, ["depth", CAPTION_TASK, "edges"], 64, 0, captions=True))
    assert [pair.pair_id for pair in worded] == [pair.pair_id for pair in plain]
    assert [pair.image for pair in worded] == [pair.image for pair in plain]
    assert [pair.words is None for pair in plain] == [True, False, True] * 2
    for depth, caption, edges in (worded[:3], worded[3:]):
        assert depth.words == caption.words == edges.words
    assert [pair.words for pair in worded[1::3]] == [pair.words for pair in plain[1::3]]
