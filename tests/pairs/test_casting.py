"""Rays by NumPy meet what they meet by Embree; one triangle is met where arithmetic says."""

from __future__ import annotations

import importlib.util
import logging

import numpy as np
import pytest

from covray.pairs.scenes import casting, render
from covray.pairs.scenes.casting import Caster, EmbreeCaster, NumpyCaster, open_caster
from covray.pairs.scenes.portraits import portrait_pairs
from covray.pairs.scenes.render import render_scene

with_embree = pytest.mark.skipif(not casting.has_embree(), reason="the package embreex has no wheel here")

TRIANGLE = np.array([[[0.0, 0, 0], [2, 0, 0], [0, 2, 0]]])
CASTERS = [NumpyCaster, pytest.param(EmbreeCaster, marks=with_embree)]


@pytest.mark.parametrize("kind", CASTERS)
def test_a_triangle_is_met_from_both_sides_where_it_is(kind: type[EmbreeCaster] | type[NumpyCaster]) -> None:
    caster = kind(TRIANGLE)
    targets = np.array([[0.5, 1.0, 0], [1.5, 0.25, 0], [1.5, 1.5, 0], [-0.1, 0.5, 0]])
    for side in (1.0, -1.0):
        eye = np.array([0.3, 0.4, 3 * side])
        hits = caster.first_hits(eye, targets - eye)
        assert hits.face.tolist() == [0, 0, -1, -1]
        assert np.allclose(hits.distance[:2], 1)
        assert np.allclose([hits.u[:2], hits.v[:2]], [[0.25, 0.75], [0.5, 0.125]])
        starts = targets + np.array([0, 0, side])
        assert caster.occluded(starts, np.array([0, 0, -side])).tolist() == [True, True, False, False]
        assert not caster.occluded(starts, np.array([0, 0, side])).any(), "it lies behind"
        assert not caster.occluded(starts, np.array([1.0, 0, 0])).any(), "a ray along its plane"


@pytest.mark.parametrize("kind", CASTERS)
def test_the_nearest_of_many_triangles_is_met(kind: type[EmbreeCaster] | type[NumpyCaster]) -> None:
    layers = np.arange(1000.0)[::-1]
    triangles = np.repeat(TRIANGLE - [0.5, 0.5, 0], len(layers), axis=0) + layers[:, None, None] * [0, 0, 1]
    caster: Caster = kind(triangles)
    rays = np.array([[0, 0, 1.0], [0, 0, -1.0]])
    hits = caster.first_hits(np.array([0, 0, 400.5]), rays)
    assert layers[hits.face].tolist() == [401, 400]


@with_embree
def test_scenes_by_numpy_are_those_of_embree(monkeypatch: pytest.MonkeyPatch) -> None:
    different, pixels = 0, 0
    for seed in range(100, 105):
        expected = render_scene(seed, 64)[0]
        with monkeypatch.context() as patched:
            patched.setattr(render, "open_caster", NumpyCaster)
            view = render_scene(seed, 64)[0]
        same = view.classes == expected.classes
        assert np.abs(view.depth_m - expected.depth_m)[same].max() < 1e-3
        assert (np.abs(view.normals - expected.normals).max(axis=2) > 1e-3).mean() < 1e-3
        assert (np.abs(view.colour.astype(int) - expected.colour).max(axis=2) > 2).mean() < 5e-3
        assert np.array_equal(view.keypoints, expected.keypoints)
        different, pixels = different + int((~same).sum()), pixels + same.size
    assert different / pixels < 1e-3


def test_without_embree_scenes_and_portraits_are_rendered_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "embreex" else find(name))
    casting._note_slow.cache_clear()
    with caplog.at_level(logging.INFO, "covray"):
        assert isinstance(open_caster(TRIANGLE), NumpyCaster)
        assert render_scene(3, 16)[0].classes.any()
        assert len(list(portrait_pairs(1, 16))) == 1
    (note,) = caplog.messages
    assert note.startswith("embreex is not installed")
