"""The pages describe what is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from covray.config import BuildConfig, EvaluateConfig, Section, SweepConfig
from covray.config.reference import STEPS, key_text, reference_page

ROOT = Path(__file__).parents[1]


def fields(model: type[Section], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield every key of a configuration with the docstring of its field; a section's own is that of its class."""
    for name, field in model.model_fields.items():
        if isinstance(field.default, Section):
            yield f"{prefix}{name}", field.description or type(field.default).__doc__ or ""
            yield from fields(type(field.default), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""


def keys(model: type[Section]) -> list[str]:
    """Return the dotted names of all values of a configuration."""
    named = [key for key, _ in fields(model)]
    return [key for key in named if not any(other.startswith(f"{key}.") for other in named)]


@pytest.mark.parametrize("step", STEPS)
def test_every_key_of_the_configuration_has_a_docstring(step: str) -> None:
    assert [key for key, text in fields(STEPS[step]) if not text.strip().endswith(".")] == []


def test_the_page_of_the_configuration_is_what_the_fields_say() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert page == reference_page(), "python -m covray.config.reference > docs/configuration.md"


@pytest.mark.parametrize("step", STEPS)
def test_the_page_of_the_configuration_has_every_key_and_no_other(step: str) -> None:
    lines = reference_page().split(f"## {step}\n")[1].split("\n## ")[0].splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| key")]
    assert [row.split(" | ")[0].strip("|`* ") for row in rows] == [key for key, _ in fields(STEPS[step])]


def test_the_text_of_a_key_is_found_by_its_dotted_name() -> None:
    assert key_text(BuildConfig, "prior.steps").startswith("DDIM steps")
    assert key_text(EvaluateConfig, "backbone.scale") == key_text(SweepConfig, "grid.scales.scale")
    with pytest.raises(KeyError):
        key_text(BuildConfig, "prior.steps.more")


def test_every_link_of_the_pages_leads_somewhere() -> None:
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))):
        for target in (part.split(")")[0] for part in page.read_text().split("](")[1:]):
            target = target.partition("#")[0]
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"
