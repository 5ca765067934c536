"""ThinkDiff-CLIP's compositions: pictures, and words to obey, drawn as one; what is kept and what is obeyed.

    I         a picture                     its object, colour, texture and background are kept
    I + T     a picture, another place      object, colour and texture are kept, the place is obeyed
    2I        two pictures                  both objects and their colours are kept
    2I + T    two pictures, a place         both objects and their colours are kept, the place is obeyed

The paper shows such pictures and measures none. One solid is judged by the judge of the episodes. It knows no two
solids: of these the vision-language model writes a caption, whose words are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from covray.config.vlm import VlmDecodingConfig
from covray.evaluation.caption_facts import stated
from covray.evaluation.statistics import Difference, Mean, mean_interval, paired_difference
from covray.io import storage
from covray.io.records import RecordPart
from covray.models.aligner.aligner import Aligner
from covray.models.vlm.decoding import decode
from covray.pairs.scenes.portrait_values import BACKGROUNDS, BESIDE, COLOURS, OBJECTS, TEXTURES
from covray.pairs.scenes.portraits import Portrait, Solid, render_portrait
from covray.recipes.nano.clip import normed
from covray.recipes.nano.vlm_list import INSTRUCTIONS
from covray.recipes.thinking.family import Family
from covray.seeds import seed_of
from covray.thinking.episodes import PORTRAITS
from covray.thinking.features import patch_features

KINDS = ("I", "I + T", "2I", "2I + T")
TRUE, COPY = "true renders", "copy"
"""Rows without an aligner: a render of what is asked for, the judges' ceiling; and the first picture that was shown."""
READING = VlmDecodingConfig(decoder="autoregressive", max_tokens=80)
"""Greedy: how captions of drawn pictures are written."""
_DRAWN = 50

Picture = NDArray[np.uint8]
Facts = dict[str, set[str]]
"""Values by theme."""


@dataclass(frozen=True)
class Case:
    """A composition."""

    kind: str
    shown: tuple[Portrait, ...]
    words: str
    """What is to be obeyed; "": nothing."""
    expected: Portrait
    """What is asked for."""
    seed: int
    """Of the renders."""

    @property
    def kept(self) -> Facts:
        """What of the shown pictures is to be kept, by theme."""
        solids = self.expected.solids
        facts: Facts = {"object": set(), "colour": set()}
        for solid in solids:
            facts["object"].add(solid.thing)
            facts["colour"].add(solid.colour)
        # Texture and background of two pictures cannot both be kept in one.
        if len(solids) == 1:
            facts["texture"] = {solids[0].texture}
            if not self.words:
                facts["background"] = {self.expected.background}
        return facts

    @property
    def obeyed(self) -> Facts:
        """What of the words is to be obeyed, by theme."""
        return {"background": {self.expected.background}} if self.words else {}


class CompositionScores(RecordPart):
    """A row of a kind of composition: the means of its verdicts."""

    facts: Mean
    """The share of facts that are kept."""
    kept: Mean
    obeyed: Mean
    both: Mean
    below_reference: Difference | None = None
    """The reference less this row, of ``both``; absent in the reference."""


Compositions = dict[str, dict[str, CompositionScores]]
"""The table, by kind and row."""


def make_cases(kind: str, count: int, seed: int) -> list[Case]:
    """Return ``count`` compositions of a kind; each follows from the seed and its number."""
    cases = []
    for number in range(count):
        cases.append(_case(kind, seed_of("composition", kind, seed, number)))
    return cases


def _case(kind: str, seed: int) -> Case:
    """Return a composition without any held-out cell in what is asked for or shown."""
    rng = np.random.default_rng(seed)

    def pick(values: Sequence[str], number: int) -> list[str]:
        return [str(value) for value in rng.choice(list(values), number, replace=False)]

    # Drawn again until nothing of it is held out: the aligners are judged on what they could have learned.
    while True:
        things, colours, textures = pick(tuple(OBJECTS), 2), pick(tuple(COLOURS), 2), pick(tuple(TEXTURES), 2)
        first, second = map(Solid, things, colours, textures)
        here, there = pick(tuple(BACKGROUNDS), 2)
        is_double, has_words = kind.startswith("2I"), kind.endswith("T")
        solids = (first, second) if is_double else (first,)
        shown = []
        for solid in solids:
            shown.append(Portrait((solid,), here, "photo", "standing"))
        place = there if has_words else here
        expected = Portrait(solids, place, "photo", BESIDE if is_double else "standing")
        if not any(portrait.held_out_themes() for portrait in (*shown, expected)):
            words = f"A photo {BACKGROUNDS[there].first}." if has_words else ""
            return Case(kind, tuple(shown), words, expected, seed)


def renders(case: Case) -> list[Picture]:
    """Return the pictures that are shown, uint8 [64, 64, 3] each."""
    pictures = []
    for number, portrait in enumerate(case.shown):
        pictures.append(render_portrait(portrait, np.random.default_rng(seed_of("shown", case.seed, number)))[0])
    return pictures


def true_render(case: Case) -> Picture:
    """Return a render of what is asked for, uint8 [64, 64, 3]."""
    return render_portrait(case.expected, np.random.default_rng(seed_of("asked", case.seed)))[0]


@torch.no_grad()
def drawn(family: Family, aligner: Aligner, cases: Sequence[Case]) -> list[Picture]:
    """Return what the painter draws of the aligned patches of the pictures, then the encoded words."""
    features = []
    for case in cases:
        # [pictures, patches, width] to a sequence; the painter reads all pictures after one another.
        pixels = normed(np.stack(renders(case))).to(family.device)
        own = aligner.network(patch_features(family.tower, pixels).flatten(0, 1))
        if case.words:
            # A text alone has no padding that would have to be cut off.
            states, _ = family.encoder.encode([case.words])
            own = torch.cat((own, states[0]))
        features.append(own)
    return [frames[0] for frames in family.painter.paint(features)]


def seen_by_judge(family: Family, pictures: Sequence[Picture]) -> list[Facts]:
    """Return what the judge sees in pictures of one solid; the object is what the heads of colour say."""
    # Every theme's head names the object, too; one of them is taken.
    facts: list[Facts] = [{} for _ in pictures]
    for theme in PORTRAITS:
        for own, cell in zip(facts, family.judge.choose(theme, pictures), strict=True):
            own[theme.name] = {cell.detail}
            if theme.name == "colour":
                own["object"] = {cell.object}
    return facts


def seen_by_model(family: Family, pictures: Sequence[Picture]) -> list[Facts]:
    """Return what captions state that the vision-language model writes of pictures."""
    prompts = [family.vlm.prompter.prompt([picture], INSTRUCTIONS[0]) for picture in pictures]
    facts = []
    for answer in decode(family.vlm, prompts, READING, None):
        facts.append(stated(family.vlm.prompter.text(answer.ids)))
    return facts


def verdicts(cases: Sequence[Case], seen: Sequence[Facts]) -> dict[str, list[float]]:
    """Return for each case the share of facts that are kept, and whether all are kept, obeyed, and both."""
    columns: dict[str, list[float]] = {"facts": [], "kept": [], "obeyed": [], "both": []}
    for case, own in zip(cases, seen, strict=True):
        kept = _equal(own, case.kept)
        obeys = all(_equal(own, case.obeyed))
        columns["facts"].append(float(np.mean(kept)))
        columns["kept"].append(float(all(kept)))
        columns["obeyed"].append(float(obeys))
        columns["both"].append(float(all(kept) and obeys))
    return columns


def _equal(seen: Facts, wanted: Facts) -> list[bool]:
    """Return for each theme of ``wanted`` whether just its values are seen."""
    return [seen.get(theme) == values for theme, values in wanted.items()]


def compositions(
    family: Family, folder: Path, aligners: Mapping[str, Sequence[Aligner]], count: int, seed: int, reference: str
) -> Compositions:
    """Return the table of compositions; each row's verdicts are kept in a file.

    Args:
        family: The nano parts.
        folder: Where verdicts are kept.
        aligners: Of patches, by row, one for each seed.
        count: Compositions of each kind.
        seed: Of the compositions.
        reference: The row that others are compared with.
    """
    table = {}
    for kind in KINDS:
        cases = make_cases(kind, count, seed)
        # How a row draws some of the cases; a row of aligners once for each of its seeds.
        draws: dict[str, list[Callable[[Sequence[Case]], list[Picture]]]] = {
            TRUE: [lambda part: [true_render(case) for case in part]],
            COPY: [lambda part: [renders(case)[0] for case in part]],
        }
        for name, own in aligners.items():
            draws[name] = []
            for aligner in own:
                draws[name].append(functools.partial(drawn, family, aligner))
        rows: dict[str, list[dict[str, list[float]]]] = {}
        for name, by_seed in draws.items():
            rows[name] = []
            for number, draw in enumerate(by_seed):
                slug = f"{kind}-{name}-{number}".lower().replace(" ", "")
                rows[name].append(_judged(family, folder / f"{slug}.json", cases, draw))
        table[kind] = _rows(rows, reference)
    return table


def _judged(
    family: Family, file: Path, cases: Sequence[Case], draw: Callable[[Sequence[Case]], list[Picture]]
) -> dict[str, list[float]]:
    """Return a row's verdicts, which are kept in ``file``."""
    if not file.exists():
        # The judge knows pictures of one solid only.
        look = seen_by_model if len(cases[0].shown) > 1 else seen_by_judge
        seen: list[Facts] = []
        for start in range(0, len(cases), _DRAWN):
            seen += look(family, draw(cases[start : start + _DRAWN]))
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_json(str(file), verdicts(cases, seen))
    judged: dict[str, list[float]] = storage.read_json(str(file))
    return judged


def _rows(rows: Mapping[str, Sequence[Mapping[str, list[float]]]], reference: str) -> dict[str, CompositionScores]:
    """Return the means of each row's cases with intervals; a case's score is its mean over seeds."""
    results = {}
    compared = _mean_over_seeds(rows[reference], "both")
    for name, by_seed in rows.items():
        row = CompositionScores(
            facts=_mean(by_seed, "facts"),
            kept=_mean(by_seed, "kept"),
            obeyed=_mean(by_seed, "obeyed"),
            both=_mean(by_seed, "both"),
        )
        if name != reference:
            difference = paired_difference(compared, _mean_over_seeds(by_seed, "both"))
            row = row.model_copy(update={"below_reference": difference})
        results[name] = row
    return results


def _mean(by_seed: Sequence[Mapping[str, list[float]]], key: str) -> Mean:
    mean = mean_interval(_mean_over_seeds(by_seed, key))
    assert mean is not None
    return mean


def _mean_over_seeds(by_seed: Sequence[Mapping[str, list[float]]], key: str) -> NDArray[np.float64]:
    """Return the mean score of every case, float64 [cases]."""
    return np.asarray(np.mean([verdicts_of_seed[key] for verdicts_of_seed in by_seed], axis=0))
