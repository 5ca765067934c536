"""Facts are read from captions as portraits state them; an evaluation continues where it was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torchmetrics.functional.text import bleu_score

from covray.config import load_config
from covray.config.vlm import VlmEvaluateConfig, VlmTrainConfig
from covray.errors import ConfigError, DatasetError
from covray.evaluation.bleu import corpus_bleu
from covray.evaluation.caption_facts import right_facts
from covray.evaluation.vision_text import Row, evaluate_vision_text, summarize_rows
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
    assert scores["questions"]["mean"] == pytest.approx(2 / 3)
    assert scores["questions_by_kind"]["colour"]["mean"] == 0.5
    assert scores["questions_by_kind"]["colour"]["most_frequent"] == 1
    assert scores["facts"]["mean"] == 0.75
    assert scores["facts_by_theme"]["colour"]["mean"] == 0.5
    assert scores["captions_with_all_facts"]["mean"] == 0.5
    assert scores["answer_perplexity"] == pytest.approx(np.e)
    assert (scores["tokens_per_s"], scores["tokens_per_pass"]) == (8, 2)


def test_an_evaluation_is_continued(
    vlm_config: Callable[..., VlmTrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = vlm_config(objective="block_diffusion")
    trained(training)

    def config(out: str, **changes: Any) -> VlmEvaluateConfig:
        options = {
            "run": training.out, "data": training.data, "texts.instruction": "what is it",
            "split": "val", "batch": 3, "decoding.max_tokens": 6, "out": str(tmp_path / out),
        }  # fmt: skip
        return load_config(VlmEvaluateConfig, None, options | changes)

    def answers(out: str) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (tmp_path / out / "answers.jsonl").read_text().splitlines()]
        return [{key: value for key, value in one.items() if key != "seconds"} for one in rows]

    whole = evaluate_vision_text(config("whole"))
    assert whole["prompts"] == 8
    evaluate_vision_text(config("killed"))
    file = tmp_path / "killed" / "answers.jsonl"
    file.write_text(file.read_text()[:-300])  # rows are missing, and one is half
    evaluate_vision_text(config("killed"))
    assert answers("killed") == answers("whole")
    monkeypatch.setattr("covray.evaluation.vision_text._answer", lambda *rest: pytest.fail("answered again"))
    first_batches = "".join(file.read_text().splitlines(keepends=True)[:6])
    evaluate_again = config("killed", samples=6)
    with pytest.raises(DatasetError, match="samples was None, is 6"):
        evaluate_vision_text(evaluate_again)
    assert file.read_text().startswith(first_batches)
    with pytest.raises(DatasetError, match="did not write"):
        evaluate_vision_text(config(str(tmp_path)))
    with pytest.raises(ConfigError, match="is not a finished run"):
        evaluate_vision_text(config("other", **{"run": str(tmp_path)}))


def test_bleu_is_that_of_torchmetrics() -> None:
    captions = []
    for number in range(40):
        rng = np.random.default_rng(number)
        captions.append(portrait_words(sample_portrait(rng), rng).caption)
    for written in (captions[1:] + captions[:1], [caption[:60] for caption in captions], captions):
        expected = float(bleu_score(written, [[caption] for caption in captions]))
        assert corpus_bleu(written, captions) == pytest.approx(expected, rel=1e-5)
    assert corpus_bleu(["", "a"], ["a b", "c"]) == 0
