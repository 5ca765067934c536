"""Where frames stand, and controls for them: even steps along a path, the label in cells, the quality of a chain."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from covray.chains.quality import best_rows, chain_quality, kept_count
from covray.chains.spacing import PROBE_ALPHAS, coarse_label, even_path_alphas
from covray.config import BuildConfig, SentencesConfig
from covray.config.build import with_solver

GREYS = st.lists(st.integers(0, 255), min_size=3, max_size=8)


def flat(grey: int) -> np.ndarray:
    return np.full((2, 2, 3), grey, np.uint8)


@given(GREYS, st.integers(3, 8))
def test_the_steps_between_the_chosen_places_are_even(greys: list[int], length: int) -> None:
    """Flat greys go on evenly between two pictures, so that the way to every place can be computed."""
    places = np.linspace(0, 1, len(greys))
    shares = [k / (length - 1) for k in range(1, length - 1)]
    alphas = even_path_alphas([flat(grey) for grey in greys], places, shares)
    gone = np.concatenate([[0], np.abs(np.diff(greys)).cumsum()])
    if not gone[-1]:
        assert alphas == shares
        return
    assert np.interp(alphas, places, gone) == pytest.approx(np.array(shares) * gone[-1], abs=1e-6 * gone[-1])
    assert all(0 <= alpha <= 1 for alpha in alphas)
    assert alphas == sorted(alphas)


def test_a_chain_that_goes_on_evenly_keeps_its_alphas() -> None:
    places = (0.0, *PROBE_ALPHAS, 1.0)
    pictures = [np.full((2, 2, 3), 240, np.uint8) * 0 + np.uint8(round(216 * place)) for place in places]
    assert even_path_alphas(pictures, places, [1 / 3, 2 / 3]) == pytest.approx([1 / 3, 2 / 3], abs=0.01)


def test_a_coarse_label_has_the_colours_and_the_cells_that_it_says() -> None:
    generator = np.random.default_rng(0)
    classes = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)[generator.integers(0, 3, (64, 64))]
    coarse = coarse_label(classes, 0.5, "nearest")
    cells = coarse.reshape(8, 8, 8, 8, 3)
    assert (cells == cells[:, :1, :, :1]).all(), "8 px cells at alpha 1/2"
    assert {tuple(colour) for colour in coarse.reshape(-1, 3)} <= {tuple(colour) for colour in classes.reshape(-1, 3)}
    picture = generator.integers(0, 256, (64, 64, 3), np.uint8)
    mean = coarse_label(picture, 0.5, "bicubic").reshape(8, 8, 8, 8, 3)[:, 0, :, 0]
    assert np.abs(mean - picture.reshape(8, 8, 8, 8, 3).mean((1, 3))).max() <= 0.5
    finer = coarse_label(picture, 0.9, "bicubic")
    errors = [np.abs(each.astype(int) - picture).mean() for each in (coarse_label(picture, 0.1, "bicubic"), finer)]
    assert errors[1] < errors[0]


def test_quality_is_1_for_a_straight_path_of_typical_noise_and_less_for_any_other() -> None:
    best = {"diffusion_path": 1.0, "source_noise_rms": 1.0, "label_noise_rms": 1.0}
    assert chain_quality(best) == 1
    for change in ({"diffusion_path": 1.4}, {"source_noise_rms": 0.7}, {"label_noise_rms": 1.3}):
        quality = chain_quality(best | change)
        assert quality is not None
        assert 0 < quality < 1
    assert chain_quality(None) is None
    assert chain_quality({"diffusion_path": None}) is None


@given(st.lists(st.none() | st.floats(0, 1), max_size=30), st.floats(0, 0.99))
def test_the_worst_chains_are_dropped_and_no_better_one(qualities: list[float | None], dropped: float) -> None:
    kept = best_rows(qualities, dropped)
    assert len(kept) == kept_count(len(qualities), dropped) >= len(qualities) * (1 - dropped)
    assert kept.tolist() == sorted(set(kept.tolist()))
    values = [-1.0 if quality is None else quality for quality in qualities]
    left_out = [values[row] for row in range(len(values)) if row not in kept]
    assert not left_out or max(left_out) <= min(values[row] for row in kept)


def test_builds_and_runs_of_before_keep_their_identity() -> None:
    config = BuildConfig(pairs="pairs", out="out")
    assert "spacing" not in config.identity()
    assert with_solver(config.identity())["spacing"] == "even"
    assert BuildConfig(pairs="pairs", out="out", spacing="path").identity()["spacing"] == "path"
    assert "drop_worst" not in SentencesConfig().model_dump()
    assert SentencesConfig(drop_worst=0.2).model_dump()["drop_worst"] == 0.2


@pytest.mark.parametrize(
    "options", [{"spacing": (0.6, 0.9), "lengths": (3,)}, {"spacing": ()}, {"spacing": (0.9, 0.6)}, {"spacing": "odd"}]
)
def test_alphas_that_are_of_no_chain_are_refused(options: dict) -> None:
    with pytest.raises(ValidationError):
        BuildConfig.model_validate({"pairs": "pairs", "out": "out"} | options)
