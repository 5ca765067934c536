"""All stations of the programme, each kept in a file or folder, so that the same command continues."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from covray.config import differences
from covray.config.section import JsonObject
from covray.errors import ConfigError, one_line
from covray.io import storage
from covray.io.device import choose_device
from covray.io.model_folders import local_path
from covray.recipes.nano.clip import normed
from covray.recipes.nano.portrait_data import PortraitVae, portrait_manifest, read_portraits
from covray.recipes.nano.vlm_list import INSTRUCTIONS
from covray.recipes.thinking.aligners import CLIP, COMPOSERS, LVLM, VARIANTS, Lessons, Variant, trained_aligner
from covray.recipes.thinking.budget import Budget, budget_of
from covray.recipes.thinking.compositions import Compositions, compositions
from covray.recipes.thinking.family import Family, load_family, train_family
from covray.recipes.thinking.rows import (
    EpisodeSet,
    RowJudge,
    RowVerdicts,
    aligned_features,
    ceilings,
    decoded_cells,
    make_episodes,
)
from covray.recipes.thinking.table import ShotTable, table_of
from covray.recipes.thinking.thoughts import BATCH, joined, kept_thoughts
from covray.seeds import seed_of
from covray.thinking.features import patch_features

RESULTS = "results.json"
COMPOSITIONS = "compositions"
"""Of ThinkDiff-CLIP: a key of the results, and a folder."""
_ABOUT = "_programme.json"
_BLOCK = 16 * BATCH
"""Captions of a file."""


@dataclass(frozen=True)
class ThinkingResults:
    """What the programme found."""

    shots: dict[str, ShotTable]
    """By shots as ``2 shots``."""
    compositions: Compositions

    def to_json(self) -> JsonObject:
        """Return what ``results.json`` holds: a key for each number of shots, then the compositions."""
        values: JsonObject = {name: table.to_json() for name, table in self.shots.items()}
        composed: JsonObject = {}
        for kind, rows in self.compositions.items():
            composed[kind] = {name: row.to_json() for name, row in rows.items()}
        return values | {COMPOSITIONS: composed}


def run_thinking(out: str, budget_name: str, threads: int, device: str = "auto", seed: int = 0) -> ThinkingResults:
    """Train what is missing, ask all episodes, and return the results, which are also written to ``results.json``.

    Args:
        out: Folder of the programme. ``out``/nano holds the nano parts; those that are there are used.
        budget_name: A name of ``covray.recipes.thinking.budget.BUDGETS``.
        threads: CPU threads.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: Of everything.

    Raises:
        ConfigError: The budget or the device is not known, or the folder holds another programme.
        WeightsError: A nano part cannot be loaded.
    """
    budget = budget_of(budget_name)
    folder, chosen = local_path(out), choose_device(device, "--device")
    _begin(folder, {"budget": asdict(budget), "seed": seed})
    torch.set_num_threads(threads)
    train_family(folder / "nano", budget, threads, chosen, seed)
    family = load_family(folder / "nano", budget, threads, chosen)
    lessons = make_lessons(family, folder / "captions", budget, seed)
    judging = RowJudge(family, folder / "rows")
    rows: dict[int, dict[str, list[RowVerdicts]]] = {}
    proxies: dict[int, dict[str, list[RowVerdicts]]] = {}
    episodes = {}
    for shots in budget.shots:
        whole = make_episodes(family, folder / "thoughts", shots, budget.episodes, seed)
        episodes[shots] = whole.episodes
        rows[shots], proxies[shots] = defaultdict(list), defaultdict(list)
        for name, make in ceilings(judging, family, whole).items():
            slug = name.lower().replace(" ", "-")
            rows[shots][name].append(judging.judged(f"{shots}-{slug}", whole, make))
        for variant in VARIANTS:
            for number in range(budget.seeds):
                row, proxy = _aligner_row(folder, judging, family, lessons, whole, variant, budget, seed + number)
                rows[shots][variant.name].append(row)
                if proxy is not None:
                    proxies[shots][variant.name].append(proxy)
    tables = table_of(rows, proxies, episodes, LVLM.name)
    composers = {}
    for variant in COMPOSERS:
        own = []
        for number in range(budget.seeds):
            own.append(trained_aligner(folder / "aligners", variant, family, lessons, budget, seed + number))
        composers[variant.name] = own
    count = budget.episodes * 3 // 2
    composed = compositions(family, folder / COMPOSITIONS, composers, count, seed, CLIP.name)
    results = ThinkingResults(tables, composed)
    storage.write_json(str(folder / RESULTS), results.to_json())
    return results


def _caption_prompts(family: Family, pictures: Any, first: int, seed: int) -> list[Any]:
    """Return a prompt for each of ``pictures``, of which the first is number ``first``, with a random instruction."""
    made = []
    for number, picture in enumerate(pictures, first):
        instruction = INSTRUCTIONS[seed_of("instruction", seed, number) % len(INSTRUCTIONS)]
        made.append(family.vlm.prompter.prompt([picture], instruction))
    return made


def make_lessons(family: Family, folder: Path, budget: Budget, seed: int) -> Lessons:
    """Return captions that the vision-language model writes for training portraits, with what aligners read of them.

    Args:
        family: The nano parts.
        folder: Where the captions are kept.
        budget: How many captions.
        seed: Of portraits and instructions.
    """
    manifest = portrait_manifest(family.folder, budget.portraits, seed)
    training = read_portraits(manifest)["train"]
    latents = PortraitVae(family.folder, family.device).latents(f"{manifest.stem}-train", training.pictures)
    pictures = training.pictures[: budget.captions]
    blocks = []
    for start in range(0, len(pictures), _BLOCK):
        # The prompts are made only where the block's captions are not kept from an earlier run.
        prompts = partial(_caption_prompts, family, pictures[start : start + _BLOCK], start, seed)
        blocks.append(kept_thoughts(folder / f"{start:06d}.safetensors", family.vlm, prompts))
    whole = joined(blocks)
    kept = [number for number, ids in enumerate(whole.ids) if len(ids) >= 2]  # fewer have no two parts
    if not kept:
        raise ConfigError(f"{family.folder}/vlm: writes no captions; train it for more steps")
    patches = []
    # About 64 at a time: the tower's states of all pictures at once would not fit.
    for batch in np.array_split(pictures, max(1, len(pictures) // 64)):
        patches += list(patch_features(family.tower, normed(batch).to(family.device)).cpu())
    return Lessons(whole.chosen(kept), [patches[number] for number in kept], latents[kept])


def _aligner_row(
    folder: Path, judging: RowJudge, family: Family, lessons: Lessons, whole: EpisodeSet, variant: Variant,
    budget: Budget, seed: int,
) -> tuple[RowVerdicts, RowVerdicts | None]:  # fmt: skip
    """Return the verdicts on an aligner's pictures, and on the texts that the frozen decoder writes from the same."""
    aligner = trained_aligner(folder / "aligners", variant, family, lessons, budget, seed)
    name = f"{len(whole.episodes[0].demonstrations)}-{variant.slug}-{seed}"
    features = partial(aligned_features, family, whole, variant, aligner)
    row = judging.judged(name, whole, lambda: judging.painted(whole, features))
    if variant.reads == "patches":
        return row, None
    proxy = judging.judged(f"{name}-decoded", whole, lambda: decoded_cells(family, whole, variant, aligner))
    return row, proxy


def _begin(folder: Path, about: JsonObject) -> None:
    """Make the folder, or continue the same programme in it. Raises ConfigError."""
    file = folder / _ABOUT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "nano").mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {folder}: cannot be written ({one_line(error)}); give another folder") from error
    if file.exists():
        # Through JSON and back, as the file was: the budget's tuples become lists.
        differing = differences(storage.read_json(str(file)), json.loads(json.dumps(about)))
        if differing:
            raise ConfigError(
                f"--out {folder}: holds a programme of another budget or seed ({'; '.join(differing)}); give the same, "
                "or another --out"
            )
    storage.write_json(str(file), about)
