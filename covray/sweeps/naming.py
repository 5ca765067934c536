"""The names of trials. A name follows from what the trial is, not from what else is in the grid."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from covray.config import BackboneConfig, GridConfig, JsonObject

_MAX_CHARACTERS = 120


@dataclass(frozen=True)
class Combination:
    """A point of the grid."""

    method: str
    length: int
    """Pictures of a chain, both ends counted."""
    pairs: int
    tasks: tuple[str, ...] | None
    """None: all tasks of the dataset."""
    scale: BackboneConfig | None
    """None: what ``train`` says."""
    fields: dict[str, Any]
    seed: int


def trial_name(combination: Combination, defaults: JsonObject) -> str:
    """Return a name for folders and for MLflow: method, length, pairs, whatever is not by default, and the seed.

    Args:
        combination: What the trial is.
        defaults: The training without the grid's fields, dotted; a field that equals its default is not named.
    """
    method, length, pairs = combination.method, combination.length, combination.pairs
    tasks, scale = combination.tasks, combination.scale
    # The default backbone is not named, as no default is.
    if scale == BackboneConfig():
        scale = None
    changed = []
    for key, value in sorted(combination.fields.items()):
        if key not in defaults or defaults[key] != value:
            changed.append((key, value))
    words = [method, f"L{length}", f"p{pairs}"]
    if scale is not None:
        words.append(backbone_name(scale))
    if tasks is not None:
        words.append("+".join(tasks))
    for key, value in changed:
        words.append(f"{key.rpartition('.')[2]}_{value}")

    # The repr of this tuple is part of the names of sweeps that have begun: it must stay as it is.
    exact = repr((method, length, pairs, tasks, scale, changed))
    # Two fields may end alike, so their names need the hash.
    name = _safe_name("-".join(words), exact, ambiguous=bool(changed))
    # Last, so that the trials of a form stand beside each other in a folder.
    return f"{name}-s{combination.seed}"


def trial_label(combination: Combination, grid: GridConfig) -> str:
    """Return what tells a trial from the others of ``grid``, but for its seed, in words."""
    chain = combination.method
    if combination.method != "none":
        chain = f"{combination.method} L={combination.length}"
    examples = f"{combination.pairs} pairs"
    if combination.pairs == 1:
        examples = "1 pair"
    words = [chain, examples]
    # What all trials of the grid share is not repeated in each label.
    if len(grid.scales) > 1 and combination.scale is not None:
        words.append(scale_label(combination.scale, grid.scales))
    if len(grid.tasks) > 1:
        tasks = "all tasks"
        if combination.tasks is not None:
            tasks = " + ".join(combination.tasks)
        words.append(tasks)
    words += [f"{key} {value}" for key, value in combination.fields.items()]
    return ", ".join(words)


def scale_label(backbone: BackboneConfig, among: Iterable[BackboneConfig]) -> str:
    """Return the scale of ``backbone``; its whole name where several ``among`` those of the grid are of that scale."""
    same_scale = sum(other.scale == backbone.scale for other in among)
    if same_scale < 2:
        return backbone.scale
    return backbone_name(backbone)


def backbone_name(backbone: BackboneConfig) -> str:
    """Return all that tells one backbone from another."""
    words = [backbone.scale, backbone.path, backbone.revision]
    if backbone.init == "random":
        words.append("random")
    return " ".join(filter(None, words))


def reference_name(exact: object) -> str:
    """Return the name of an evaluation that trials share; ``exact`` is all that tells it from others."""
    return f"_references-{_digest(repr(exact))}"


def _safe_name(text: str, exact: str, *, ambiguous: bool) -> str:
    """Return ``text`` as the name of a folder, with a hash of ``exact`` where it might not be unique."""
    name = re.sub(r"[^\w.+-]", "_", text)
    if len(name) > _MAX_CHARACTERS or name != text or ambiguous:
        # The hash is of everything that tells it apart, not of the shortened text.
        name = f"{name[:_MAX_CHARACTERS]}-{_digest(exact)}"
    return name


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
