"""Episodes of CoBSAT's rule (arXiv:2402.01293): demonstrations whose hidden value must be found, and a query.

A theme is a grid of ten details by ten objects. In an episode the words name one side and change; the other side, which
no word names, is the same in all pictures and must be found:

    theta = "car":   "red" -> a red car,   "blue" -> a blue car,   "green" -> ?        task Color-I
    theta = "red":   "car" -> a red car,   "hat"  -> a red hat,    "ball"  -> ?        task Color-II

An order is a pair of permutations of 0..9. With n shots, entries 0..n-1 of the first name the demonstrations and entry
n the query, so that all are different; entry n+1 of the second is theta. An answer counts only if both sides are right,
so chance is 1%.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from covray.errors import DatasetError, one_line
from covray.models.vlm.prompts import Prompt, Prompter
from covray.pairs.scenes.portrait_values import OBJECTS, THEMES
from covray.seeds import seed_of

VALUES = 10
"""Of each side of a theme."""
MOST_SHOTS = VALUES - 2

Named = Literal["detail", "object"]


@dataclass(frozen=True)
class Theme:
    """A grid of details and objects."""

    name: str
    details: tuple[str, ...]
    objects: tuple[str, ...]
    object_kind: str = "object"
    """What its objects are; CoBSAT has objects and animals."""
    words: Mapping[str, str] = field(default_factory=dict)
    """Values that a prompt calls otherwise."""

    def word(self, value: str) -> str:
        """Return what a prompt calls a value."""
        return self.words.get(value, value)


@dataclass(frozen=True)
class Task:
    """A theme, and the side that the words name."""

    theme: Theme
    named: Named

    @property
    def name(self) -> str:
        """Return CoBSAT's name: ``Color-I`` where words name the detail, ``Color-II`` where they name the object."""
        numeral = "I" if self.named == "detail" else "II"
        return f"{self.theme.name.capitalize()}-{numeral}"


@dataclass(frozen=True)
class Cell:
    """A picture's content."""

    detail: str
    object: str


@dataclass(frozen=True)
class Order:
    """Two permutations of 0..9."""

    named: tuple[int, ...]
    """Of the values that words name."""
    hidden: tuple[int, ...]


@dataclass(frozen=True)
class Episode:
    """Demonstrations, a query, and its answer."""

    task: Task
    number: int
    """Of its order in the list."""
    words: tuple[str, ...]
    """One for each demonstration, then the query."""
    demonstrations: tuple[Cell, ...]
    """The pictures that are shown."""
    answer: Cell

    def prompt(self, instruction: str) -> list[str]:
        """Return the texts before, between and after the pictures of the demonstrations, as ThinkDiff writes them."""
        return word_texts(self.words, instruction)


def word_texts(words: Sequence[str], instruction: str) -> list[str]:
    """Return the texts before, between and after pictures that have a word each, and one more word."""
    texts = []
    for number, word in enumerate(words, 1):
        start = f"{instruction}\n\n" if number == 1 else "\n\n"
        texts.append(f"{start}Word {number}: {word}, ")
    return texts


def episode_prompt(
    prompter: Prompter, episode: Episode, pictures: Sequence[NDArray[np.uint8]], instruction: str
) -> Prompt:
    """Return an episode as a user's turn: words and pictures by turns, then the query's word. Pictures are numbered.

    Args:
        prompter: Of the vision-language model.
        episode: The episode.
        pictures: Of its demonstrations, uint8 [h, w, 3] each.
        instruction: What the model is told first.
    """
    # An episode has a word before each picture, and the query's word at the end.
    *before, last = episode.prompt(instruction)
    parts: list[str | NDArray[np.uint8]] = []
    for text, picture in zip(before, pictures, strict=True):
        parts += [text, picture]
    return prompter.turn([*parts, last], number_pictures=True)


@dataclass(frozen=True)
class Verdict:
    """What a judge's two choices are worth."""

    detail: bool
    object: bool
    named: bool
    """The side that the query's word names ("textual" in CoBSAT)."""
    hidden: bool
    """The side that must be found ("visual")."""

    @property
    def right(self) -> bool:
        """Return whether both sides are right; only this counts."""
        return self.detail and self.object


_THINGS = ("leaf", "hat", "cup", "chair", "car", "box", "book", "ball", "bag", "apple")
_ANIMALS = ("zebra", "tiger", "sheep", "pig", "monkey", "lion", "dog", "cow", "cat", "bird")
COBSAT = (
    Theme(
        "color", ("yellow", "white", "red", "purple", "pink", "orange", "green", "brown", "blue", "black"), _THINGS
    ),
    Theme(
        "background",
        ("beach", "desert", "glacier", "volcano", "park", "gym", "waterfall", "space", "cave", "seafloor"),
        _ANIMALS, "animal", {"park": "amusement park"},
    ),
    Theme(
        "style",
        ("watercolor", "sketch", "pixel", "origami", "lego", "icon", "graffiti", "futuristic", "3d", "old"),
        _THINGS, "object", {"3d": "wireframe"},
    ),
    Theme(
        "action", ("swim", "sleep", "sing", "run", "read", "fly", "eat", "drink", "cry", "angry"), _ANIMALS, "animal"
    ),
    Theme(
        "texture",
        ("wood", "wicker", "sequined", "plastic", "paper", "metal", "leather", "lace", "denim", "ceramic"), _THINGS,
    ),
)  # fmt: skip
"""CoBSAT's themes; its orders count the values in this order."""
PORTRAITS = tuple(Theme(name, details, tuple(OBJECTS)) for name, details in THEMES.items())
"""The themes of covray's rendered portraits."""


def tasks_of(themes: Sequence[Theme]) -> list[Task]:
    """Return both tasks of every theme, those that name the detail first."""
    tasks = []
    for theme in themes:
        tasks += [Task(theme, "detail"), Task(theme, "object")]
    return tasks


def sample_orders(count: int, seed: int) -> list[Order]:
    """Return ``count`` orders; each follows from the seed and its number alone."""
    orders = []
    for number in range(count):
        generator = np.random.default_rng(seed_of("episode", seed, number))
        named, hidden = generator.permutation(VALUES).tolist(), generator.permutation(VALUES).tolist()
        orders.append(Order(tuple(named), tuple(hidden)))
    return orders


def make_episode(task: Task, number: int, order: Order, shots: int) -> Episode:
    """Return the episode of an order.

    Args:
        task: The task.
        number: Of the order in its list.
        order: Which values.
        shots: Demonstrations, 1 to ``MOST_SHOTS``.

    Raises:
        ValueError: The shots are out of bounds.
    """
    if not 1 <= shots <= MOST_SHOTS:
        raise ValueError(f"{shots} shots: give 1 to {MOST_SHOTS}")
    theme = task.theme
    names_detail = task.named == "detail"
    named, hidden = (theme.details, theme.objects) if names_detail else (theme.objects, theme.details)
    # The hidden side is the same in all demonstrations and in the answer.
    theta = hidden[order.hidden[shots + 1]]
    values = [named[place] for place in order.named[: shots + 1]]
    cells = []
    for value in values:
        cells.append(Cell(value, theta) if names_detail else Cell(theta, value))
    words = tuple(theme.word(value) for value in values)
    return Episode(task, number, words, tuple(cells[:shots]), cells[shots])


def judge(episode: Episode, chosen: Cell | None) -> Verdict:
    """Return what a judge's choices are worth.

    Args:
        episode: The episode.
        chosen: The detail and the object that the judge sees; None: there is no picture, and both sides are wrong.
    """
    detail = chosen is not None and chosen.detail == episode.answer.detail
    seen = chosen is not None and chosen.object == episode.answer.object
    # The task says which of the two sides the query's word names; the other one must be found in the demonstrations.
    named, hidden = (detail, seen) if episode.task.named == "detail" else (seen, detail)
    return Verdict(detail, seen, named, hidden)


@dataclass(frozen=True)
class CobsatFolder:
    """A copy of CoBSAT's repository with its data set."""

    path: Path
    orders: list[Order]
    """Of ``load_datasets/prompts_list_default.json``."""

    def picture(self, theme: Theme, cell: Cell) -> Path:
        """Return the file of a picture."""
        return self.path / "datasets" / f"{theme.name}_{cell.object}" / f"{cell.detail}_{cell.object}.jpg"

    def captions(self, theme: Theme) -> dict[str, str]:
        """Return the captions of a theme by the names of their files. Raises DatasetError."""
        file = self.path / "datasets" / f"{theme.name}_{theme.object_kind}.csv"
        try:
            with file.open(encoding="utf-8", newline="") as opened:
                return {Path(row["image"]).name: row["caption"] for row in csv.DictReader(opened)}
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise DatasetError(f"{file}: cannot be read ({one_line(error)}); get the data set again") from error


def open_cobsat(folder: Path) -> CobsatFolder:
    """Return a copy of CoBSAT with all of its 500 pictures; they are not opened.

    Raises:
        DatasetError: Pictures are missing, or the orders cannot be read.
    """
    cobsat = CobsatFolder(folder, _read_orders(folder / "load_datasets" / "prompts_list_default.json"))
    # All are looked for, so that one message says how much of a download is missing.
    missing = []
    for theme in COBSAT:
        for detail in theme.details:
            for thing in theme.objects:
                file = cobsat.picture(theme, Cell(detail, thing))
                if not file.is_file():
                    missing.append(file)
    if missing:
        raise DatasetError(
            f"{missing[0]}: is missing, with {len(missing)} of CoBSAT's 500 pictures in all; download its data set "
            f"into {folder}/datasets"
        )
    return cobsat


def _read_orders(file: Path) -> list[Order]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        # CoBSAT's own names: x is the side that words name, theta the one that must be found.
        orders = [Order(tuple(row["x_list"]), tuple(row["theta_list"])) for row in rows]
        for order in orders:
            for places in (order.named, order.hidden):
                if sorted(places) != list(range(VALUES)):
                    raise ValueError(f"{list(places)} is not a permutation of 0..{VALUES - 1}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DatasetError(f"{file}: cannot be read ({one_line(error)}); clone CoBSAT's repository again") from error
    return orders
