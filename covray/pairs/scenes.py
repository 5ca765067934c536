"""Rendered scenes with exact labels for all seven tasks.

A scene is a room with a few solids, an articulated figure, a sun and a camera, all drawn from one seed. Embree casts
the rays; one cast gives colour, depth, normals, classes and edges, and the figure's joints give the pose.
World axes are right-handed, z up, metres; the camera looks along -z of its own frame, x right, y up (OpenGL).
"""

from __future__ import annotations

import colorsys
import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import trimesh
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh
from numpy.typing import NDArray

from covray.io.images import encode_png
from covray.io.pixels import to_srgb
from covray.pairs.manifest import Pair, Picture
from covray.seeds import hash_number
from covray.tasks import TASKS, colorization, depth, edges, low_light, normals, pose, segmentation

CLASSES = ("wall", "floor", "box", "ball", "person", "cylinder", "cone", "ring")
"""Segmentation classes of scenes; index + 1 is the class drawn, 0 is the sky."""
SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}
SOLIDS = ("box", "ball", "cylinder", "cone", "ring")
HUES = {
    "wall": 0.08, "floor": 0.3, "box": 0.74, "ball": 0.0, "cylinder": 0.6, "cone": 0.15, "ring": 0.48,
    "shirt": 0.92, "trousers": 0.64,
}  # fmt: skip
"""Things have their colours, as in the world: the hue, as a share of the circle from red through green and blue, about
which those of a kind vary. Were they any colour, colorization could only be guessed."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class View:
    """What one camera sees, every field exact: h = w = size_px."""

    colour: NDArray[np.uint8]  # [h, w, 3]
    classes: NDArray[np.uint8]  # [h, w], 0 is the sky
    depth_m: NDArray[np.float32]  # [h, w] along the optical axis, 0 is the sky
    normals: NDArray[np.float32]  # [h, w, 3] in the camera's frame, 0 is the sky
    edges: NDArray[np.bool_]  # [h, w] borders of objects and creases
    keypoints: NDArray[np.float32]  # [18, 3] of x px, y px, inside the picture


@dataclass
class _Body:
    """One solid: triangles in the world, smooth normals or flat, a class and a texture."""

    kind: str
    vertices: Array  # [v, 3]
    faces: NDArray[np.int64]  # [f, 3]
    vertex_normals: Array | None  # [v, 3], None for flat faces
    colours: Array  # [2, 3] linear RGB
    pattern: str
    frequency: float
    phase: Array  # [3]


def scene_seed(seed: int, split: str, index: int) -> int:
    """The seed of a scene: a function of (seed, split, index), so that splits share none."""
    return hash_number(f"covray scene\0{seed}\0{split}\0{index}", bits=64)


def render_scene(seed: int, size_px: int = 64, views: int = 1) -> list[View]:
    """The scene of ``seed`` from ``views`` places around it, each ``size_px`` square."""
    rng = np.random.default_rng(seed)
    bodies, side_x = _room(rng)
    joints, figure = _figure(rng)
    bodies += figure
    taken = [(0.0, 0.0, 0.45)]
    for _ in range(int(rng.integers(2, 6))):
        body = _solid(rng, taken)
        if body is not None:
            bodies.append(body)
    sun = _unit(np.array([rng.uniform(-1, 1), rng.uniform(-1.2, -0.1), rng.uniform(0.6, 1.6)]))
    light = (rng.uniform(0.55, 1.0), rng.uniform(0.2, 0.4), rng.uniform((0.9, 0.85, 0.75), (1.0, 1.0, 1.0)))
    stage = _Stage(bodies, sun, *light)
    azimuth = rng.uniform(-0.9, 0.9)
    shots = []
    for _ in range(views):
        target = np.array([rng.uniform(-0.3, 0.3), rng.uniform(-0.2, 0.2), rng.uniform(0.7, 1.0)])
        distance, elevation = rng.uniform(2.5, 4.0), rng.uniform(0.05, 0.5)
        direction = np.array(
            [np.sin(azimuth) * np.cos(elevation), -np.cos(azimuth) * np.cos(elevation), np.sin(elevation)]
        )
        if side_x is not None and direction[0] * side_x > 0:  # from behind the side wall nothing else would be seen
            free = abs(side_x - target[0]) - 0.2
            distance = min(distance, free / abs(direction[0]))
        camera = _Camera(target + distance * direction, target, rng.uniform(0.75, 1.0), size_px)
        shots.append(stage.shoot(camera, joints))
        azimuth += rng.uniform(0.2, 0.5)
    return shots


def labelled(view: View, task: str, generator: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Image and label picture of ``view`` for ``task``; ``generator`` draws the darkness of low light."""
    size = view.colour.shape[0]
    if task == "segmentation":
        return view.colour, segmentation.render(view.classes)
    if task == "pose":
        return view.colour, pose.render(view.keypoints, size, size)
    if task == "colorization":
        return colorization.grey(view.colour), view.colour
    if task == "normals":
        return view.colour, normals.render(view.normals)
    if task == "edges":
        return view.colour, edges.render(view.edges)
    if task == "depth":
        return view.colour, depth.render(view.depth_m)
    if task == "low_light":
        return low_light.darken(view.colour, generator), view.colour
    raise ValueError(f"no such task: {task}")


def scene_pairs(
    count: int, tasks: Iterable[str] = TASKS, size_px: int = 64, seed: int = 0, splits: dict[str, float] | None = None
) -> Iterator[Pair]:
    """``count`` scenes, a pair for every task each; pairs of one scene follow each other.

    ``splits`` gives each split's share; a scene belongs to one split alone.
    """
    tasks = tuple(tasks)
    shares = splits or SPLITS
    bounds = np.rint(np.cumsum(list(shares.values())) / sum(shares.values()) * count).astype(int)
    start = 0
    for split, stop in zip(shares, bounds, strict=True):
        for index in range(start, stop):
            number = scene_seed(seed, split, index)
            view = render_scene(number, size_px)[0]
            generator = np.random.default_rng([number, 1])
            for task in tasks:
                image, label = labelled(view, task, generator)
                meta = {"source": "scenes", "scene": index, "seed": seed}
                if task == "segmentation":
                    meta["classes"] = ["sky", *CLASSES]
                yield Pair(task, split, Picture(bytes=encode_png(image)), Picture(bytes=encode_png(label)), meta)
        start = stop


# --- geometry ------------------------------------------------------------------------------------------------------


@functools.cache
def _unit_mesh(kind: str) -> tuple[Array, NDArray[np.int64], Array | None]:
    """Vertices, faces and smooth vertex normals of a solid about a metre in size, standing on z = 0."""
    if kind == "box":
        mesh, smooth = trimesh.creation.box((1, 1, 1)), False
    elif kind == "ball":
        mesh, smooth = trimesh.creation.icosphere(subdivisions=3, radius=0.5), True
    elif kind == "cylinder":
        mesh, smooth = trimesh.creation.cylinder(radius=0.5, height=1, sections=32), False
    elif kind == "cone":
        mesh, smooth = trimesh.creation.cone(radius=0.5, height=1, sections=48), False
    elif kind == "ring":
        mesh, smooth = trimesh.creation.torus(major_radius=0.36, minor_radius=0.14), True
    else:
        raise ValueError(f"no such solid: {kind}")
    vertices = np.array(mesh.vertices, np.float64)
    vertices[:, 2] -= vertices[:, 2].min()
    return vertices, np.array(mesh.faces, np.int64), np.array(mesh.vertex_normals, np.float64) if smooth else None


def _unit(vector: Array) -> Array:
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    return np.asarray(vector / np.maximum(length, 1e-12))


def _rotation(axis: Array, angle: float) -> Array:
    x, y, z = _unit(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)


def _texture(rng: np.random.Generator, kind: str) -> tuple[Array, str, float, Array]:
    base = _colour(kind, *rng.uniform(0, 1, 3)) * rng.uniform(0.4, 1.0)
    second = base * rng.uniform(0.3, 0.7) if rng.random() < 0.6 else _colour(kind, *rng.uniform(0, 1, 3))
    pattern = str(rng.choice(["plain", "checks", "stripes", "shade", "spots"], p=[0.4, 0.15, 0.15, 0.2, 0.1]))
    return np.stack([base, second]), pattern, float(rng.uniform(0.7, 1.8)), rng.uniform(0, 6.28, 3)


def _colour(kind: str, turn: float, saturation: float, value: float) -> Array:
    """A linear RGB colour of ``kind``; the others in [0, 1] choose within what the kind allows."""
    hue = (HUES[kind] + 0.07 * (turn - 0.5)) % 1
    return np.array(colorsys.hsv_to_rgb(hue, 0.5 + 0.35 * saturation, 0.55 + 0.4 * value))


def _place(kind: str, scale: Array, rotation: Array, offset: Array, texture: tuple[Array, str, float, Array]) -> _Body:
    vertices, faces, smooth = _unit_mesh(kind)
    moved = (vertices * scale) @ rotation.T + offset
    bent = None if smooth is None else _unit((smooth / scale) @ rotation.T)
    return _Body(kind, moved, faces, bent, *texture)


def _room(rng: np.random.Generator) -> tuple[list[_Body], float | None]:
    """A floor, and mostly a back wall, sometimes a side wall, whose x is the second; elsewhere the sky shows."""
    flat = np.eye(3)
    bodies = [_place("box", np.array([40.0, 40, 0.1]), flat, np.array([0, 0, -0.1]), _texture(rng, "floor"))]
    bodies[0].kind = "floor"
    if rng.random() < 0.8:
        wall = _place(
            "box", np.array([40.0, 0.1, 12]), flat, np.array([0, rng.uniform(1.6, 4.0), 0]), _texture(rng, "wall")
        )
        wall.kind = "wall"
        bodies.append(wall)
    side: float | None = None
    if rng.random() < 0.35:
        side = float(rng.choice([-1, 1]) * rng.uniform(2.2, 3.5))
        wall = _place("box", np.array([0.1, 40.0, 12]), flat, np.array([side, 0, 0]), _texture(rng, "wall"))
        wall.kind = "wall"
        bodies.append(wall)
    return bodies, side


def _solid(rng: np.random.Generator, taken: list[tuple[float, float, float]]) -> _Body | None:
    """A solid on the floor (or floating a little) that does not stand in another, or None where there is no room."""
    kind = str(rng.choice(SOLIDS))
    size = rng.uniform(0.35, 0.95)
    for _ in range(12):
        x, y = rng.uniform(-1.8, 1.8), rng.uniform(-0.9, 1.5)
        if all(np.hypot(x - a, y - b) > size * 0.6 + radius for a, b, radius in taken):
            taken.append((x, y, size * 0.6))
            scale = size * np.array([1, 1, rng.uniform(0.7, 1.5)])
            rotation = _rotation(np.array([0.0, 0, 1]), rng.uniform(0, np.pi))
            if kind == "ring":
                scale = np.full(3, size)
                rotation = rotation @ _rotation(np.array([1.0, 0, 0]), rng.uniform(0, np.pi))
            lift = rng.uniform(0, 0.6) if rng.random() < 0.3 else 0.0
            body = _place(kind, scale, rotation, np.zeros(3), _texture(rng, kind))
            body.vertices += np.array([x, y, lift - body.vertices[:, 2].min()])
            return body
    return None


def _figure(rng: np.random.Generator) -> tuple[Array, list[_Body]]:
    """An articulated figure: its 18 joints [18, 3] in the world (OpenPose order) and its bodies."""
    height = rng.uniform(1.5, 1.9)
    facing = _rotation(np.array([0.0, 0, 1]), rng.normal(0, 0.7))
    lean = (
        facing
        @ _rotation(np.array([1.0, 0, 0]), rng.normal(0, 0.15))
        @ _rotation(np.array([0.0, 1, 0]), rng.normal(0, 0.15))
    )

    def limb(frame: Array, swing: float, spread: float) -> Array:
        """Direction of a hanging limb that swings forward (-y) and spreads sideways (x)."""
        turned = _rotation(np.array([0.0, 1, 0]), -spread) @ _rotation(np.array([1.0, 0, 0]), -swing)
        return np.asarray(frame @ turned @ np.array([0.0, 0, -1]))

    joint = np.zeros((18, 3))
    up, right = lean @ np.array([0.0, 0, 1]), lean @ np.array([-1.0, 0, 0])  # the figure looks along -y
    forward = lean @ np.array([0.0, -1, 0])
    joint[1] = up * 0.30 * height
    head = joint[1] + _unit(up + rng.normal(0, 0.15, 3)) * 0.11 * height
    joint[0] = head + forward * 0.055 * height
    joint[14], joint[15] = joint[0] + (up + right) * 0.022 * height, joint[0] + (up - right) * 0.022 * height
    joint[16], joint[17] = head + right * 0.055 * height, head - right * 0.055 * height
    for side, (shoulder, elbow, wrist, hip, knee, ankle) in (
        (1, (2, 3, 4, 8, 9, 10)),
        (-1, (5, 6, 7, 11, 12, 13)),
    ):
        joint[shoulder] = joint[1] + side * right * 0.115 * height
        upper = limb(lean, rng.uniform(-0.6, 1.8), -side * rng.uniform(0.1, 1.6))
        joint[elbow] = joint[shoulder] + upper * 0.16 * height
        fore = _unit(upper + 0.9 * rng.uniform(0, 1) * (forward + up * rng.uniform(-0.3, 1.0)))
        joint[wrist] = joint[elbow] + fore * 0.15 * height
        joint[hip] = side * right * 0.055 * height
        thigh = limb(facing, rng.uniform(-0.3, 0.8), -side * rng.uniform(0.0, 0.4))
        joint[knee] = joint[hip] + thigh * 0.23 * height
        shin = _unit(thigh - forward * rng.uniform(0, 0.7))
        joint[ankle] = joint[knee] + shin * 0.23 * height
    joint[:, 2] += 0.05 - joint[[10, 13], 2].min()
    head[2] += joint[1, 2] - up[2] * 0.30 * height

    shirt, trousers = _texture(rng, "shirt")[0][0], _texture(rng, "trousers")[0][0] * 0.7
    skin = (np.array([0.75, 0.5, 0.36]) * rng.uniform(0.35, 1.15)).clip(0, 1)
    tones = tuple((np.stack([colour] * 2), "plain", 1.0, np.zeros(3)) for colour in (shirt, trousers, skin))
    bodies = [_ball(head, np.full(3, 0.15 * height), tones[2])]
    pelvis = (joint[8] + joint[11]) / 2
    bodies += [
        _rod(joint[1] - up * 0.02 * height, pelvis, 0.085 * height, tones[0]),
        _rod(joint[2], joint[5], 0.04 * height, tones[0]),
        _rod(joint[8], joint[11], 0.055 * height, tones[1]),
        _rod(joint[1], head, 0.03 * height, tones[2]),
    ]
    for chain, radius, tone in (
        ((2, 3), 0.034, 0), ((3, 4), 0.026, 2), ((5, 6), 0.034, 0), ((6, 7), 0.026, 2),
        ((8, 9), 0.048, 1), ((9, 10), 0.036, 1), ((11, 12), 0.048, 1), ((12, 13), 0.036, 1),
    ):  # fmt: skip
        bodies.append(_rod(joint[chain[0]], joint[chain[1]], radius * height, tones[tone]))
        bodies.append(_ball(joint[chain[1]], np.full(3, 2 * radius * height), tones[tone]))
    for body in bodies:
        body.kind = "person"
    return joint, bodies


def _ball(centre: Array, diameter: Array, texture: tuple[Array, str, float, Array]) -> _Body:
    return _place("ball", diameter, np.eye(3), centre - np.array([0, 0, diameter[2] / 2]), texture)


def _rod(start: Array, end: Array, radius: float, texture: tuple[Array, str, float, Array]) -> _Body:
    """A round-looking stretch between two joints: an ellipsoid-capped cylinder is not needed at these sizes."""
    axis = end - start
    length = float(np.linalg.norm(axis))
    side = np.cross(axis, [0.0, 0, 1]) if abs(axis[2]) < 0.99 * length else np.array([1.0, 0, 0])
    z, x = axis / max(length, 1e-9), _unit(side)
    rotation = np.stack([x, np.cross(z, x), z], axis=1)
    body = _place("cylinder", np.array([2 * radius, 2 * radius, length]), rotation, start, texture)
    radial = body.vertices - start - np.outer((body.vertices - start) @ z, z)
    body.vertex_normals = _unit(radial + 1e-9 * x)
    return body


# --- seeing --------------------------------------------------------------------------------------------------------


class _Camera:
    """A pinhole camera at ``eye`` that looks at ``target``; ``fov`` is the full angle in radians."""

    def __init__(self, eye: Array, target: Array, fov: float, size_px: int):
        self.eye, self.size_px = eye, size_px
        back = _unit(eye - target)
        right = _unit(np.cross([0.0, 0, 1], back))
        self.axes = np.stack([right, np.cross(back, right), back])  # rows: the camera's x, y, z in the world
        self.focal_px = size_px / (2 * np.tan(fov / 2))

    def rays(self, samples: int) -> Array:
        """Unit directions [size * samples, size * samples, 3] through a regular grid in every pixel."""
        grid = (np.arange(self.size_px * samples) + 0.5) / samples - self.size_px / 2
        x, y = np.meshgrid(grid, -grid)
        local = np.stack([x / self.focal_px, y / self.focal_px, -np.ones_like(x)], axis=-1)
        return _unit(local @ self.axes)

    def project(self, points: Array) -> NDArray[np.float32]:
        """World points [n, 3] to [n, 3] of x px, y px and whether they lie inside the picture."""
        local = (points - self.eye) @ self.axes.T
        ahead = np.maximum(-local[:, 2], 1e-6)
        x = self.size_px / 2 + local[:, 0] / ahead * self.focal_px
        y = self.size_px / 2 - local[:, 1] / ahead * self.focal_px
        inside = (local[:, 2] < 0) & (x >= 0) & (x < self.size_px) & (y >= 0) & (y < self.size_px)
        return np.stack([x, y, inside], axis=1).astype(np.float32)


class _Stage:
    """All bodies in one Embree scene, with the light."""

    def __init__(self, bodies: list[_Body], sun: Array, strength: float, ambient: float, tint: Array):
        self.bodies, self.sun, self.strength, self.ambient, self.tint = bodies, sun, strength, ambient, tint
        triangles = [body.vertices[body.faces] for body in bodies]
        self.triangles = np.concatenate(triangles)
        self.face_normals = _unit(
            np.cross(self.triangles[:, 1] - self.triangles[:, 0], self.triangles[:, 2] - self.triangles[:, 0])
        )
        self.corner_normals = np.concatenate(
            [
                body.vertex_normals[body.faces]
                if body.vertex_normals is not None
                else np.repeat(self.face_normals[start : start + len(body.faces), None], 3, axis=1)
                for body, start in zip(bodies, np.cumsum([0] + [len(t) for t in triangles[:-1]]), strict=True)
            ]
        )
        self.body_of = np.repeat(np.arange(len(bodies)), [len(t) for t in triangles])
        self.class_of = np.array([CLASSES.index(body.kind) + 1 for body in bodies], np.uint8)
        self.embree = rtcore_scene.EmbreeScene()
        TriangleMesh(self.embree, self.triangles.astype(np.float32))

    def shoot(self, camera: _Camera, joints: Array) -> View:
        size = camera.size_px
        rays = camera.rays(1).reshape(-1, 3)
        hit, body, _, normal, distance = self._cast(camera.eye, rays)
        along = distance * (rays @ -camera.axes[2])
        depth_m = np.where(hit, along, 0).astype(np.float32).reshape(size, size)
        local = np.where(hit[:, None], normal @ camera.axes.T, 0).astype(np.float32).reshape(size, size, 3)
        classes = np.where(hit, self.class_of[body], 0).astype(np.uint8).reshape(size, size)
        # The figure's many bodies are one object to an edge detector.
        objects = np.where(hit, np.where(self.class_of[body] == CLASSES.index("person") + 1, -2, body), -1).reshape(
            size, size
        )

        fine = camera.rays(2).reshape(-1, 3)
        colour = self._shade(fine, *self._cast(camera.eye, fine))
        colour = colour.reshape(size, 2, size, 2, 3).mean(axis=(1, 3))
        return View(
            colour=np.rint(to_srgb(colour) * 255).astype(np.uint8),
            classes=classes,
            depth_m=depth_m,
            normals=local,
            edges=_edges(objects, local),
            keypoints=camera.project(joints),
        )

    def _cast(self, origin: Array, rays: Array) -> tuple[NDArray[np.bool_], NDArray[np.int64], Array, Array, Array]:
        """First hits of rays from one origin: hit?, body, point, normal towards the eye, distance."""
        origins = np.broadcast_to(origin, rays.shape).astype(np.float32)
        answer = self.embree.run(origins, rays.astype(np.float32), output=True)
        face = answer["primID"].astype(np.int64)
        hit = face >= 0
        face = np.where(hit, face, 0)
        distance = np.where(hit, answer["tfar"], 0).astype(np.float64)
        u, v = answer["u"].astype(np.float64), answer["v"].astype(np.float64)
        weights = np.stack([1 - u - v, u, v], axis=1)[..., None]
        normal = _unit((self.corner_normals[face] * weights).sum(axis=1))
        normal *= np.where((normal * rays).sum(axis=1, keepdims=True) > 0, -1.0, 1.0)
        return hit, self.body_of[face], origin + rays * distance[:, None], normal, distance

    def _shade(
        self, rays: Array, hit: NDArray[np.bool_], body: NDArray[np.int64], points: Array, normal: Array, _: Array
    ) -> Array:
        """Lambert and a little gloss under a sun with hard shadows and a sky; linear RGB [n, 3]."""
        albedo = np.zeros_like(points)
        for index in np.unique(body[hit]):
            mask = hit & (body == index)
            albedo[mask] = _paint(self.bodies[index], points[mask])
        start = (points + normal * 2e-3).astype(np.float32)
        toward = np.broadcast_to(self.sun, points.shape).astype(np.float32)
        lit = self.embree.run(start, np.ascontiguousarray(toward), query="OCCLUDED") != 0
        facing = np.clip(normal @ self.sun, 0, 1) * lit
        gloss = np.clip(_unit(self.sun - rays) * normal, -1, 1).sum(axis=1).clip(0, 1) ** 40 * lit * 0.25
        sky = self.ambient * (0.7 + 0.3 * normal[:, 2])
        shaded = albedo * (self.strength * facing[:, None] * self.tint + sky[:, None]) + gloss[:, None]
        heaven = np.array([0.35, 0.55, 0.85]) + np.clip(0.5 - rays[:, 2:], 0, 1) * np.array([0.45, 0.35, 0.1])
        return np.where(hit[:, None], shaded, heaven)


def _paint(body: _Body, points: Array) -> Array:
    """The texture of ``body`` at world ``points`` [n, 3]: a mix of its two colours."""
    p = points * body.frequency + body.phase
    if body.pattern == "checks":
        mix = (np.floor(p).sum(axis=1) % 2).astype(np.float64)
    elif body.pattern == "stripes":
        mix = (np.sin(2 * np.pi * (p @ np.array([0.6, 0.6, 0.53]))) > 0).astype(np.float64)
    elif body.pattern == "shade":
        mix = 0.5 + 0.5 * np.sin(p[:, 0] + 0.7 * np.sin(p[:, 1])) * np.cos(p[:, 2])
    elif body.pattern == "spots":
        mix = (np.linalg.norm(p - np.rint(p), axis=1) < 0.33).astype(np.float64)
    else:
        mix = np.zeros(len(p))
    return np.asarray(body.colours[0] * (1 - mix[:, None]) + body.colours[1] * mix[:, None])


def _edges(objects: NDArray[np.int64], local: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a pixel and its right or lower neighbour are other objects, or meet in a crease of 35 degrees and more."""
    found = np.zeros(objects.shape, bool)
    for axis in (0, 1):
        first = (slice(None, -1), slice(None))[:: 1 if axis == 0 else -1]
        second = (slice(1, None), slice(None))[:: 1 if axis == 0 else -1]
        crease = (local[first] * local[second]).sum(axis=2) < np.cos(np.deg2rad(35))
        # Inside the figure, limbs that cross are no edges of the scene's objects.
        solid = (objects[first] >= 0) & (objects[second] >= 0)
        found[first] |= (objects[first] != objects[second]) | (crease & solid)
    return found
