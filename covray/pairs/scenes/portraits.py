"""Portraits: one solid or two in free colour, texture, background, style and arrangement, on the stage of the scenes.

World axes are right-handed, z up, metres.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import trimesh
from numpy.typing import NDArray

from covray.io.images import encode_png
from covray.pairs.manifest import Pair, Picture
from covray.pairs.scenes.geometry import Array, Body, Texture, unit
from covray.pairs.scenes.pairs import SPLITS
from covray.pairs.scenes.portrait_values import (
    ARRANGEMENTS,
    BACKGROUNDS,
    BESIDE,
    COLOURS,
    OBJECTS,
    STYLES,
    TEXTURES,
    held_out,
    hidden_themes,
    portrait_seed,
)  # fmt: skip
from covray.pairs.scenes.portrait_words import portrait_words
from covray.pairs.scenes.render import Camera, Stage, View
from covray.pairs.scenes.styles import styled
from covray.pairs.words import CAPTION_TASK

HELD_OUT_SPLIT = "test"
"""The split whose pictures all show a held-out cell; those of the others show none."""

SUBJECT_CLASSES = (3, 4)
"""Numbers of the two solids in ``View.classes``; props are 6, the floor is 2, the sky is 0."""

_KINDS = ("box", "ball")  # the classes of scenes that carry these numbers
_PROP = "cylinder"
_FLOORS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float], str]] = {
    "meadow": ((0.10, 0.32, 0.03), (0.16, 0.42, 0.05), "shade"),
    "desert": ((0.72, 0.45, 0.16), (0.60, 0.36, 0.12), "waves"),
    "snow": ((0.88, 0.91, 0.96), (0.80, 0.84, 0.92), "shade"),
    "sea": ((0.02, 0.17, 0.38), (0.06, 0.32, 0.50), "waves"),
    "night": ((0.03, 0.04, 0.10), (0.05, 0.06, 0.13), "shade"),
    "sunset": ((0.20, 0.09, 0.12), (0.26, 0.11, 0.12), "shade"),
    "space": ((0.22, 0.22, 0.23), (0.11, 0.11, 0.12), "craters"),
    "volcano": ((0.06, 0.04, 0.04), (0.95, 0.16, 0.01), "cracks"),
    "room": ((0.34, 0.17, 0.07), (0.22, 0.10, 0.04), "planks"),
    "studio": ((0.50, 0.40, 0.68), (0.50, 0.40, 0.68), "plain"),
}
_SKIES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "meadow": ((0.55, 0.75, 0.95), (0.16, 0.38, 0.85)), "desert": ((0.92, 0.78, 0.52), (0.62, 0.66, 0.62)),
    "snow": ((0.75, 0.82, 0.90), (0.50, 0.62, 0.78)), "sea": ((0.65, 0.85, 0.92), (0.25, 0.58, 0.88)),
    "night": ((0.02, 0.03, 0.10), (0.005, 0.008, 0.04)), "sunset": ((0.98, 0.38, 0.08), (0.30, 0.10, 0.32)),
    "space": ((0.0, 0.0, 0.005), (0.0, 0.0, 0.005)), "volcano": ((0.42, 0.07, 0.03), (0.06, 0.03, 0.03)),
    "room": ((0.75, 0.66, 0.50), (0.70, 0.61, 0.46)), "studio": ((0.58, 0.48, 0.76), (0.68, 0.60, 0.84)),
}  # fmt: skip


@dataclass(frozen=True)
class Solid:
    """What is known of one solid."""

    thing: str
    colour: str
    texture: str


@dataclass(frozen=True)
class Portrait:
    """What a portrait shows; two solids are listed from left to right."""

    solids: tuple[Solid, ...]
    background: str
    style: str
    arrangement: str

    @property
    def count(self) -> int:
        """How many solids are seen."""
        return {"tower": 2, "row": 3, BESIDE: 2}.get(self.arrangement, 1)

    def held_out_themes(self, visible: bool = False) -> set[str]:
        """Return the themes with a held-out cell; with ``visible`` only those that the style does not hide."""
        themes = set()
        for solid in self.solids:
            values = {"colour": solid.colour, "texture": solid.texture, "background": self.background,
                      "style": self.style, "arrangement": self.arrangement}  # fmt: skip
            for theme, value in values.items():
                if held_out(theme, value, solid.thing):
                    themes.add(theme)
        return themes - hidden_themes(self.style) if visible else themes


def sample_portrait(rng: np.random.Generator, unseen: bool = False) -> Portrait:
    """Return a portrait without any held-out cell, or with ``unseen`` one that visibly shows at least one."""
    # Drawn before any portrait is rejected, so that held-out cells change neither how many pictures show two solids nor
    # how often these have the same colour or kind.
    shared: str | None = None
    if rng.random() < 0.25:
        shared = str(rng.choice(["colour", "thing", "neither"], p=[0.47, 0.47, 0.06]))
    while True:
        portrait = _any_portrait(rng, shared)
        # A test picture must show a held-out cell; of training ones a hidden cell is kept out, too.
        fits = bool(portrait.held_out_themes(visible=True)) if unseen else not portrait.held_out_themes()
        if fits:
            return portrait


def _any_portrait(rng: np.random.Generator, shared: str | None) -> Portrait:
    """Return a portrait of one solid, or of two that share their colour, their kind (thing) or neither."""

    def pick(values: dict[str, object]) -> str:
        return str(rng.choice(list(values)))

    background = pick(dict(BACKGROUNDS))
    style = "photo" if rng.random() < 0.4 else pick(dict(STYLES))
    first = Solid(pick(dict(OBJECTS)), pick(dict(COLOURS)), pick(dict(TEXTURES)))
    if shared is None:
        return Portrait((first,), background, style, pick(dict(ARRANGEMENTS)))
    colour, thing = first.colour, first.thing
    while shared != "colour" and colour == first.colour:
        colour = pick(dict(COLOURS))
    while shared != "thing" and thing == first.thing:
        thing = pick(dict(OBJECTS))
    texture = first.texture if rng.random() < 0.5 else pick(dict(TEXTURES))
    return Portrait((first, Solid(thing, colour, texture)), background, style, BESIDE)


def render_portrait(portrait: Portrait, rng: np.random.Generator, size_px: int = 64) -> tuple[NDArray[np.uint8], View]:
    """Return the picture [size_px, size_px, 3] in the portrait's style, and the exact view that it was made of.

    ``rng`` draws the sun, the camera and the turn of the solids.
    """
    azimuth, elevation = rng.uniform(-0.3, 0.3), rng.uniform(0.13, 0.22)
    away = np.array([np.sin(azimuth) * np.cos(elevation), -np.cos(azimuth) * np.cos(elevation), np.sin(elevation)])
    target = np.array([0.0, 0.0, 0.64])
    camera = Camera(target + 2.9 * away, target, 0.7, size_px)
    right, ahead = camera.axes[0], -unit(away * [1, 1, 0])
    floor = Texture(
        np.array(_FLOORS[portrait.background][:2]), _FLOORS[portrait.background][2], 1.0, rng.uniform(0, 5, 3)
    )
    bodies = [_body("floor", trimesh.creation.box((60, 60, 0.1)), np.array([0, 0, -0.05]), floor)]
    if len(portrait.solids) == 2:
        for kind, solid, side in zip(_KINDS, portrait.solids, (-0.52, 0.52), strict=True):
            bodies.append(_placed(kind, solid, side * right, 0.76, rng))
    else:
        bodies += _arranged(portrait, right, ahead, rng)
    sun = unit(np.array([rng.uniform(-0.9, 0.9), rng.uniform(-1.1, -0.6), rng.uniform(0.8, 1.3)]))
    tint = np.array([1.0, 0.72, 0.5]) if portrait.background == "sunset" else np.array([1.0, 0.97, 0.93])
    stage = _PortraitStage(bodies, sun, 0.75, 0.36, tint)
    stage.background, stage.ahead = portrait.background, ahead
    view = stage.view(camera, np.zeros((18, 3)))
    return styled(view, portrait.style), view


def _arranged(portrait: Portrait, right: Array, ahead: Array, rng: np.random.Generator) -> list[Body]:
    """The single solid, or its copies, with what belongs to its arrangement."""
    (solid,), way = portrait.solids, portrait.arrangement
    up = np.array([0.0, 0, 1])
    if way == "tower":
        return [_placed(_KINDS[0], solid, up * height, 0.62, rng) for height in (0.0, 0.62)]
    if way == "row":
        return [_placed(_KINDS[0], solid, right * side, 0.56, rng) for side in (-0.68, 0.0, 0.68)]
    if way == "far":
        return [_placed(_KINDS[0], solid, ahead * 3.2, 0.85, rng)]
    offset = {"floating": 0.5 * up, "pedestal": 0.42 * up, "sunk": -0.47 * up, "hanging": 0.3 * up}.get(way, 0 * up)
    size = 0.85 if way in ("pedestal", "floating", "hanging", "arch") else 1.0
    bodies = [_placed(_KINDS[0], solid, offset, size, rng)]
    turn = np.stack([right, ahead, up], axis=1)
    wood = _plain((0.30, 0.20, 0.12))
    stone = _plain((0.38, 0.38, 0.40))
    if way == "pedestal":
        bodies.append(_body(_PROP, trimesh.creation.box((0.95, 0.95, 0.42)), up * 0.21, stone, turn))
    elif way == "hanging":
        rope = trimesh.creation.cylinder(radius=0.035, height=2.0, sections=12)
        bodies.append(_body(_PROP, rope, up * (0.3 + size * 0.94 + 1.0), wood))
    elif way == "arch":
        for side in (-0.82, 0.82):
            bodies.append(_body(_PROP, trimesh.creation.box((0.16, 0.3, 1.15)), right * side + up * 0.575, stone, turn))
        bodies.append(_body(_PROP, trimesh.creation.box((1.8, 0.3, 0.16)), up * 1.23, stone, turn))
    elif way == "fence":
        for height in (0.18, 0.5):
            rail = trimesh.creation.box((3.4, 0.03, 0.05))
            bodies.append(_body(_PROP, rail, up * height - ahead * 0.78, wood, turn))
        for side in np.linspace(-1.4, 1.4, 9):
            post = trimesh.creation.box((0.06, 0.03, 0.66))
            bodies.append(_body(_PROP, post, right * side + up * 0.33 - ahead * 0.8, wood, turn))
    return bodies


def _plain(colour: tuple[float, float, float]) -> Texture:
    return Texture(np.array([colour, colour]), "plain", 1.0, np.zeros(3))


def _placed(kind: str, solid: Solid, offset: Array, size: float, rng: np.random.Generator) -> Body:
    """Return ``solid`` about ``size`` metres large, its base at ``offset``, turned about the vertical a little."""
    turn = trimesh.transformations.rotation_matrix(rng.uniform(-0.45, 0.45), [0, 0, 1])[:3, :3]
    first = np.array(COLOURS[solid.colour])
    second = np.full(3, 0.34) if solid.colour == "black" else first * 0.16
    # The pattern lies on the solid: its phase moves the solid's own origin to that of the world.
    frequency = 3.2 / size
    texture = Texture(np.stack([first, second]), solid.texture, frequency, -offset * frequency)
    mesh = _mesh(solid.thing)
    return _body(kind, mesh, offset, texture, turn * size)


def _body(kind: str, mesh: trimesh.Trimesh, offset: Array, texture: Texture, axes: Array | None = None) -> Body:
    vertices = np.array(mesh.vertices, np.float64)
    turned = vertices if axes is None else vertices @ axes.T
    normals = None
    if mesh.metadata.get("smooth"):
        normals = np.array(mesh.vertex_normals, np.float64)
        normals = unit(normals if axes is None else normals @ axes.T)
    return Body(kind, turned + offset, np.array(mesh.faces, np.int64), normals, texture)


@functools.cache
def _mesh(thing: str) -> trimesh.Trimesh:
    """Return an object about a metre large that stands on z = 0."""
    create = trimesh.creation
    smooth = thing in ("ball", "ring", "snowman")
    if thing == "box":
        parts = [create.box((0.86, 0.86, 0.86))]
    elif thing == "ball":
        parts = [create.icosphere(subdivisions=3, radius=0.5)]
    elif thing == "cylinder":
        parts = [create.cylinder(radius=0.4, height=0.95, sections=40)]
    elif thing == "cone":
        parts = [create.cone(radius=0.5, height=1.05, sections=48)]
    elif thing == "ring":
        parts = [create.torus(major_radius=0.37, minor_radius=0.13)]
        parts[0].apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))
    elif thing == "pyramid":
        # trimesh has no pyramid; a cone of four sections is one.
        parts = [create.cone(radius=0.66, height=1.0, sections=4)]
        parts[0].apply_transform(trimesh.transformations.rotation_matrix(np.pi / 4 + 0.35, [0, 0, 1]))
    elif thing == "cross":
        parts = [_block((0.3, 0.3, 1.0), (0, 0, 0.5)), _block((1.0, 0.3, 0.3), (0, 0, 0.5))]
    elif thing == "table":
        parts = [_block((1.05, 0.75, 0.14), (0, 0, 0.73))]
        for x in (-0.43, 0.43):
            parts += [_block((0.13, 0.13, 0.68), (x, y, 0.34)) for y in (-0.28, 0.28)]
    elif thing == "snowman":
        parts = []
        for radius, height in ((0.34, 0.32), (0.24, 0.75), (0.16, 1.06)):
            ball = create.icosphere(subdivisions=3, radius=radius)
            ball.apply_translation((0, 0, height))
            parts.append(ball)
    elif thing == "staircase":
        parts = [_block((0.32, 0.8, 0.3 * step), (0.32 * (step - 2), 0, 0.15 * step)) for step in (1, 2, 3)]
    else:
        raise ValueError(f"no such object: {thing}")
    mesh = trimesh.util.concatenate(parts)
    mesh.apply_translation((0, 0, -mesh.bounds[0, 2]))
    mesh.metadata["smooth"] = smooth
    return mesh


def _block(extents: tuple[float, float, float], centre: tuple[float, float, float]) -> trimesh.Trimesh:
    mesh = trimesh.creation.box(extents)
    mesh.apply_translation(centre)
    return mesh


class _PortraitStage(Stage):
    """The stage with the backgrounds and patterns of portraits."""

    background = "meadow"
    ahead: Array = np.array([0.0, 1, 0])

    def sky(self, rays: Array) -> Array:
        low, high = (np.array(colour) for colour in _SKIES[self.background])
        mix = np.clip(rays[:, 2:] * 3 + 0.3, 0, 1)
        colours = np.asarray(low * (1 - mix) + high * mix)
        right = np.cross(self.ahead, [0.0, 0, 1])
        if self.background == "night":
            moon = unit(self.ahead + 0.17 * right + np.array([0, 0, 0.02]))
            colours[rays @ moon > np.cos(0.05)] = (0.9, 0.9, 0.75)
        elif self.background == "sunset":
            colours[rays @ unit(self.ahead - 0.16 * right - np.array([0, 0, 0.01])) > np.cos(0.075)] = (1.0, 0.85, 0.3)
        elif self.background == "space":
            cell = np.floor(np.stack([rays @ right, rays[:, 2]], axis=1) * 45)
            # The fraction of a large sine, shaders' usual hash: a star is where it is whatever the camera sees besides.
            lottery = np.sin(cell @ np.array([12.9898, 78.233])) * 43758.5453
            colours[(lottery - np.floor(lottery)) > 0.94] = 0.85
        return colours

    def paint(self, texture: Texture, points: Array) -> Array:
        mix = _mix(texture.pattern, points * texture.frequency + texture.phase)[:, None]
        return np.asarray(texture.colours[0] * (1 - mix) + texture.colours[1] * mix)


def _mix(pattern: str, p: Array) -> Array:
    """Return the share [n] of a texture's second colour at ``p`` [n, 3], in repetitions: about three fit on a solid."""
    x, y, z = p.T
    around = x + y  # neither face of a box is left without the pattern
    if pattern == "plain":
        mix = np.zeros(len(p))
    elif pattern == "checks":
        mix = np.floor(p + 1e-3).sum(axis=1) % 2
    elif pattern == "stripes":
        mix = around % 1 > 0.5
    elif pattern == "bands":
        mix = z % 1 > 0.5
    elif pattern == "spots":
        q = np.stack([around, z], axis=1) * 0.95
        mix = np.linalg.norm(q - np.rint(q), axis=1) < 0.33
    elif pattern == "bricks":
        row = np.floor(z * 1.3)
        mix = ((z * 1.3) % 1 < 0.22) | ((around * 0.75 + 0.5 * (row % 2)) % 1 < 0.16)
    elif pattern == "grid":
        mix = (np.abs(around % 1 - 0.5) < 0.12) | (np.abs(z % 1 - 0.5) < 0.12)
    elif pattern == "zigzag":
        mix = (z + np.abs(around % 1 - 0.5) * 1.4) % 1 > 0.5
    elif pattern == "shade":
        mix = np.clip(1.45 - z / 2, 0, 1)
    elif pattern == "halves":
        mix = x > 0
    elif pattern == "waves":
        mix = 0.5 + 0.5 * np.sin(9 * y + 1.2 * np.sin(2.5 * x))
    elif pattern == "planks":
        mix = np.abs((x * 2.2) % 1 - 0.5) < 0.07
    elif pattern == "craters":
        q = p[:, :2] * 1.3
        mix = np.linalg.norm(q - np.rint(q), axis=1) < 0.3
    elif pattern == "cracks":
        mix = np.abs(np.sin(3 * x + np.sin(2.3 * y)) * np.cos(2.6 * y + np.sin(1.9 * x))) < 0.09
    else:
        mix = 0.5 + 0.5 * np.sin(2 * x + 0.7 * np.sin(2 * y)) * np.cos(2 * y)
    return np.asarray(mix, np.float64)


def portrait_pairs(
    count: int, size_px: int = 64, seed: int = 0, splits: dict[str, float] | None = None
) -> Iterator[Pair]:
    """Yield ``count`` portraits with their words.

    Args:
        count: portraits.
        size_px: side of the pictures.
        seed: of the whole set.
        splits: each split's share, ``SPLITS`` by default. All pictures of ``test`` show a held-out cell; no picture of
            another split has one.
    """
    shares = splits or SPLITS
    bounds = np.rint(np.cumsum(list(shares.values())) / sum(shares.values()) * count).astype(int)
    start = 0
    for split, stop in zip(shares, bounds, strict=True):
        for index in range(start, stop):
            rng = np.random.default_rng(portrait_seed(seed, split, index))
            portrait = sample_portrait(rng, split == HELD_OUT_SPLIT)
            picture, _ = render_portrait(portrait, rng, size_px)
            words = portrait_words(portrait, rng)
            meta = {"source": "portraits", "portrait": index, "seed": seed}
            unseen = sorted(portrait.held_out_themes(visible=True))
            if unseen:
                meta["held_out"] = unseen
            yield Pair(CAPTION_TASK, split, Picture(bytes=encode_png(picture)), Picture(), meta, words)
        start = stop
