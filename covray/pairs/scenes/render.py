"""What a camera sees of a scene: one cast of rays gives colour, depth, normals, classes and edges.

The camera looks along -z of its own frame, x right, y up (OpenGL).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covray.io.pixels import to_srgb
from covray.pairs.scenes.casting import open_caster
from covray.pairs.scenes.geometry import CLASSES, Array, Body, Texture, sample_figure, sample_room, sample_solid, unit


@dataclass(frozen=True)
class View:
    """What one camera sees, every field exact: h = w = size_px."""

    colour: NDArray[np.uint8]
    """sRGB [h, w, 3]."""
    classes: NDArray[np.uint8]
    """[h, w]; 0 is the sky, k + 1 class k of ``CLASSES``."""
    depth_m: NDArray[np.float32]
    """[h, w] along the optical axis; 0 is the sky."""
    normals: NDArray[np.float32]
    """[h, w, 3] in the camera's frame; 0 is the sky."""
    edges: NDArray[np.bool_]
    """[h, w], borders of objects and creases."""
    keypoints: NDArray[np.float32]
    """[18, 3] of x px, y px and whether the point is inside the picture."""


def render_scene(seed: int, size_px: int = 64, views: int = 1) -> list[View]:
    """Return the scene of ``seed`` from ``views`` places around it, each ``size_px`` square."""
    # A scene is its seed: whoever changes the number or the order of these draws changes every scene.
    rng = np.random.default_rng(seed)
    bodies, side_x = sample_room(rng)
    joints, figure = sample_figure(rng)
    bodies += figure
    taken = [(0.0, 0.0, 0.45)]
    for _ in range(int(rng.integers(2, 6))):
        body = sample_solid(rng, taken)
        if body is not None:
            bodies.append(body)
    sun = unit(np.array([rng.uniform(-1, 1), rng.uniform(-1.2, -0.1), rng.uniform(0.6, 1.6)]))
    light = (rng.uniform(0.55, 1.0), rng.uniform(0.2, 0.4), rng.uniform((0.9, 0.85, 0.75), (1.0, 1.0, 1.0)))
    stage = Stage(bodies, sun, *light)
    # Cameras go around the scene, each looking at a point near its middle.
    azimuth = rng.uniform(-0.9, 0.9)
    seen = []
    for _ in range(views):
        target = np.array([rng.uniform(-0.3, 0.3), rng.uniform(-0.2, 0.2), rng.uniform(0.7, 1.0)])
        distance, elevation = rng.uniform(2.5, 4.0), rng.uniform(0.05, 0.5)
        direction = np.array(
            [np.sin(azimuth) * np.cos(elevation), -np.cos(azimuth) * np.cos(elevation), np.sin(elevation)]
        )
        if side_x is not None and direction[0] * side_x > 0:  # from behind the side wall nothing else would be seen
            free = abs(side_x - target[0]) - 0.2
            distance = min(distance, free / abs(direction[0]))
        camera = Camera(target + distance * direction, target, rng.uniform(0.75, 1.0), size_px)
        seen.append(stage.view(camera, joints))
        azimuth += rng.uniform(0.2, 0.5)
    return seen


@dataclass(frozen=True)
class _Hits:
    """Where rays first meet a body; fields of rays that meet none hold no meaning."""

    hit: NDArray[np.bool_]
    body: NDArray[np.int64]
    points: Array
    """[n, 3] in the world."""
    normals: Array
    """[n, 3] towards the eye."""
    distance: Array


class Camera:
    """A pinhole camera at ``eye`` that looks at ``target``; ``fov`` is the full angle in radians."""

    def __init__(self, eye: Array, target: Array, fov: float, size_px: int):
        self.eye, self.size_px = eye, size_px
        back = unit(eye - target)
        right = unit(np.cross([0.0, 0, 1], back))
        self.axes = np.stack([right, np.cross(back, right), back])  # rows: the camera's x, y, z in the world
        self.focal_px = size_px / (2 * np.tan(fov / 2))

    def rays(self, samples: int) -> Array:
        """Unit directions [size * samples, size * samples, 3] through a regular grid in every pixel."""
        grid = (np.arange(self.size_px * samples) + 0.5) / samples - self.size_px / 2
        x, y = np.meshgrid(grid, -grid)
        local = np.stack([x / self.focal_px, y / self.focal_px, -np.ones_like(x)], axis=-1)
        return unit(local @ self.axes)

    def project(self, points: Array) -> NDArray[np.float32]:
        """World points [n, 3] to [n, 3] of x px, y px and whether they lie inside the picture."""
        local = (points - self.eye) @ self.axes.T
        ahead = np.maximum(-local[:, 2], 1e-6)
        x = self.size_px / 2 + local[:, 0] / ahead * self.focal_px
        y = self.size_px / 2 - local[:, 1] / ahead * self.focal_px
        inside = (local[:, 2] < 0) & (x >= 0) & (x < self.size_px) & (y >= 0) & (y < self.size_px)
        return np.stack([x, y, inside], axis=1).astype(np.float32)


class Stage:
    """All bodies in one scene, with the light."""

    def __init__(self, bodies: list[Body], sun: Array, strength: float, ambient: float, tint: Array):
        self.bodies, self.sun, self.strength, self.ambient, self.tint = bodies, sun, strength, ambient, tint
        triangles = [body.vertices[body.faces] for body in bodies]
        self.triangles = np.concatenate(triangles)
        self.face_normals = unit(
            np.cross(self.triangles[:, 1] - self.triangles[:, 0], self.triangles[:, 2] - self.triangles[:, 0])
        )
        corner_normals, start = [], 0
        for body in bodies:
            of_faces = self.face_normals[start : start + len(body.faces), None]
            smooth = body.vertex_normals
            corner_normals.append(np.repeat(of_faces, 3, axis=1) if smooth is None else smooth[body.faces])
            start += len(body.faces)
        self.corner_normals = np.concatenate(corner_normals)
        self.body_of = np.repeat(np.arange(len(bodies)), [len(body.faces) for body in bodies])
        self.class_of = np.array([CLASSES.index(body.kind) + 1 for body in bodies], np.uint8)
        self.caster = open_caster(self.triangles)

    def view(self, camera: Camera, joints: Array) -> View:
        """What ``camera`` sees, with the figure's ``joints`` [18, 3]."""
        size = camera.size_px
        rays = camera.rays(1).reshape(-1, 3)
        hits = self._cast(camera.eye, rays)
        hit, body = hits.hit, hits.body
        along = hits.distance * (rays @ -camera.axes[2])
        depth_m = np.where(hit, along, 0).astype(np.float32).reshape(size, size)
        local = np.where(hit[:, None], hits.normals @ camera.axes.T, 0).astype(np.float32).reshape(size, size, 3)
        classes = np.where(hit, self.class_of[body], 0).astype(np.uint8).reshape(size, size)
        # The figure's many bodies are one object to an edge detector.
        of_figure = self.class_of[body] == CLASSES.index("person") + 1
        objects = np.where(hit, np.where(of_figure, -2, body), -1).reshape(size, size)

        fine = camera.rays(2).reshape(-1, 3)
        colour = self._shade(fine, self._cast(camera.eye, fine))
        colour = colour.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
        return View(
            colour=np.rint(to_srgb(colour) * 255).astype(np.uint8),
            classes=classes,
            depth_m=depth_m,
            normals=local,
            edges=_edges(objects, local),
            keypoints=camera.project(joints),
        )

    def _cast(self, origin: Array, rays: Array) -> _Hits:
        """First hits of ``rays`` [n, 3] from one ``origin`` [3]."""
        first = self.caster.first_hits(origin, rays)
        hit = first.face >= 0
        face, distance = np.where(hit, first.face, 0), np.where(hit, first.distance, 0)
        weights = np.stack([1 - first.u - first.v, first.u, first.v], axis=1)[..., None]
        normal = unit((self.corner_normals[face] * weights).sum(axis=1))
        normal *= np.where((normal * rays).sum(axis=1, keepdims=True) > 0, -1.0, 1.0)
        return _Hits(hit, self.body_of[face], origin + rays * distance[:, None], normal, distance)

    def _shade(self, rays: Array, hits: _Hits) -> Array:
        """Lambert and a little gloss under a sun with hard shadows and a sky; linear RGB [n, 3]."""
        hit, body, points, normal = hits.hit, hits.body, hits.points, hits.normals
        albedo = np.zeros_like(points)
        for index in np.unique(body[hit]):
            mask = hit & (body == index)
            albedo[mask] = self.paint(self.bodies[index].texture, points[mask])
        lit = ~self.caster.occluded(points + normal * 2e-3, self.sun)
        facing = np.clip(normal @ self.sun, 0, 1) * lit
        gloss = np.clip(unit(self.sun - rays) * normal, -1, 1).sum(axis=1).clip(0, 1) ** 40 * lit * 0.25
        sky = self.ambient * (0.7 + 0.3 * normal[:, 2])
        shaded = albedo * (self.strength * facing[:, None] * self.tint + sky[:, None]) + gloss[:, None]
        return np.where(hit[:, None], shaded, self.sky(rays))

    def paint(self, texture: Texture, points: Array) -> Array:
        """Return the colours of ``texture`` at world ``points`` [n, 3]: linear RGB [n, 3]."""
        return _paint(texture, points)

    def sky(self, rays: Array) -> Array:
        """Return what ``rays`` [n, 3] see that meet no body: linear RGB [n, 3]."""
        return np.array([0.35, 0.55, 0.85]) + np.clip(0.5 - rays[:, 2:], 0, 1) * np.array([0.45, 0.35, 0.1])


def _paint(texture: Texture, points: Array) -> Array:
    """The colours of ``texture`` at world ``points`` [n, 3]: linear RGB [n, 3]."""
    p = points * texture.frequency + texture.phase
    if texture.pattern == "checks":
        mix = (np.floor(p).sum(axis=1) % 2).astype(np.float64)
    elif texture.pattern == "stripes":
        mix = (np.sin(2 * np.pi * (p @ np.array([0.6, 0.6, 0.53]))) > 0).astype(np.float64)
    elif texture.pattern == "shade":
        mix = 0.5 + 0.5 * np.sin(p[:, 0] + 0.7 * np.sin(p[:, 1])) * np.cos(p[:, 2])
    elif texture.pattern == "spots":
        mix = (np.linalg.norm(p - np.rint(p), axis=1) < 0.33).astype(np.float64)
    else:
        mix = np.zeros(len(p))
    return np.asarray(texture.colours[0] * (1 - mix[:, None]) + texture.colours[1] * mix[:, None])


def _edges(objects: NDArray[np.int64], local: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a pixel and its right or lower neighbour are other objects, or meet in a crease of 35 degrees and more."""
    edges = np.zeros(objects.shape, bool)
    for axis in (0, 1):
        first = (slice(None, -1), slice(None))[:: 1 if axis == 0 else -1]
        second = (slice(1, None), slice(None))[:: 1 if axis == 0 else -1]
        crease = (local[first] * local[second]).sum(axis=2) < np.cos(np.deg2rad(35))
        # Inside the figure, limbs that cross are no edges of the scene's objects.
        solid = (objects[first] >= 0) & (objects[second] >= 0)
        edges[first] |= (objects[first] != objects[second]) | (crease & solid)
    return edges
