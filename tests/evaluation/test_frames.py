"""Frames: straight and even ways, detours, and what has no figure."""

from __future__ import annotations

import math

import numpy as np
import pytest

from covray.evaluation.frames import FRAME_METRICS, frame_figures
from covray.io.pixels import psnr

NAMES = tuple(metric.name for metric in FRAME_METRICS)
NO_FRAMES = np.zeros((0, 8, 8, 3), np.uint8)


def _flat(*levels: int) -> np.ndarray:
    return np.stack([np.full((8, 8, 3), level, np.uint8) for level in levels])


def test_a_linear_mix_is_straight_and_even() -> None:
    # Differences of 6 and 3 divide by three: mixes of bytes without rounding.
    query = np.random.default_rng(0).integers(100, 150, (8, 8, 3), dtype=np.uint8)
    difference = np.random.default_rng(1).choice([-6, 3, 6], query.shape)
    frames = np.stack([query + k * difference // 3 for k in (1, 2)]).astype(np.uint8)
    figures = frame_figures(query, frames, (query + difference).astype(np.uint8), frames)
    assert tuple(figures) == NAMES
    assert figures == {
        "frame_psnr": 100,
        "frame_path": pytest.approx(1),
        "frame_step_variation": pytest.approx(0, abs=1e-12),
    }


def test_a_detour_and_uneven_steps_by_hand() -> None:
    query, frame, answer = _flat(0, 200, 100)
    figures = frame_figures(query, frame[None], answer, _flat(190))
    # Steps of 200 and 100 where 100 is the direct way: mean 150, deviation 50.
    assert figures["frame_path"] == pytest.approx(3)
    assert figures["frame_step_variation"] == pytest.approx(1 / 3)
    assert figures["frame_psnr"] == pytest.approx(20 * math.log10(255 / 10))


def test_distances_are_root_mean_square() -> None:
    query, answer = _flat(0, 0)
    answer[..., 0] = 30  # RMS 30 / sqrt(3)
    frame = _flat(0)
    frame[..., 1] = 40  # from the query 40 / sqrt(3), to the answer 50 / sqrt(3)
    assert frame_figures(query, frame, answer, frame)["frame_path"] == pytest.approx(90 / 30)


def test_every_frame_is_held_against_its_own_reference() -> None:
    query, answer = _flat(0, 255)
    frames, references = _flat(80, 170), _flat(85, 150)
    expected = (20 * math.log10(255 / 5) + 20 * math.log10(255 / 20)) / 2
    assert frame_figures(query, frames, answer, references)["frame_psnr"] == pytest.approx(expected)
    swapped = frame_figures(query, frames, answer, references[::-1])["frame_psnr"]
    assert swapped == pytest.approx(np.mean([psnr(*pair) for pair in zip(frames, references[::-1], strict=True)]))
    assert swapped < expected


def test_what_is_undefined_is_none() -> None:
    same, other = _flat(7, 9)
    assert frame_figures(same, NO_FRAMES, other, NO_FRAMES) == dict.fromkeys(NAMES)
    there_and_back = frame_figures(same, other[None], same, other[None])
    assert there_and_back == {"frame_psnr": 100, "frame_path": None, "frame_step_variation": 0}
    still = frame_figures(same, same[None], same, other[None])
    assert (still["frame_path"], still["frame_step_variation"]) == (None, None)


def test_frames_without_their_references_are_refused() -> None:
    with pytest.raises(ValueError, match="2 frames and 1 references"):
        frame_figures(*_flat(0), _flat(1, 2), *_flat(3), _flat(1))
