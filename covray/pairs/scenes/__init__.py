"""Rendered scenes with exact labels for all seven tasks.

A scene is a room with a few solids, an articulated figure, a sun and a camera, all drawn from one seed.
"""

from covray.pairs.scenes.geometry import CLASSES, HUES, SOLIDS
from covray.pairs.scenes.pairs import SPLITS, labelled, scene_pairs, scene_seed
from covray.pairs.scenes.render import View, render_scene

__all__ = [
    "CLASSES", "HUES", "SOLIDS", "SPLITS", "View", "labelled", "render_scene", "scene_pairs", "scene_seed",
]  # fmt: skip
