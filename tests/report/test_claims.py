"""The page of claims: every claim with its verdict, whatever the texts are, and pictures where there are some."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from covray.evaluation.claims.records import ArmEntry, ClaimResult, ClaimTask, CurvePoint, Exposure, ProgrammeResults
from covray.report.claims import write_claims_page
from covray.report.evaluation import Strip

HOSTILE = "<script>alert(1)</script>"


def claim(**changes: Any) -> ClaimResult:
    row = ClaimTask(
        task="depth", metric="abs_rel", first=0.1, second=0.2, difference=-0.1, low=-0.2, high=-0.05, better=True
    )
    values: dict[str, Any] = {
        "key": "diffusion_none", "claim": "Diffused frames beat no frames", "group": "paper", "view": "equal answers",
        "first": "diffusion", "second": "none", "metric": "primary", "gain_percent": 12.34, "low": 3.0, "high": 20.0,
        "seeds": 3, "queries": 2800, "verdict": "holds", "tasks": (row,),
    }  # fmt: skip
    return ClaimResult.model_validate(values | changes)


def results(**changes: Any) -> ProgrammeResults:
    arm = ArmEntry(
        name="none", about="plain pairs", method="none", length=2, share=1.0, seeds=(0, 1), steps=100, tokens=1_000_000,
        answers=3200, train_hours=1.5, evaluate_hours=0.5, hardware=("a machine",), gain_percent=4.0, low=1.0, high=7.0,
        perplexity_own=20.0, scores={"depth": 0.19},
    )  # fmt: skip
    point = CurvePoint(arm="none", answers=3200, tokens=10**6, gain_percent=4.0, low=1.0, high=7.0, perplexity_own=20.0)
    values: dict[str, Any] = {
        "budget_name": "small", "budget": {"scenes": {"train": 4}}, "backbones": [{"name": "nano", "path": "nano"}],
        "arms_done": 2, "arms_planned": 5, "conclusion": "Not decided: too little is done.", "best": None,
        "lengths": {}, "claims": (claim(),), "arms": (arm,), "curves": (point,),
        "exposure": (Exposure(arm="diffusion", task="depth", unlearnt=0.2, exposure=0.6),), "quality": (), "hours": 2.0,
    }  # fmt: skip
    return ProgrammeResults.model_validate(values | changes)


def page(tmp_path: Path, about: ProgrammeResults, strips: tuple[Strip, ...] = ()) -> str:
    write_claims_page(about, strips, str(tmp_path / "index.html"))
    return (tmp_path / "index.html").read_text()


def test_a_claim_has_its_verdict_gain_and_basis(tmp_path: Path) -> None:
    waiting = claim(
        claim="Votes beat", group="decoding", verdict="not run", gain_percent=None, low=None, high=None, tasks=()
    )
    text = page(tmp_path, results(claims=(claim(), waiting)))
    for part in (
        "Diffused frames beat no frames",
        "+12.3 %",
        "[+3.0, +20.0] %",
        "3 seeds, 2,800 queries",
        "Votes beat",
    ):
        assert part in text
    assert ">holds<" in text
    assert ">not run<" in text
    assert "What the paper claims" in text
    assert "How to train them" not in text, "no claim of that kind"
    assert "2 of 5" in text
    assert "Not decided" in text


def test_texts_are_texts_and_nothing_is_loaded(tmp_path: Path) -> None:
    text = page(tmp_path, results(conclusion=HOSTILE, claims=(claim(claim=HOSTILE, first=HOSTILE),)))
    assert HOSTILE not in text
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)


def test_pictures_stand_query_first_and_arm_by_arm(tmp_path: Path) -> None:
    picture = np.zeros((16, 16, 3), np.uint8)
    strips = [
        Strip("depth", arm, "median", 1, 0.2, picture, [picture] * frames, picture, picture)
        for arm, frames in (("none", 0), ("diffusion", 2))
    ]
    text = page(tmp_path, results(), tuple(strips))
    assert text.count('alt="query"') == text.count('alt="label"') == 1
    assert [text.count(f'alt="answer of {arm}"') for arm in ("none", "diffusion")] == [1, 1]
    assert 'alt="frame 2 of diffusion"' in text
    assert 'id="pictures"' not in page(tmp_path, results())


def test_a_programme_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    text = page(tmp_path, results(claims=(), arms=(), curves=(), exposure=(), arms_done=0))
    assert 'id="arms"' in text
    assert 'id="curves"' not in text
