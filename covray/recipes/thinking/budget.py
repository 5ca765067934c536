"""How much of the programme is trained and asked."""

from __future__ import annotations

from dataclasses import dataclass, field

from covray.errors import ConfigError


@dataclass(frozen=True)
class Budget:
    """The sizes of a programme."""

    portraits: int
    """Rendered for the nano parts, a fifth of them for validation and test."""
    steps: dict[str, int] = field(default_factory=dict)
    """Steps of nano parts by name; those of the recipe where a part is not named."""
    captions: int = 20_000
    """Captions that the vision-language model writes for the aligners."""
    aligner_steps: int = 2500
    aligner_batch: int = 64
    episodes: int = 100
    """Of each task and number of shots."""
    shots: tuple[int, ...] = (2, 4)
    seeds: int = 3
    """Aligners of each kind."""
    painter_steps: int = 25
    guidance: float = 3.0


BUDGETS = {
    "full": Budget(portraits=40_000),
    "medium": Budget(portraits=16_000, captions=6000, aligner_steps=1000, episodes=30, painter_steps=15),
    "small": Budget(
        portraits=4000,
        steps={"text": 600, "vlm": 300, "painter": 600, "clip": 200, "judge": 400},
        captions=1000,
        aligner_steps=300,
        episodes=8,
        seeds=1,
    ),
}
"""``small`` runs every station in about an hour of one core; its accuracies say nothing of the method."""


def budget_of(name: str) -> Budget:
    """Return a budget. Raises ConfigError for a name that is none."""
    if name not in BUDGETS:
        raise ConfigError(f"--budget {name}: give one of {', '.join(BUDGETS)}")
    return BUDGETS[name]
