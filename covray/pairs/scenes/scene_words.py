"""What a scene shows, in words: its solids, their colours and places, and what the person does.

Everything is read from what was drawn and from the pixels that show it; no random draw of the scene is added.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from covray.pairs.scenes.geometry import CLASSES, SOLIDS
from covray.pairs.scenes.render import View
from covray.pairs.words import Question, Words

COLOURS = {"box": "purple", "ball": "red", "cylinder": "blue", "cone": "yellow", "ring": "cyan"}
"""The colour of each kind of solid: a scene's hues follow from kinds, so a word names each."""
OTHER = {"box": "cube", "ball": "sphere", "cylinder": "drum", "cone": "spike", "ring": "hoop"}
DOING = {
    "lifting both arms": "holds both hands above the waist",
    "lifting one arm": "holds one hand above the waist",
    "standing": "keeps both hands low",
}
PLACES = {"left": "on the left", "middle": "in the middle", "right": "on the right"}
MIN_SHARE = 0.004
"""Share of the picture that a kind must fill to be spoken of."""
_ONE_WORD = {"lifting both arms": "two", "lifting one arm": "one", "standing": "none"}


@dataclass(frozen=True)
class Seen:
    """A kind of thing that a picture shows."""

    kind: str
    place: str
    """left, middle or right: the third of the picture that holds the middle of its pixels."""
    x: float
    """The middle of its pixels, as a share of the width."""


def things_seen(view: View) -> list[Seen]:
    """Return the kinds that are seen, persons among them, from left to right."""
    size = view.classes.shape[1]
    things = []
    for kind in ("person", *SOLIDS):
        columns = np.nonzero(view.classes == CLASSES.index(kind) + 1)[1]
        if len(columns) < MIN_SHARE * view.classes.size:
            continue
        x = float((columns.mean() + 0.5) / size)
        things.append(Seen(kind, tuple(PLACES)[min(int(3 * x), 2)], x))
    return sorted(things, key=lambda thing: thing.x)


def what_person_does(keypoints: NDArray[np.float32]) -> str:
    """Return what the figure does, one of ``DOING``, by the hands that the picture shows lifted.

    An arm is lifted where its hand is above the middle between shoulder and hip.

    ``keypoints`` are those of a ``View`` [18, 3]: y px grows downwards.
    """
    raised = 0
    for shoulder, wrist, hip in ((2, 4, 8), (5, 7, 11)):
        raised += keypoints[wrist, 1] < (keypoints[shoulder, 1] + keypoints[hip, 1]) / 2
    return ("standing", "lifting one arm", "lifting both arms")[int(raised)]


def scene_words(view: View, rng: np.random.Generator) -> Words:
    """Return the words of a scene's ``view``.

    Args:
        view: what the camera sees.
        rng: chooses among the questions' forms; a generator of its own, none of the scene's.
    """
    things = things_seen(view)
    solids, described = [], []
    person, doing, person_attributes = None, None, None
    for thing in things:
        if thing.kind == "person":
            person, doing = thing, what_person_does(view.keypoints)
            person_attributes = {"place": thing.place, "does": doing}
        else:
            solids.append(thing)
            described.append({"object": thing.kind, "colour": COLOURS[thing.kind], "place": thing.place})
    indoors = bool((view.classes == CLASSES.index("wall") + 1).mean() > MIN_SHARE)
    attributes = {"solids": described, "person": person_attributes, "wall": indoors, "kinds": len(solids)}
    return Words(_caption(solids, person, doing, indoors), attributes, tuple(_questions(things, doing, rng)))


def _caption(solids: list[Seen], person: Seen | None, doing: str | None, indoors: bool) -> str:
    """Return three sentences: the person, the solids, and both again in other words."""
    where = "before a wall" if indoors else "in the open"
    first, second, third = f"Nobody is seen {where}.", "There are no solids.", "Nothing else is there."
    if person is not None:
        first = f"A person {where} is {doing} {PLACES[person.place]}."
    if solids:
        named = [f"{COLOURS[thing.kind]} {thing.kind} {PLACES[thing.place]}" for thing in solids]
        second = f"There is {_listed(named)}."
        renamed = [OTHER[thing.kind] for thing in solids]
        third = f"From left to right one finds {_listed(renamed, 'the')}."
    if doing is not None:
        third = f"{third[:-1]}, and the figure {DOING[doing]}."
    return f"{first} {second} {third}"


def _listed(items: list[str], article: str = "a") -> str:
    """Return the items in a sentence: "a cube, a ball and a cone"."""
    with_articles = [f"{article} {item}" for item in items]
    if len(items) == 1:
        return with_articles[0]
    return f"{', '.join(with_articles[:-1])} and {with_articles[-1]}"


def _questions(things: list[Seen], doing: str | None, rng: np.random.Generator) -> list[Question]:
    """Return questions of one-word answers about ``things``, from left to right."""
    solids = [thing for thing in things if thing.kind != "person"]
    asked = []
    if doing is not None:
        asked.append(Question("lifted arms", "How many arms does the person lift?", _ONE_WORD[doing]))
    numbers = ("none", "one", "two", "three", "four", "five")
    asked.append(Question("count", "How many kinds of solids are there?", numbers[len(solids)]))
    present = [thing.kind for thing in solids]
    absent = [kind for kind in SOLIDS if kind not in present]
    # More than half, for scenes without any solid can only be asked for what is absent.
    true = bool(present) and (not absent or rng.random() < 0.62)
    kinds, answer = (present, "yes") if true else (absent, "no")
    kind = kinds[int(rng.integers(len(kinds)))]
    asked.append(Question("is there", f"Is there a {kind}?", answer))
    if solids:
        thing = solids[int(rng.integers(len(solids)))]
        asked.append(Question("colour", f"What colour is the {thing.kind}?", COLOURS[thing.kind]))
        asked.append(Question("place", f"Where is the {thing.kind}?", thing.place))
    if len(solids) >= 2:
        chosen = rng.choice(len(solids), 2, replace=False)
        pair = [solids[int(index)] for index in chosen]
        # Drawn in any order: the first name need not be the answer.
        left = min(pair, key=lambda thing: thing.x)
        asked.append(Question("which is left", f"Which is left, the {pair[0].kind} or the {pair[1].kind}?", left.kind))
    return asked
