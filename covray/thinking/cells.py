"""Portraits of a theme's cells: what an episode shows, and what it asks for.

A demonstration shows its cell, and anything else beside it that does not hide it. What is asked for has the plainest of
everything else, so that one caption is the answer. No portrait has a held-out cell but its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from covray.pairs.scenes.portrait_values import THEMES, held_out, hidden_themes
from covray.pairs.scenes.portrait_words import portrait_words
from covray.pairs.scenes.portraits import Portrait, Solid, render_portrait
from covray.seeds import seed_of
from covray.thinking.episodes import Cell, Episode, Theme

_PLAINEST = {"texture": "plain", "background": "studio", "style": "photo", "arrangement": "standing"}
"""Of themes; the plainest colour is the first."""


def is_held_out(theme: Theme, cell: Cell) -> bool:
    """Return whether a cell of the portraits' themes is held out from all training."""
    return held_out(theme.name, cell.detail, cell.object)


def has_held_out(episode: Episode) -> bool:
    """Return whether an episode shows or asks for a held-out cell."""
    return any(is_held_out(episode.task.theme, cell) for cell in (*episode.demonstrations, episode.answer))


def plain_portrait(theme: Theme, cell: Cell) -> Portrait:
    """Return the portrait of a cell, plain in everything else."""
    chosen = {}
    for name in THEMES:
        choices = _choices(theme, cell, name)
        # The plainest value may be held out with this object.
        plainest = _PLAINEST.get(name, choices[0])
        chosen[name] = plainest if plainest in choices else choices[0]
    return _portrait(cell, chosen)


def varied_portrait(theme: Theme, cell: Cell, numbers: np.random.Generator) -> Portrait:
    """Return a portrait of a cell; ``numbers`` draws everything else."""
    chosen = {}
    for name in THEMES:
        choices = _choices(theme, cell, name)
        chosen[name] = choices[int(numbers.integers(len(choices)))]
    return _portrait(cell, chosen)


def demonstration_pictures(episode: Episode, seed: int) -> list[NDArray[np.uint8]]:
    """Return the pictures that an episode shows, uint8 [64, 64, 3] each; they follow from it and the seed."""
    pictures = []
    for place, cell in enumerate(episode.demonstrations):
        numbers = np.random.default_rng(_seed("demonstration", episode, seed, place))
        portrait = varied_portrait(episode.task.theme, cell, numbers)
        pictures.append(render_portrait(portrait, numbers)[0])
    return pictures


def answer_picture(episode: Episode, seed: int) -> NDArray[np.uint8]:
    """Return a render of what an episode asks for, uint8 [64, 64, 3]."""
    numbers = np.random.default_rng(_seed("answer", episode, seed, len(episode.demonstrations)))
    return render_portrait(plain_portrait(episode.task.theme, episode.answer), numbers)[0]


def answer_caption(episode: Episode, numbers: np.random.Generator) -> str:
    """Return a caption of what an episode asks for, worded by ``numbers``."""
    return portrait_words(plain_portrait(episode.task.theme, episode.answer), numbers).caption


def _choices(theme: Theme, cell: Cell, name: str) -> list[str]:
    """Return what the theme ``name`` may be where ``cell`` is shown and is to be seen."""
    if name == theme.name:
        return [cell.detail]
    choices = []
    for value in THEMES[name]:
        # Some styles draw without colour or texture: such a portrait would not show what it is asked to show.
        hides = name == "style" and theme.name in hidden_themes(value)
        if not hides and not held_out(name, value, cell.object):
            choices.append(value)
    return choices


def _portrait(cell: Cell, values: dict[str, str]) -> Portrait:
    solid = Solid(cell.object, values["colour"], values["texture"])
    return Portrait((solid,), values["background"], values["style"], values["arrangement"])


def _seed(purpose: str, episode: Episode, seed: int, place: int) -> int:
    # All that tells an episode from others, so that none shares its pictures.
    return seed_of(purpose, seed, episode.task.name, len(episode.demonstrations), episode.number, place)
