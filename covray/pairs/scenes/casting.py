"""Where rays first meet the triangles of a scene: by Embree, or where its package has no wheel by NumPy.

Both see the same float32 triangles and rays. They differ in the last bits, so that a pixel on a border can fall on
either side of it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_LOG = logging.getLogger("covray")
_LEAF = 256
"""Triangles that share a box, at most; fewer spend more time on boxes."""
_LARGE_M = 0.5
"""Triangles of this extent share boxes with each other alone: their boxes are met by most rays."""
_SLACK = 1e-9
"""How far outside a triangle, as a share of it, a ray still meets it: no ray passes between two of a surface."""


@dataclass(frozen=True)
class FaceHits:
    """Which triangle each ray first meets."""

    face: NDArray[np.int64]
    """[n]; -1 where a ray meets none. The other fields hold no meaning there."""
    distance: Array
    """[n], in lengths of the ray's direction."""
    u: Array
    """[n], weight of the triangle's second corner."""
    v: Array
    """[n], weight of its third corner."""


class Caster(Protocol):
    """Casts rays at triangles."""

    def first_hits(self, origin: Array, rays: Array) -> FaceHits:
        """Return what rays with directions ``rays`` [n, 3] from one ``origin`` [3] meet first."""

    def occluded(self, starts: Array, direction: Array) -> NDArray[np.bool_]:
        """Return whether rays of one ``direction`` [3] from ``starts`` [n, 3] meet anything, [n]."""


def open_caster(triangles: Array) -> Caster:
    """Return a caster for ``triangles`` [f, 3, 3]: Embree's where the package embreex is installed."""
    if has_embree():
        return EmbreeCaster(triangles)
    _note_slow()
    return NumpyCaster(triangles)


def has_embree() -> bool:
    """Return whether the package embreex is installed."""
    return importlib.util.find_spec("embreex") is not None


@functools.cache
def _note_slow() -> None:
    _LOG.info("embreex is not installed: scenes are rendered by NumPy, which takes longer (docs/install.md)")


class EmbreeCaster:
    """Casts rays by Embree."""

    def __init__(self, triangles: Array):
        """Build Embree's scene of ``triangles`` [f, 3, 3]."""
        from embreex import rtcore_scene
        from embreex.mesh_construction import TriangleMesh

        self._scene: Any = rtcore_scene.EmbreeScene()
        TriangleMesh(self._scene, triangles.astype(np.float32))

    def first_hits(self, origin: Array, rays: Array) -> FaceHits:
        """Return what the rays meet first; see ``Caster``."""
        origins = np.broadcast_to(origin, rays.shape).astype(np.float32)
        answer = self._scene.run(origins, rays.astype(np.float32), output=True)
        distance, u, v = (answer[name].astype(np.float64) for name in ("tfar", "u", "v"))
        return FaceHits(answer["primID"].astype(np.int64), distance, u, v)

    def occluded(self, starts: Array, direction: Array) -> NDArray[np.bool_]:
        """Return whether the rays meet anything; see ``Caster``."""
        directions = np.broadcast_to(direction, starts.shape).astype(np.float32)
        answer = self._scene.run(starts.astype(np.float32), np.ascontiguousarray(directions), query="OCCLUDED")
        return np.asarray(answer == 0)  # the geometry's number, or -1


class NumpyCaster:
    """Casts rays by NumPy: each box of some triangles, then the triangles of the boxes that a ray meets.

    A ray o + t d meets the triangle with corner a and edges e, f at t, u, v with o - a = -t d + u e + v f. By Cramer's
    rule each is a quotient of determinants, which are linear in d where all rays share o, and in o where they share d:
    a product of matrices tests all rays against all triangles of a box.
    """

    def __init__(self, triangles: Array):
        """Sort ``triangles`` [f, 3, 3] into boxes."""
        self._triangles = triangles.astype(np.float32).astype(np.float64)
        self._leaves = list(_leaves(self._triangles))
        corners = [self._triangles[leaf].reshape(-1, 3) for leaf in self._leaves]
        self._boxes = [(each.min(axis=0), each.max(axis=0)) for each in corners]

    def first_hits(self, origin: Array, rays: Array) -> FaceHits:
        """Return what the rays meet first; see ``Caster``."""
        origin, rays = _rounded(origin), _rounded(rays)
        face = np.full(len(rays), -1, np.int64)
        distance, u, v = np.full(len(rays), np.inf), np.zeros(len(rays)), np.zeros(len(rays))
        middles = np.array([(low + high) / 2 for low, high in self._boxes])
        # From the nearest box to the farthest: what a ray has met already hides the boxes behind it.
        for number in np.argsort(np.linalg.norm(middles - origin, axis=1)):
            leaf = self._leaves[number]
            some = np.flatnonzero(_box_distance(self._boxes[number], origin, rays) < distance)
            if not some.size:
                continue
            corner, first, second = _edges(self._triangles[leaf])
            offset, normal = origin - corner, np.cross(first, second)
            ahead = rays[some]
            with np.errstate(divide="ignore", invalid="ignore"):  # rays along a triangle's plane meet it nowhere
                scale = 1 / (ahead @ normal.T)
                at = -(offset * normal).sum(axis=1) * scale
                of_first = ahead @ np.cross(offset, second).T * scale
                of_second = ahead @ np.cross(first, offset).T * scale
            at = np.where(_inside(at, of_first, of_second), at, np.inf)
            nearest = at.argmin(axis=1)
            rows = np.arange(len(some))
            closer = at[rows, nearest] < distance[some]
            rows, nearest, some = rows[closer], nearest[closer], some[closer]
            face[some], distance[some] = leaf[nearest], at[rows, nearest]
            u[some], v[some] = of_first[rows, nearest], of_second[rows, nearest]
        return FaceHits(face, distance, u, v)

    def occluded(self, starts: Array, direction: Array) -> NDArray[np.bool_]:
        """Return whether the rays meet anything; see ``Caster``."""
        starts, direction = _rounded(starts), _rounded(direction)
        met = np.zeros(len(starts), bool)
        for leaf, box in zip(self._leaves, self._boxes, strict=True):
            some = np.flatnonzero(~met & np.isfinite(_box_distance(box, starts, direction)))
            if not some.size:
                continue
            corner, first, second = _edges(self._triangles[leaf])
            normal = np.cross(first, second)
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = 1 / (normal @ direction)
                at = -_dots(starts[some], corner, normal) * scale
                of_first = _dots(starts[some], corner, np.cross(second, direction)) * scale
                of_second = _dots(starts[some], corner, np.cross(direction, first)) * scale
            met[some] = _inside(at, of_first, of_second).any(axis=1)
        return met


def _leaves(triangles: Array) -> Iterator[NDArray[np.int64]]:
    """Yield the numbers of triangles [f, 3, 3] that share a box; every triangle once."""
    large = np.ptp(triangles, axis=1).max(axis=1) > _LARGE_M
    middles = triangles.mean(axis=1)
    pending = [np.flatnonzero(large), np.flatnonzero(~large)]
    while pending:
        numbers = pending.pop()
        if len(numbers) > _LEAF:
            along = middles[numbers, np.ptp(middles[numbers], axis=0).argmax()]
            halves = np.argsort(along, kind="stable")
            pending += [numbers[halves[: len(halves) // 2]], numbers[halves[len(halves) // 2 :]]]
        elif len(numbers):
            yield numbers


def _edges(triangles: Array) -> tuple[Array, Array, Array]:
    """Return the first corners of triangles [f, 3, 3], and their two edges from there, each [f, 3]."""
    corner = triangles[:, 0]
    return corner, triangles[:, 1] - corner, triangles[:, 2] - corner


def _dots(starts: Array, corners: Array, vectors: Array) -> Array:
    """Return (start - corner) . vector for starts [n, 3] and triangles with ``corners`` and ``vectors`` [f, 3]."""
    return np.asarray(starts @ vectors.T - (corners * vectors).sum(axis=1))


def _inside(at: Array, of_first: Array, of_second: Array) -> NDArray[np.bool_]:
    """Return where rays meet triangles ahead of their start, from t, u and v; false where these are not numbers."""
    return np.asarray((at > 0) & (of_first >= -_SLACK) & (of_second >= -_SLACK) & (of_first + of_second <= 1 + _SLACK))


def _box_distance(box: tuple[Array, Array], origin: Array, rays: Array) -> Array:
    """Return at which t rays enter a box; infinite where they miss it. One of ``origin`` and ``rays`` may be [3]."""
    enter, leave = np.zeros(()), np.full((), np.inf)
    for axis in range(3):  # along the columns: NumPy is slow along rows of three
        along = rays[..., axis]
        steps = np.where(np.abs(along) < 1e-12, 1e-12, along)
        first, second = (box[0][axis] - origin[..., axis]) / steps, (box[1][axis] - origin[..., axis]) / steps
        enter = np.maximum(enter, np.minimum(first, second))
        leave = np.minimum(leave, np.maximum(first, second))
    return np.where(enter <= leave + 1e-6, enter, np.inf)


def _rounded(values: Array) -> Array:
    """Return ``values`` with the precision that Embree gets them in."""
    return np.asarray(np.asarray(values, np.float32).astype(np.float64), order="F")
