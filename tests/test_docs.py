"""The pages describe what is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from covray.cli.app import app
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


OTHER_PROGRAMS = {"--generate", "--head", "--shm-size", "--temp-dir"}
"""Options of ray and docker that messages of covray name."""


def options_of(command: Any) -> set[str]:
    """Return the options that the help of a command and of its subcommands shows."""
    options = {"--help"}
    for parameter in command.params:
        options |= {*parameter.opts, *parameter.secondary_opts}
    for inner in getattr(command, "commands", {}).values():
        options |= options_of(inner)
    return options


def test_every_option_that_a_message_names_exists() -> None:
    shown = options_of(typer.main.get_command(app)) | OTHER_PROGRAMS
    unknown = []
    for file in sorted((ROOT / "covray").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Constant) or not isinstance(node.value, str):
                continue
            lines = [line for line in node.value.splitlines() if "-->" not in line]  # a drawing of arrows
            for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z](?![\w-])", "\n".join(lines)):
                if option not in shown:
                    unknown.append(f"{file.relative_to(ROOT)}:{node.lineno}: {option}")
    assert unknown == []
