"""The tables of ``covray experiments diffusionvl``: what the programme found, its claims, and both as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from covray.evaluation.statistics import Difference
from covray.io.records import Record, RecordPart

BLOCK = 8
"""Tokens of a block, DiffusionVL's."""
SCORES = ("questions", "facts", "chrf")
WITHOUT_CACHE = "full sequence, no cache"
"""The decoder of full-sequence diffusion, as the table of speed names it."""


class Quality(RecordPart):
    """Blocks against the twin, over the same prompts and all seeds."""

    passes: int
    """Of a block of 8."""
    tokens_per_pass: float
    differences: dict[str, Difference | None]
    """Scores of the blocks less those of the twin."""


class Speed(RecordPart):
    """A decoder at batch 1."""

    decoder: str
    tokens_per_s: float
    over_autoregressive: float
    tokens_per_pass: float
    facts: float | None
    chrf: float | None


class Ablation(RecordPart):
    """A variant of the blocks."""

    variant: str
    nelbo_perplexity: float | None
    all_passes: dict[str, float | None]
    """Scores with as many passes as tokens."""
    quarter: dict[str, float | None]
    """Scores with a quarter of the passes."""


class Tables(Record):
    """What the programme found. A table that is not made yet is empty."""

    FILE = "results.json"
    FIX = "run the programme again"

    budget: str
    quality: list[Quality]
    speed: list[Speed] = Field(default_factory=list)
    ablations: list[Ablation] = Field(default_factory=list)
    claims: dict[str, bool | None] = Field(default_factory=dict)
    """Whether the claims of DiffusionVL hold here; null: not measured."""


def blocks_decoder(passes: int) -> str:
    """Return how the table of speed names blocks that are written in so many passes."""
    return f"blocks of {BLOCK} in {passes}"


def check_claims(quality: Sequence[Quality], speed: Sequence[Speed]) -> dict[str, bool | None]:
    """Return whether DiffusionVL's claims hold here; None: not measured."""
    claims: dict[str, bool | None] = {}
    # The first row of the quality has as many passes as tokens. No worse: the interval reaches zero.
    for score, difference in quality[0].differences.items():
        holds = None
        if difference is not None and difference.high is not None:
            holds = difference.high >= 0
        claims[f"{score}: with all passes no worse than autoregressive"] = holds

    rates = {line.decoder: line.tokens_per_s for line in speed}
    fastest = 0.0
    for of_passes in quality:
        fastest = max(fastest, rates[blocks_decoder(of_passes.passes)])
    whole = rates[WITHOUT_CACHE]
    is_faster = None
    if whole:
        is_faster = fastest >= 2 * whole
    claims["at least twice the speed of full-sequence diffusion without cache"] = is_faster
    return claims


def as_markdown(results: Tables) -> str:
    """Return the tables as Markdown."""
    tables = {
        "Quality": _quality_table(results.quality),
        "Speed": _speed_table(results.speed),
        "Ablations": _ablation_table(results.ablations),
        "Claims": _claims_table(results.claims),
    }
    sections = []
    for title, table in tables.items():
        # Only its heads: it is not made yet.
        if len(table) == 1:
            continue
        sections.append(f"## {title}\n{_markdown(table)}")
    return "\n".join(sections)


def _quality_table(quality: Sequence[Quality]) -> list[list[str]]:
    """Return the rows of a table, the heads first."""
    heads = [f"{score}, less autoregressive" for score in SCORES]
    table = [["passes", "tokens a pass", *heads]]
    for of_passes in quality:
        differences = [_difference(of_passes.differences[score]) for score in SCORES]
        table.append([str(of_passes.passes), f"{of_passes.tokens_per_pass:.2f}", *differences])
    return table


def _speed_table(speed: Sequence[Speed]) -> list[list[str]]:
    table = [["decoder, batch 1", "tokens/s", "over autoregressive", "tokens a pass", "facts", "chrf"]]
    for line in speed:
        figures = (line.tokens_per_s, line.over_autoregressive, line.tokens_per_pass, line.facts, line.chrf)
        table.append([line.decoder, *map(_number, figures)])
    return table


def _ablation_table(ablations: Sequence[Ablation]) -> list[list[str]]:
    # S is the passes of a block, D its tokens: as many passes as tokens, then a quarter of them.
    heads = ["variant", "NELBO perplexity"]
    for passes in ("D", "D/4"):
        heads += [f"{score}, S = {passes}" for score in SCORES]
    table = [heads]
    for variant in ablations:
        cells = [variant.variant, _number(variant.nelbo_perplexity)]
        for scores in (variant.all_passes, variant.quarter):
            cells += [_number(scores[score]) for score in SCORES]
        table.append(cells)
    return table


def _claims_table(claims: dict[str, bool | None]) -> list[list[str]]:
    table = [["claim", "holds"]]
    for claim, holds in claims.items():
        text = "not measured"
        if holds is not None:
            text = str(holds).lower()
        table.append([claim, text])
    return table


def _markdown(table: Sequence[Sequence[str]]) -> str:
    lines = [table[0], ["---"] * len(table[0]), *table[1:]]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}"


def _difference(value: Difference | None) -> str:
    if value is None:
        return ""
    if value.low is None:
        return f"{value.mean:+.3f}"
    return f"{value.mean:+.3f} ({value.low:+.3f} to {value.high:+.3f})"
