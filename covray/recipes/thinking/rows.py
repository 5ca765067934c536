"""The rows of the table: for every episode a picture, or a text, and what the judge says of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from covray.evaluation.caption_facts import stated
from covray.io.records import Record
from covray.models.aligner.aligner import Aligner
from covray.recipes.nano.clip import normed
from covray.recipes.nano.vlm_list import EPISODE_INSTRUCTION
from covray.recipes.thinking.aligners import LONGEST, Variant
from covray.recipes.thinking.family import Family
from covray.recipes.thinking.thoughts import Thoughts, kept_thoughts
from covray.seeds import seed_of
from covray.thinking.alignment import Alignment, collate
from covray.thinking.cells import answer_caption, answer_picture, demonstration_pictures
from covray.thinking.episodes import (
    PORTRAITS,
    Cell,
    Episode,
    Theme,
    episode_prompt,
    judge,
    make_episode,
    sample_orders,
    tasks_of,
)
from covray.thinking.features import patch_features

PAINTED = 50
"""Pictures that are drawn and judged at a time."""
TRUE_RENDERS, TRUE_CAPTION = "true renders", "true caption"
VLM_TEXT, TEXT_BRIDGE, COPY = "text of the VLM", "text bridge", "copy"

Pictures = list[NDArray[np.uint8]]


@dataclass(frozen=True)
class EpisodeSet:
    """All episodes of a number of shots, with what was shown and thought."""

    episodes: list[Episode]
    """Those of a task follow each other."""
    demonstrations: list[Pictures]
    thoughts: Thoughts
    seed: int


def make_episodes(family: Family, folder: Path, shots: int, count: int, seed: int) -> EpisodeSet:
    """Return ``count`` episodes of each task, with the thoughts of the vision-language model.

    Args:
        family: The nano parts.
        folder: Where the thoughts are kept.
        shots: Demonstrations.
        count: Episodes of each task.
        seed: Of orders and pictures.
    """
    # The same orders for every task and number of shots, so that rows differ only in what is asked.
    orders = sample_orders(count, seed)
    episodes = []
    for task in tasks_of(PORTRAITS):
        for number, order in enumerate(orders):
            episodes.append(make_episode(task, number, order, shots))
    shown = [demonstration_pictures(episode, seed) for episode in episodes]

    def prompts() -> list[Any]:
        made = []
        for episode, pictures in zip(episodes, shown, strict=True):
            made.append(episode_prompt(family.vlm.prompter, episode, pictures, EPISODE_INSTRUCTION))
        return made

    thoughts = kept_thoughts(folder / f"episodes-{shots}.safetensors", family.vlm, prompts)
    return EpisodeSet(episodes, shown, thoughts, seed)


class RowVerdicts(Record):
    """What the judge says of a row's answers, one verdict an episode: ``rows/NAME.json``."""

    FILE: ClassVar[str] = "rows/NAME.json"
    FIX: ClassVar[str] = "delete it, and run the same command again"
    VERSION: ClassVar[int | None] = None

    right: list[bool]
    named: list[bool]
    hidden: list[bool]
    seconds: float


class RowJudge:
    """Judges rows, each once: its verdicts are kept in a file."""

    def __init__(self, family: Family, folder: Path):
        """Take the nano parts; files are written to ``folder``."""
        self._family, self._folder = family, folder

    def judged(self, name: str, whole: EpisodeSet, make: Callable[[], Sequence[Cell | None]]) -> RowVerdicts:
        """Return a row's verdicts and seconds.

        Args:
            name: Of the file.
            whole: The episodes.
            make: Returns what is seen in the row's answer to each episode.
        """
        folder, file = str(self._folder), f"{name}.json"
        # A row is judged once: the file also says how long it took.
        row = RowVerdicts.read_if_present(folder, file)
        if row is None:
            started = time.monotonic()
            verdicts = []
            for episode, answer in zip(whole.episodes, make(), strict=True):
                verdicts.append(judge(episode, answer))
            row = RowVerdicts(
                right=[verdict.right for verdict in verdicts],
                named=[verdict.named for verdict in verdicts],
                hidden=[verdict.hidden for verdict in verdicts],
                seconds=round(time.monotonic() - started, 1),
            )
            row.write(folder, file)
            print(f"{name}: {np.mean(row.right):.3f} right", flush=True)
        return row

    def of_pictures(self, whole: EpisodeSet, draw: Callable[[range], Pictures]) -> list[Cell]:
        """Return what the judge sees in the pictures that ``draw`` makes for some episodes."""
        cells: list[Cell] = []
        for start in range(0, len(whole.episodes), PAINTED):
            numbers = range(start, min(start + PAINTED, len(whole.episodes)))
            # Episodes of several themes stand in one part, and a judge is asked for one theme at a time.
            for number, picture in zip(numbers, draw(numbers), strict=True):
                cells += self._family.judge.choose(whole.episodes[number].task.theme, [picture])
        return cells

    def painted(self, whole: EpisodeSet, features: Callable[[range], list[Tensor]]) -> list[Cell]:
        """Return what the judge sees in what the painter draws from features."""

        def draw(numbers: range) -> Pictures:
            return [picture[0] for picture in self._family.painter.paint(features(numbers))]

        return self.of_pictures(whole, draw)


def ceilings(rows: RowJudge, family: Family, whole: EpisodeSet) -> dict[str, Callable[[], Sequence[Cell | None]]]:
    """Return the rows without an aligner, by name."""
    texts = whole.thoughts.texts

    def encoded(captions: Sequence[str]) -> list[Tensor]:
        states, mask = family.encoder.encode(list(captions))
        without_padding = []
        # Padding is cut off: the painter reads a sequence of its own length.
        for own, is_token in zip(states, mask, strict=True):
            without_padding.append(own[is_token])
        return without_padding

    def true_caption(numbers: range) -> list[Tensor]:
        captions = []
        for number in numbers:
            worded = np.random.default_rng(seed_of("true caption", whole.seed, number))
            captions.append(answer_caption(whole.episodes[number], worded))
        return encoded(captions)

    def true_pictures(numbers: range) -> Pictures:
        return [answer_picture(whole.episodes[number], whole.seed) for number in numbers]

    def texts_of_model() -> list[Cell | None]:
        cells = []
        for text, episode in zip(texts, whole.episodes, strict=True):
            cells.append(cell_of(text, episode.task.theme))
        return cells

    def text_bridge(numbers: range) -> list[Tensor]:
        return encoded([texts[number] for number in numbers])

    def last_shown(numbers: range) -> Pictures:
        return [whole.demonstrations[number][-1] for number in numbers]

    return {
        TRUE_RENDERS: lambda: rows.of_pictures(whole, true_pictures),
        TRUE_CAPTION: lambda: rows.painted(whole, true_caption),
        VLM_TEXT: texts_of_model,
        TEXT_BRIDGE: lambda: rows.painted(whole, text_bridge),
        COPY: lambda: rows.of_pictures(whole, last_shown),
    }


@torch.no_grad()
def aligned_features(
    family: Family, whole: EpisodeSet, variant: Variant, aligner: Aligner, numbers: range
) -> list[Tensor]:
    """Return the aligned features of some episodes.

    Args:
        family: The nano parts.
        whole: The episodes.
        variant: What the aligner reads; patches are those of all demonstrations.
        aligner: The aligner.
        numbers: Of the episodes.
    """
    features = []
    for number in numbers:
        if variant.reads == "generated":
            own = whole.thoughts.generated[number]
        elif variant.reads == "prompt":
            own = whole.thoughts.read[number]
        else:
            pixels = normed(np.stack(whole.demonstrations[number])).to(family.device)
            own = patch_features(family.tower, pixels).flatten(0, 1)
        features.append(aligner.network(own.to(family.device)))
    return features


def decoded_cells(family: Family, whole: EpisodeSet, variant: Variant, aligner: Aligner) -> list[Cell | None]:
    """Return what the texts state that the frozen decoder writes for the aligned features (the proxy task)."""
    alignment = Alignment(aligner.network, family.language.model)
    # Aligners of patches are not asked for texts, so that patches do not come here.
    source = whole.thoughts.generated if variant.reads == "generated" else whole.thoughts.read
    cells = []
    # Some at a time: the decoder writes them in one batch.
    for start in range(0, len(source), PAINTED):
        part = source[start : start + PAINTED]
        batch = collate(part, [""] * len(part), family.language.tokenizer, LONGEST).to(family.device)
        written = alignment.write(batch, LONGEST)
        texts = family.language.tokenizer.batch_decode(written, skip_special_tokens=True)
        for number, text in enumerate(texts, start):
            cells.append(cell_of(text, whole.episodes[number].task.theme))
    return cells


def cell_of(text: str, theme: Theme) -> Cell | None:
    """Return the one cell of a theme that a text states; None if it states none or several."""
    values = stated(text)
    details, objects = values[theme.name], values["object"]
    # Several values of a theme are no answer: one of them could be the right one by chance.
    if len(details) != 1 or len(objects) != 1:
        return None
    return Cell(*details, *objects)
