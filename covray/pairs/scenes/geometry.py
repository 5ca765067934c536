"""What stands in a scene: a room, a few solids and an articulated figure, all drawn from one generator.

World axes are right-handed, z up, metres.
"""

from __future__ import annotations

import colorsys
import functools
from dataclasses import dataclass

import numpy as np
import trimesh
from numpy.typing import NDArray

CLASSES = ("wall", "floor", "box", "ball", "person", "cylinder", "cone", "ring")
"""Segmentation classes of scenes; index + 1 is the class drawn, 0 is the sky."""
SOLIDS = ("box", "ball", "cylinder", "cone", "ring")
HUES = {
    "wall": 0.08, "floor": 0.3, "box": 0.74, "ball": 0.0, "cylinder": 0.6, "cone": 0.15, "ring": 0.48,
    "shirt": 0.92, "trousers": 0.64,
}  # fmt: skip
"""Things have their colours, as in the world: the hue, as a share of the circle from red through green and blue, about
which those of a kind vary. Were they any colour, colorization could only be guessed."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Texture:
    """Two colours and how they alternate over a surface."""

    colours: Array
    """Linear RGB [2, 3]."""
    pattern: str
    """plain, checks, stripes, shade or spots."""
    frequency: float
    """Repetitions a metre."""
    phase: Array
    """Offset [3] along the world's axes, in repetitions."""


@dataclass
class Body:
    """One solid: triangles in the world, smooth normals or flat ones, a class and a texture."""

    kind: str
    vertices: Array
    """[v, 3]"""
    faces: NDArray[np.int64]
    """Indices of vertices [f, 3]."""
    vertex_normals: Array | None
    """[v, 3]; None for flat faces."""
    texture: Texture


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


def unit(vector: Array) -> Array:
    """Return vectors [..., 3] divided by their lengths."""
    length = np.linalg.norm(vector, axis=-1, keepdims=True)
    return np.asarray(vector / np.maximum(length, 1e-12))


def _rotation(axis: Array, angle: float) -> Array:
    x, y, z = unit(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.asarray(np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)


def _sample_texture(rng: np.random.Generator, kind: str) -> Texture:
    base = _colour(kind, *rng.uniform(0, 1, 3)) * rng.uniform(0.4, 1.0)
    second = base * rng.uniform(0.3, 0.7) if rng.random() < 0.6 else _colour(kind, *rng.uniform(0, 1, 3))
    pattern = str(rng.choice(["plain", "checks", "stripes", "shade", "spots"], p=[0.4, 0.15, 0.15, 0.2, 0.1]))
    return Texture(np.stack([base, second]), pattern, float(rng.uniform(0.7, 1.8)), rng.uniform(0, 6.28, 3))


def _colour(kind: str, turn: float, saturation: float, value: float) -> Array:
    """A linear RGB colour of ``kind``; the others in [0, 1] choose within what the kind allows."""
    hue = (HUES[kind] + 0.07 * (turn - 0.5)) % 1
    return np.array(colorsys.hsv_to_rgb(hue, 0.5 + 0.35 * saturation, 0.55 + 0.4 * value))


def _placed(kind: str, scale: Array, rotation: Array, offset: Array, texture: Texture) -> Body:
    """A solid in the world.

    Args:
        kind: one of ``SOLIDS``, which becomes its class too.
        scale: metres [3] along its own axes.
        rotation: matrix [3, 3] from its own axes to the world's.
        offset: where its own origin lies [3].
        texture: its colours.
    """
    vertices, faces, smooth = _unit_mesh(kind)
    moved = (vertices * scale) @ rotation.T + offset
    # A normal is scaled by the inverse: where a surface is stretched, it leans away from that axis.
    turned_normals = None if smooth is None else unit((smooth / scale) @ rotation.T)
    return Body(kind, moved, faces, turned_normals, texture)


def sample_room(rng: np.random.Generator) -> tuple[list[Body], float | None]:
    """Return a floor, mostly a back wall and sometimes a side wall, and the side wall's x or None.

    Where there is no wall the sky shows.
    """
    flat = np.eye(3)
    bodies = [_placed("box", np.array([40.0, 40, 0.1]), flat, np.array([0, 0, -0.1]), _sample_texture(rng, "floor"))]
    bodies[0].kind = "floor"
    if rng.random() < 0.8:
        wall = _placed(
            "box",
            np.array([40.0, 0.1, 12]),
            flat,
            np.array([0, rng.uniform(1.6, 4.0), 0]),
            _sample_texture(rng, "wall"),
        )
        wall.kind = "wall"
        bodies.append(wall)
    side: float | None = None
    if rng.random() < 0.35:
        side = float(rng.choice([-1, 1]) * rng.uniform(2.2, 3.5))
        wall = _placed("box", np.array([0.1, 40.0, 12]), flat, np.array([side, 0, 0]), _sample_texture(rng, "wall"))
        wall.kind = "wall"
        bodies.append(wall)
    return bodies, side


def sample_solid(rng: np.random.Generator, taken: list[tuple[float, float, float]]) -> Body | None:
    """Return a solid on the floor, or floating a little, that stands in no other; None where no place is free.

    ``taken`` lists x, y and radius of what stands already, in metres; the solid is added to it.
    """
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
            body = _placed(kind, scale, rotation, np.zeros(3), _sample_texture(rng, kind))
            body.vertices += np.array([x, y, lift - body.vertices[:, 2].min()])
            return body
    return None


def sample_figure(rng: np.random.Generator) -> tuple[Array, list[Body]]:
    """Return the 18 joints [18, 3] of an articulated figure (OpenPose's order) and its bodies."""
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
    head = joint[1] + unit(up + rng.normal(0, 0.15, 3)) * 0.11 * height
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
        fore = unit(upper + 0.9 * rng.uniform(0, 1) * (forward + up * rng.uniform(-0.3, 1.0)))
        joint[wrist] = joint[elbow] + fore * 0.15 * height
        joint[hip] = side * right * 0.055 * height
        thigh = limb(facing, rng.uniform(-0.3, 0.8), -side * rng.uniform(0.0, 0.4))
        joint[knee] = joint[hip] + thigh * 0.23 * height
        shin = unit(thigh - forward * rng.uniform(0, 0.7))
        joint[ankle] = joint[knee] + shin * 0.23 * height
    # Set down with the lower ankle 5 cm above the floor; the head, which is no joint, goes with it.
    joint[:, 2] += 0.05 - joint[[10, 13], 2].min()
    head[2] += joint[1, 2] - up[2] * 0.30 * height

    return joint, _figure_bodies(rng, joint, head, up, height)


def _figure_bodies(rng: np.random.Generator, joint: Array, head: Array, up: Array, height: float) -> list[Body]:
    """The rods and balls of a figure.

    Args:
        rng: draws the colours.
        joint: OpenPose's 18 joints [18, 3].
        head: the middle of the head [3].
        up: the direction [3] from the hips to the neck.
        height: metres.
    """
    shirt = _plain(_sample_texture(rng, "shirt").colours[0])
    trousers = _plain(_sample_texture(rng, "trousers").colours[0] * 0.7)
    skin = _plain((np.array([0.75, 0.5, 0.36]) * rng.uniform(0.35, 1.15)).clip(0, 1))
    bodies = [_ball(head, np.full(3, 0.15 * height), skin)]
    pelvis = (joint[8] + joint[11]) / 2
    bodies += [
        _rod(joint[1] - up * 0.02 * height, pelvis, 0.085 * height, shirt),
        _rod(joint[2], joint[5], 0.04 * height, shirt),
        _rod(joint[8], joint[11], 0.055 * height, trousers),
        _rod(joint[1], head, 0.03 * height, skin),
    ]
    for start, end, radius, texture in (
        (2, 3, 0.034, shirt), (3, 4, 0.026, skin), (5, 6, 0.034, shirt), (6, 7, 0.026, skin),
        (8, 9, 0.048, trousers), (9, 10, 0.036, trousers), (11, 12, 0.048, trousers), (12, 13, 0.036, trousers),
    ):  # fmt: skip
        bodies.append(_rod(joint[start], joint[end], radius * height, texture))
        bodies.append(_ball(joint[end], np.full(3, 2 * radius * height), texture))
    for body in bodies:
        body.kind = "person"
    return bodies


def _plain(colour: Array) -> Texture:
    """Return a texture of one colour, linear RGB [3], which has no pattern to repeat."""
    return Texture(np.stack([colour] * 2), "plain", 1.0, np.zeros(3))


def _ball(centre: Array, diameter: Array, texture: Texture) -> Body:
    return _placed("ball", diameter, np.eye(3), centre - np.array([0, 0, diameter[2] / 2]), texture)


def _rod(start: Array, end: Array, radius: float, texture: Texture) -> Body:
    """A round-looking stretch between two joints; at these sizes its ends need no caps."""
    axis = end - start
    length = float(np.linalg.norm(axis))
    # An axis that is nearly upright has no cross product with the vertical.
    side = np.cross(axis, [0.0, 0, 1]) if abs(axis[2]) < 0.99 * length else np.array([1.0, 0, 0])
    z, x = axis / max(length, 1e-9), unit(side)
    rotation = np.stack([x, np.cross(z, x), z], axis=1)
    body = _placed("cylinder", np.array([2 * radius, 2 * radius, length]), rotation, start, texture)
    radial = body.vertices - start - np.outer((body.vertices - start) @ z, z)
    # In the middle of an end no direction is outward, and a zero vector has none.
    body.vertex_normals = unit(radial + 1e-9 * x)
    return body
