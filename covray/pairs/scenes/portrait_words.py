"""Captions of portraits that say every fact twice in other words, and questions with answers of one word."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from covray.pairs.scenes.portrait_values import (
    ARRANGEMENTS,
    BACKGROUNDS,
    COLOURS,
    OBJECTS,
    OTHER_COLOURS,
    STYLES,
    TEXTURES,
    hidden_themes,
)  # fmt: skip
from covray.pairs.words import Question, Words

if TYPE_CHECKING:
    from covray.pairs.scenes.portraits import Portrait, Solid

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")


def portrait_words(portrait: Portrait, rng: np.random.Generator) -> Words:
    """Return the words of ``portrait``; ``rng`` chooses among equal ways to say the same."""
    # The choices below are drawn in their order: another order would give every seed other words.
    visible = {"colour", "texture", "background"} - hidden_themes(portrait.style)
    if len(portrait.solids) == 1:
        caption, questions = _caption_of_one(portrait, visible, rng), _questions_of_one(portrait, visible, rng)
    else:
        caption, questions = _caption_of_two(portrait, visible, rng), _questions_of_two(portrait, visible, rng)
    style = Question(
        "style", _pick(rng, ["In which style is the picture?", "How was the picture made?"]), portrait.style
    )
    count = Question("count", _pick(rng, ["How many solids are there?", "Count the solids."]), NUMBERS[portrait.count])
    questions += [style, count]
    if "background" in visible:
        asked = _pick(rng, ["Where is it?", "What is the background?"])
        questions.append(Question("background", asked, portrait.background))
    solids = []
    for solid in portrait.solids:
        solids.append({"object": solid.thing, "colour": solid.colour, "texture": solid.texture})
    attributes = {
        "solids": solids,
        "background": portrait.background,
        "style": portrait.style,
        "arrangement": portrait.arrangement,
        "count": portrait.count,
        "visible": sorted({"object", "style", "arrangement", "count"} | visible),
    }
    return Words(caption, attributes, tuple(questions))


def _pick(rng: np.random.Generator, choices: list[str]) -> str:
    return choices[int(rng.integers(len(choices)))]


def article(noun: str) -> str:
    """Return ``noun`` with a or an before it."""
    if noun[0] in "aeiou":
        return f"an {noun}"
    return f"a {noun}"


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _named(solid: Solid, visible: set[str]) -> str:
    """Return "a red ball with spots", as far as it is visible."""
    name = solid.thing
    if "colour" in visible:
        name = f"{solid.colour} {name}"
    if "texture" in visible:
        name += f" {TEXTURES[solid.texture].first}"
    return article(name)


def _renamed(solid: Solid, visible: set[str]) -> str:
    """Return "scarlet sphere", as far as it is visible."""
    name = OBJECTS[solid.thing]
    if "colour" in visible:
        name = f"{OTHER_COLOURS[solid.colour]} {name}"
    return name


def _background(portrait: Portrait, visible: set[str]) -> str:
    """Return " on a table", or nothing where no background is visible."""
    if "background" not in visible:
        return ""
    return f" {BACKGROUNDS[portrait.background].first}"


def _caption_of_one(portrait: Portrait, visible: set[str], rng: np.random.Generator) -> str:
    (solid,) = portrait.solids
    arrangement, style = ARRANGEMENTS[portrait.arrangement], STYLES[portrait.style]
    named = _named(solid, visible)
    where = _background(portrait, visible)
    first = _pick(rng, [
        f"{style.first} of {named} that {arrangement.first}{where}",
        f"{named}{where} {arrangement.first}, in {style.first}",
        f"in {style.first}, {named} {arrangement.first}{where}",
    ])  # fmt: skip
    renamed = _renamed(solid, visible)
    second = _pick(rng, [f"the {renamed} {arrangement.other}", f"this {renamed} {arrangement.other}"])
    if "texture" in visible:
        second += f" and {TEXTURES[solid.texture].other}"
    return " ".join(map(_sentence, [first, second, _surroundings(portrait, visible, rng)]))


def _surroundings(portrait: Portrait, visible: set[str], rng: np.random.Generator) -> str:
    """Return background and style in other words."""
    style = STYLES[portrait.style].other
    if "background" not in visible:
        return _pick(rng, [f"the picture is {style}", f"it is {style}"])
    place = BACKGROUNDS[portrait.background].other
    return _pick(rng, [f"around it is {place}, {style}", f"one sees {place}; the picture is {style}"])


def _caption_of_two(portrait: Portrait, visible: set[str], rng: np.random.Generator) -> str:
    left, right = portrait.solids
    style = STYLES[portrait.style]
    where = _background(portrait, visible)
    first = _pick(rng, [
        f"{style.first} of {_named(left, visible)} to the left of {_named(right, visible)}{where}",
        f"{style.first} with {_named(right, visible)} on the right and {_named(left, visible)} on the left{where}",
    ])  # fmt: skip
    second = _pick(rng, [
        f"the {_renamed(left, visible)} comes first, then the {_renamed(right, visible)}",
        f"the {_renamed(right, visible)} follows the {_renamed(left, visible)} from left to right",
    ])  # fmt: skip
    return " ".join(map(_sentence, [first, second, _surroundings(portrait, visible, rng)]))


def _questions_of_one(portrait: Portrait, visible: set[str], rng: np.random.Generator) -> list[Question]:
    (solid,) = portrait.solids
    asked = [Question("object", _pick(rng, ["What is shown?", "Which object is it?"]), solid.thing)]
    how = _pick(rng, [f"How is the {solid.thing} arranged?", f"What is the arrangement of the {solid.thing}?"])
    asked.append(Question("arrangement", how, portrait.arrangement))
    if "colour" in visible:
        asked.append(Question("colour", f"What colour is the {solid.thing}?", solid.colour))
        named, answer = solid.colour, "yes"
        # Half of the answers are no, so that saying yes is worth nothing.
        if rng.random() >= 0.5:
            named, answer = _pick(rng, [colour for colour in COLOURS if colour != solid.colour]), "no"
        asked.append(Question("is", f"Is the {solid.thing} {named}?", answer))
    if "texture" in visible:
        asked.append(Question("texture", f"What texture has the {solid.thing}?", solid.texture))
    return asked


def _questions_of_two(portrait: Portrait, visible: set[str], rng: np.random.Generator) -> list[Question]:
    left, right = portrait.solids
    asked = []
    same = {True: "same", False: "different"}
    for end, solid in (("left", left), ("right", right)):
        asked.append(Question(end, f"Which object is {end}?", solid.thing))
        if "colour" in visible:
            asked.append(Question(f"{end} colour", f"What colour is the solid on the {end}?", solid.colour))
    asked.append(Question("same object", "Are the two objects the same or different?", same[left.thing == right.thing]))
    if left.thing != right.thing:
        # In either order, or the first name would be the answer.
        first, second = (left, right) if rng.random() < 0.5 else (right, left)
        ask = f"Which is left, the {first.thing} or the {second.thing}?"
        asked.append(Question("which is left", ask, left.thing))
    if "colour" in visible:
        are = "Are the colours of the two the same or different?"
        asked.append(Question("same colour", are, same[left.colour == right.colour]))
    return asked
