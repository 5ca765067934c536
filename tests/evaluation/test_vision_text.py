"""Facts are read from captions as portraits state them; scores are of prompts, and of models over the same prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchmetrics.functional.text import bleu_score

from covray.config import load_config
from covray.config.vlm import VlmEvaluateConfig, VlmTrainConfig
from covray.errors import ConfigError
from covray.evaluation.bleu import corpus_bleu
from covray.evaluation.caption_facts import right_facts
from covray.evaluation.records import VlmEvaluationResults
from covray.evaluation.vision_text import (
    ANSWERS_FILE,
    BatchAnswerer,
    Row,
    caption_chrf,
    compare_rows,
    finished_rows,
    read_rows,
    row_lines,
    summarize_rows,
)
from covray.pairs.scenes.portrait_words import portrait_words
from covray.pairs.scenes.portraits import sample_portrait
from tests.support.vlm_trainings import trained


def test_every_caption_states_the_facts_of_its_portrait_and_of_no_other() -> None:
    portraits = []
    for number in range(300):
        rng = np.random.default_rng(number)
        portrait = sample_portrait(rng, unseen=number % 3 == 0)
        portraits.append(portrait_words(portrait, rng))
    for words, other in zip(portraits, portraits[1:] + portraits[:1], strict=True):
        facts = right_facts(words.caption, words.attributes)
        assert set(facts) == set(words.attributes["visible"]) - {"count"}
        assert all(facts.values()), words.caption
        if other.attributes["style"] != words.attributes["style"]:
            assert not right_facts(other.caption, words.attributes)["style"]
    assert not any(right_facts("", portraits[0].attributes).values())


def row(kind: str, expected: str, answer: str, **values: Any) -> Row:
    scores = {"right": answer == expected, "facts": None} | values
    return Row(0, kind, "?", expected, answer, log_likelihood=-2.0, likelihood_tokens=2, tokens=4, passes=2,
               seconds=0.5, **scores)  # fmt: skip


def test_scores_are_means_over_prompts() -> None:
    rows = [
        row("colour", "red", "red"),
        row("colour", "red", "blue"),
        row("count", "two", "two"),
        row("caption", "a ball", "a ball", right=None, facts={"object": True, "colour": False}),
        row("caption", "a box", "a box", right=None, facts={"object": True, "colour": True}),
    ]
    scores = summarize_rows(rows)
    assert scores.questions.mean == pytest.approx(2 / 3)
    assert scores.questions_by_kind["colour"].mean == 0.5
    assert scores.questions_by_kind["colour"].most_frequent == 1
    assert scores.facts.mean == 0.75
    assert scores.facts_by_theme["colour"].mean == 0.5
    assert scores.captions_with_all_facts.mean == 0.5
    assert scores.answer_perplexity == pytest.approx(np.e)
    assert (scores.tokens_per_s, scores.tokens_per_pass) == (8, 2)


def test_two_models_are_compared_prompt_by_prompt() -> None:
    captions = {"right": None}
    first = [
        row("colour", "red", "red"),
        row("colour", "red", "red"),
        row("caption", "a ball", "a ball", facts={"object": True, "colour": True}, **captions),
    ]
    second = [
        row("colour", "red", "red"),
        row("colour", "red", "blue"),
        row("caption", "a ball", "a box", facts={"object": False, "colour": True}, **captions),
    ]
    differences = compare_rows([first], [second])
    assert (differences["questions"].mean, differences["questions"].episodes) == (0.5, 2)
    assert (differences["facts"].mean, differences["captions_with_all_facts"].mean) == (0.5, 1)
    same, other = caption_chrf(["a ball", "a box"], ["a ball", "a ball"])
    assert (differences["chrf"].mean, differences["chrf"].episodes) == (pytest.approx(same - other), 1)
    assert differences["answer_nats"].mean == 0
    seeds = compare_rows([first, first], [first, second])
    assert (seeds["questions"].mean, seeds["questions"].episodes) == (0.25, 2), "a prompt's mean over seeds"
    assert compare_rows([first[:2]], [second[:2]])["facts"] is None


def test_a_finished_evaluation_is_whole_or_refused(tmp_path: Path) -> None:
    lines = row_lines([row("colour", "red", "red"), row("colour", "red", "blue"), row("colour", "red", "red")])
    (tmp_path / VlmEvaluationResults.FILE).write_text("{}")
    with pytest.raises(ConfigError, match=r"answers\.jsonl: cannot be read .*; evaluate again"):
        finished_rows(str(tmp_path))
    (tmp_path / ANSWERS_FILE).write_text("\n".join(lines) + "\n")
    assert row_lines(finished_rows(str(tmp_path))) == lines
    (tmp_path / ANSWERS_FILE).write_text("\n".join([lines[0], lines[1][:30], lines[2]]) + "\n")
    with pytest.raises(ConfigError, match=r"answers\.jsonl: line 2 is damaged; evaluate again into another folder"):
        finished_rows(str(tmp_path))


def test_chrf_is_of_each_caption(monkeypatch: pytest.MonkeyPatch) -> None:
    same, near, far = caption_chrf(["a red ball", "a red box", "seven"], ["a red ball"] * 3)
    assert same == pytest.approx(1)
    assert 0 < far < near < 1
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    scores = summarize_rows([row("caption", "a ball", "a ball", right=None)])
    assert (scores.chrf, list(scores.absent)) == (None, ["chrf"])


def test_results_are_written_as_they_always_were_and_those_of_the_first_version_are_read(tmp_path: Path) -> None:
    scores = summarize_rows([row("colour", "red", "red"), row("caption", "a ball", "a ball", right=None)])
    scores.write(str(tmp_path))
    written = json.loads((tmp_path / VlmEvaluationResults.FILE).read_text())
    assert list(written) == [
        "prompts", "questions", "questions_by_kind", "facts", "facts_by_theme", "captions_with_all_facts", "bleu",
        "chrf", "answer_perplexity", "tokens_per_s", "tokens_per_pass",
    ]  # fmt: skip
    assert written["questions"] == {"mean": 1.0, "low": None, "high": None, "episodes": 1}
    assert list(written["questions_by_kind"]["colour"]) == ["mean", "low", "high", "episodes", "most_frequent"]
    assert VlmEvaluationResults.read(str(tmp_path)) == scores
    del written["chrf"]  # covray 0.1.0 had no such score
    (tmp_path / VlmEvaluationResults.FILE).write_text(json.dumps(written))
    earlier = VlmEvaluationResults.read(str(tmp_path))
    assert (earlier.chrf, earlier.to_json()) == (None, written)


def test_batches_are_answered_alone_as_among_others(vlm_config: Callable[..., VlmTrainConfig]) -> None:
    training = vlm_config(objective="block_diffusion")
    trained(training)
    options = {
        "run": training.out, "data": training.data, "out": "scores", "texts.instruction": "what is it", "split": "val",
        "batch": 3, "decoding.max_tokens": 6,
    }  # fmt: skip
    config = load_config(VlmEvaluateConfig, None, options)
    answerer = BatchAnswerer(config)

    def of(rows: list[Row]) -> list[Row]:
        return [replace(row, seconds=0.0) for row in rows]

    batches = [of(answerer.answer(number)) for number in (2, 0, 1)]
    assert [[row.number for row in rows] for rows in batches] == [[6, 7], [0, 1, 2], [3, 4, 5]]
    assert of(BatchAnswerer(config).answer(0)) == batches[1]
    faster = BatchAnswerer(load_config(VlmEvaluateConfig, None, options | {"decoding.passes": 1})).answer(0)
    assert [row.log_likelihood for row in faster] == [row.log_likelihood for row in batches[1]]
    assert sum(row.passes for row in faster) < sum(row.passes for row in batches[1])
    lines = row_lines(batches[1])
    assert read_rows([*lines, lines[0][:-9]]) == batches[1], "a line that is cut is none"


def test_bleu_is_that_of_torchmetrics() -> None:
    captions = []
    for number in range(40):
        rng = np.random.default_rng(number)
        captions.append(portrait_words(sample_portrait(rng), rng).caption)
    for written in (captions[1:] + captions[:1], [caption[:60] for caption in captions], captions):
        expected = float(bleu_score(written, [[caption] for caption in captions]))
        assert corpus_bleu(written, captions) == pytest.approx(expected, rel=1e-5)
    assert corpus_bleu(["", "a"], ["a b", "c"]) == 0
