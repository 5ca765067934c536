"""The pages describe what is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from covray.config import BuildConfig, EvaluateConfig, GenerateConfig, PlanConfig, Section, SweepConfig, TrainConfig

ROOT = Path(__file__).parents[1]


def keys(model: type[Section], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        if isinstance(field.default, Section):
            yield from keys(type(field.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("build", BuildConfig),
        ("train", TrainConfig),
        ("generate", GenerateConfig),
        ("evaluate", EvaluateConfig),
        ("sweep", SweepConfig),
        ("plan", PlanConfig),
    ],
)
def test_every_key_of_the_configuration_is_documented_and_no_other(section: str, model: type[Section]) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    lines = page.split(f"## {section}\n")[1].split("\n## ")[0].splitlines()
    documented = [line.split("`")[1] for line in lines if line.startswith("| `")]
    assert documented == list(keys(model))


def test_every_link_of_the_pages_leads_somewhere() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for target in (part.split(")")[0] for part in page.read_text().split("](")[1:]):
            target = target.partition("#")[0]
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
