"""What the nano vision-language model learns: a list of portraits with captions, and of few-shot episodes.

    as many captions, each under one of several instructions, as episodes of 2 and 4 shots with an answer in words;
    a question with its answer for every fourth portrait

Demonstrations are portraits of the manifest. An episode neither shows nor asks for a held-out cell. The answer is a
caption of the plain portrait of its cell (``covray.thinking.cells``).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covray.io.images import load_picture, picture_of
from covray.pairs.scenes.portrait_values import hidden_themes
from covray.pairs.scenes.portraits import HELD_OUT_SPLIT, Portrait
from covray.pairs.words import Words, read_captioned
from covray.recipes.nano.portrait_data import portrait_of
from covray.seeds import seed_of
from covray.thinking.cells import answer_caption, has_held_out
from covray.thinking.episodes import PORTRAITS, VALUES, Episode, Order, make_episode, tasks_of

INSTRUCTIONS = (
    "Describe the picture.",
    "What does the picture show?",
    "Write a caption.",
    "Say what is seen.",
    "Tell how to draw the picture.",
    "Describe it in detail.",
)
"""Prompts of captions; the first is that of ``covray vlm``."""
EPISODE_INSTRUCTION = "Describe the next picture."
SHOTS = (2, 4)
QUESTION_EVERY = 4
_PLACEHOLDER = "<image>"

Key = tuple[str, str, str]
"""Theme, detail and object."""


def write_vlm_list(manifest: Path, seed: int) -> Path:
    """Return the list of a manifest of portraits, in LLaVA's format, written beside the manifest unless it exists.

    Args:
        manifest: The manifest; its pictures are also written as files, which the list names.
        seed: Of instructions and episodes.
    """
    path = manifest.with_name(f"{manifest.stem}-vlm-{seed}.jsonl")
    if path.exists():
        return path
    pictures = manifest.with_suffix("")
    pictures.mkdir(exist_ok=True)
    names: dict[str, list[str]] = defaultdict(list)
    words: dict[str, list[Words]] = defaultdict(list)
    for number, (row, own) in enumerate(read_captioned(manifest)):
        split = str(row["split"])
        if split == HELD_OUT_SPLIT:
            continue
        name = f"{pictures.name}/{number:06d}.png"
        (manifest.parent / name).write_bytes(load_picture(picture_of(row["image"]), None))
        names[split].append(name)
        words[split].append(own)
    aside = path.with_suffix(".part")
    with aside.open("w", encoding="utf-8") as file:
        for split in names:
            for line in _rows(split, names[split], words[split], seed):
                file.write(json.dumps(line) + "\n")
    aside.rename(path)
    return path


def sample_episode(numbers: np.random.Generator) -> Episode:
    """Return an episode without a held-out cell."""
    tasks = tasks_of(PORTRAITS)
    while True:
        task, shots = tasks[int(numbers.integers(len(tasks)))], SHOTS[int(numbers.integers(len(SHOTS)))]
        named, hidden = (tuple(numbers.permutation(VALUES).tolist()) for _ in range(2))
        episode = make_episode(task, 0, Order(named, hidden), shots)
        if not has_held_out(episode):
            return episode


def episode_row(split: str, episode: Episode, images: Sequence[str], answer: str) -> dict[str, Any]:
    """Return the row of an episode.

    Args:
        split: Its split.
        episode: The episode.
        images: The files of its demonstrations.
        answer: The caption that answers it.
    """
    return _row(split, images, _PLACEHOLDER.join(episode.prompt(EPISODE_INSTRUCTION)), answer)


def cells_of(portrait: Portrait) -> list[Key]:
    """Return the cells that can be seen in a portrait of one solid; none for a portrait of two."""
    if len(portrait.solids) != 1:
        return []
    (solid,) = portrait.solids
    values = {
        "colour": solid.colour,
        "texture": solid.texture,
        "background": portrait.background,
        "style": portrait.style,
        "arrangement": portrait.arrangement,
    }
    seen = values.keys() - hidden_themes(portrait.style)
    return [(name, values[name], solid.thing) for name in values if name in seen]


def _rows(split: str, names: Sequence[str], words: Sequence[Words], seed: int) -> Iterator[dict[str, Any]]:
    by_cell: dict[Key, list[str]] = defaultdict(list)
    for name, own in zip(names, words, strict=True):
        for cell in cells_of(portrait_of(own.attributes)):
            by_cell[cell].append(name)
    for number, (name, own) in enumerate(zip(names, words, strict=True)):
        numbers = np.random.default_rng(seed_of("vlm list", seed, split, number))
        instruction = INSTRUCTIONS[int(numbers.integers(len(INSTRUCTIONS)))]
        yield _row(split, [name], instruction, own.caption)
        if number % QUESTION_EVERY == 0:
            question = own.questions[int(numbers.integers(len(own.questions)))]
            yield _row(split, [name], question.question, question.answer)
        episode = _shown_episode(by_cell, numbers)
        if episode is not None:
            shown = _demonstrations(episode, by_cell, numbers)
            yield episode_row(split, episode, shown, answer_caption(episode, numbers))


_TRIALS = 50
"""Episodes that are drawn, at most, to find one whose demonstrations the manifest has pictures of."""


def _shown_episode(by_cell: Mapping[Key, Sequence[str]], numbers: np.random.Generator) -> Episode | None:
    """Return an episode all of whose demonstrations the manifest has, or None if none of ``_TRIALS`` is one."""
    for _ in range(_TRIALS):
        episode = sample_episode(numbers)
        theme = episode.task.theme.name
        if all((theme, cell.detail, cell.object) in by_cell for cell in episode.demonstrations):
            return episode
    return None


def _demonstrations(episode: Episode, by_cell: Mapping[Key, Sequence[str]], numbers: np.random.Generator) -> list[str]:
    shown = []
    for cell in episode.demonstrations:
        choices = by_cell[episode.task.theme.name, cell.detail, cell.object]
        shown.append(choices[int(numbers.integers(len(choices)))])
    return shown


def _row(split: str, images: Sequence[str], prompt: str, answer: str) -> dict[str, Any]:
    """Return a row of LLaVA's format; one picture stands before the prompt."""
    text = prompt if _PLACEHOLDER in prompt else f"{_PLACEHOLDER}{prompt}"
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]
    return {"image": list(images), "conversations": turns, "split": split}
