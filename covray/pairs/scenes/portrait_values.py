"""What a portrait may be made of: ten values of each theme, with their words.

The word of a value is its answer to a question; the other phrase says the same without that word, for second sentences.
"""

from __future__ import annotations

from dataclasses import dataclass

from covray.seeds import seed_of

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.72, 0.02, 0.02), "orange": (0.95, 0.24, 0.01), "yellow": (0.9, 0.7, 0.03), "green": (0.03, 0.36, 0.04),
    "cyan": (0.03, 0.62, 0.62), "blue": (0.02, 0.06, 0.68), "purple": (0.24, 0.03, 0.5), "pink": (0.95, 0.25, 0.45),
    "white": (0.92, 0.92, 0.92), "black": (0.025, 0.025, 0.025),
}  # fmt: skip
"""Linear RGB."""

OBJECTS = {
    "box": "cube", "ball": "sphere", "cylinder": "drum", "cone": "round spike", "ring": "hoop",
    "pyramid": "four-sided spike", "cross": "plus sign", "table": "desk", "snowman": "stack of round lumps",
    "staircase": "flight of steps",
}  # fmt: skip
OTHER_COLOURS = {
    "red": "scarlet", "orange": "tangerine", "yellow": "lemon", "green": "emerald", "cyan": "turquoise",
    "blue": "ultramarine", "purple": "violet", "pink": "rosy", "white": "milky", "black": "coal",
}  # fmt: skip


@dataclass(frozen=True)
class Phrase:
    """Two ways to say a value; both follow the solid: "a ball" + ``first``, "it" + ``other``."""

    first: str
    other: str


TEXTURES = {
    "plain": Phrase("with a plain surface", "has no pattern"),
    "checks": Phrase("with checks", "looks like a chessboard"),
    "stripes": Phrase("with stripes", "has upright lines"),
    "bands": Phrase("with bands", "has level lines all around"),
    "spots": Phrase("with spots", "is dotted"),
    "bricks": Phrase("with bricks", "looks like masonry"),
    "grid": Phrase("with a grid", "wears a net of thin lines"),
    "zigzag": Phrase("with a zigzag", "has lines that turn up and down"),
    "shade": Phrase("with a fading shade", "grows lighter to the top"),
    "halves": Phrase("with two halves", "has two sides, one light and one dark"),
}
"""Patterns of a colour and its second colour, darker, or lighter for black."""

BACKGROUNDS = {
    "meadow": Phrase("on a meadow", "grass under a clear sky"),
    "desert": Phrase("in the desert", "sand under a hazy sky"),
    "snow": Phrase("in the snow", "a frozen field"),
    "sea": Phrase("at sea", "water with waves"),
    "night": Phrase("at night", "dark ground under the moon"),
    "sunset": Phrase("at sunset", "the last light of the day"),
    "space": Phrase("in space", "grey dust under stars"),
    "volcano": Phrase("on a volcano", "glowing rock under smoke"),
    "room": Phrase("in a room", "a wooden floor before a wall"),
    "studio": Phrase("in a studio", "an empty lilac stage"),
}
STYLES = {
    "photo": Phrase("a photo", "taken with a camera"),
    "pixels": Phrase("an image in coarse pixels", "made of little squares"),
    "poster": Phrase("a poster", "printed with few tones"),
    "dark": Phrase("a dark image", "taken with too little light"),
    "grey": Phrase("a grey image", "without any hue"),
    "sepia": Phrase("a sepia image", "brown as in an old album"),
    "negative": Phrase("a negative", "reversed in all its tones"),
    "sketch": Phrase("a sketch", "drawn in lines on paper"),
    "normals": Phrase("a map of normals", "tinted by direction"),
    "depth": Phrase("a map of depth", "brighter where it is further"),
}
ARRANGEMENTS = {
    "standing": Phrase("stands on the ground", "rests on its base"),
    "floating": Phrase("is floating", "hovers in the air"),
    "pedestal": Phrase("stands on a pedestal", "was put on a block"),
    "sunk": Phrase("is half sunk", "is partly below the ground"),
    "tower": Phrase("forms a tower with its twin", "is stacked two high"),
    "row": Phrase("is part of a row", "comes three times side by side"),
    "far": Phrase("is far away", "looks small in the distance"),
    "hanging": Phrase("is hanging from a rope", "is held from above"),
    "arch": Phrase("stands under an arch", "has two posts and a beam around it"),
    "fence": Phrase("stands behind a fence", "is seen through bars"),
}
BESIDE = "beside"
"""The arrangement of two solids."""

THEMES = {
    "colour": tuple(COLOURS), "texture": tuple(TEXTURES), "background": tuple(BACKGROUNDS), "style": tuple(STYLES),
    "arrangement": tuple(ARRANGEMENTS),
}  # fmt: skip
"""The values of each theme; a cell is one of them with one object."""

_HIDDEN = {
    "grey": {"colour", "background"}, "sepia": {"colour", "background"}, "negative": {"colour", "background"},
    "sketch": {"colour", "texture", "background"}, "normals": {"colour", "texture", "background"},
    "depth": {"colour", "texture", "background"}, "pixels": {"texture"}, "dark": {"background"},
}  # fmt: skip


def hidden_themes(style: str) -> set[str]:
    """Return the themes that a ``style`` makes invisible; no caption and no question speaks of them."""
    return _HIDDEN.get(style, set())


def held_out(theme: str, value: str, thing: str) -> bool:
    """Return whether the cell of ``value`` and ``thing`` is held out from all training but that of the judge.

    With the values, objects and themes counted from 0, that is where (value + 3 object + theme) mod 10 is 0, and of the
    first five objects also where it is 4: 15 of the 100 cells of each theme, one or two in every row and column.
    """
    values = THEMES[theme]
    if value not in values:
        return False
    number = list(OBJECTS).index(thing)
    # 3 and 10 share no divisor, so that each object is held out with another value.
    place = (values.index(value) + 3 * number + list(THEMES).index(theme)) % 10
    return place == 0 or (place == 4 and number < 5)


def portrait_seed(seed: int, split: str, index: int) -> int:
    """Return the seed of a portrait: a function of (seed, split, index), so that splits share none."""
    return seed_of("covray portrait", seed, split, index)
