"""The pages describe what is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import covray
from covray.cli.app import app
from covray.cli.reference import commands_page
from covray.config import BuildConfig, EvaluateConfig, Section, SweepConfig
from covray.config.reference import STEPS, key_text, reference_page
from scripts import docs_site

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


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


def test_no_page_says_a_section_twice() -> None:
    twice = []
    for page in (ROOT / "README.md", *PAGES):
        headings = re.findall(r"^#{2,} .*$", page.read_text(), flags=re.MULTILINE)
        for heading in sorted(set(headings)):
            if headings.count(heading) > 1:
                twice.append(f"{page.name}: {heading}")
    assert twice == []


def test_every_link_of_the_pages_leads_somewhere() -> None:
    for page in (*sorted(ROOT.glob("*.md")), *PAGES, *NOTEBOOKS):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            target = target.partition("#")[0]
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_page_is_in_the_navigation_once() -> None:
    """MkDocs' own check, which needs MkDocs, is a step of .ci/run."""
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    named = list(files_of(navigation))
    assert len(named) == len(set(named))
    expected = {str(page.relative_to(ROOT / "docs")) for page in PAGES}
    expected |= {f"notebooks/{notebook.stem}.md" for notebook in NOTEBOOKS}
    expected |= {f"project/{page.name}" for page in ROOT.glob("*.md") if page.name != "README.md"}
    assert set(named) == expected


def test_the_site_is_built_strictly_by_every_ci_run() -> None:
    """``--quiet`` would keep warnings from being counted, so that a strict build would let broken links pass."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    (command,) = [line for line in lines if "mkdocs build" in line]
    assert command.endswith(".venv/bin/mkdocs build --strict")


def files_of(navigation: Any) -> Iterator[str]:
    """Yield the pages of a part of the navigation."""
    if isinstance(navigation, str):
        yield navigation
    for part in navigation if isinstance(navigation, list) else ():
        yield from files_of(part)
    for part in navigation.values() if isinstance(navigation, dict) else ():
        yield from files_of(part)


def test_the_reference_has_every_public_name_once() -> None:
    shown = re.findall(r"^::: covray\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted({*shown, "__version__"}) == sorted([*covray.__all__, "errors"])
    assert len(shown) == len(set(shown))


PAGES_OF_THE_SITE = {
    "index.md",
    "training.md",
    "tutorials/coco.md",
    "project/CONTRIBUTING.md",
    "project/covray/a/README.md",
}


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("training.md", "[a](../CONTRIBUTING.md#tests)", "[a](project/CONTRIBUTING.md#tests)"),
        ("tutorials/coco.md", "[a](../training.md)", "[a](../training.md)"),
        ("tutorials/coco.md", "[a](../../README.md)", "[a](../index.md)"),
        ("training.md", "![a [b]](../covray/a/README.md)", "![a [b]](project/covray/a/README.md)"),
        ("project/CONTRIBUTING.md", "[a](docs/training.md)", "[a](../training.md)"),
        ("project/covray/a/README.md", "[a](../../docs/training.md)", "[a](../../../training.md)"),
        ("project/CONTRIBUTING.md", "[the licence](LICENSE), kept", "the licence, kept"),
        ("training.md", "[a](no_page.md)", "[a](no_page.md)"),  # MkDocs refuses it
        ("training.md", "[a](https://example.org/a.md) [b](#b)", "[a](https://example.org/a.md) [b](#b)"),
        ("training.md", "```sh\n[a](../CONTRIBUTING.md)\n```", "```sh\n[a](../CONTRIBUTING.md)\n```"),
    ],
)
def test_a_link_of_the_repository_becomes_one_of_the_site(page: str, link: str, expected: str) -> None:
    assert docs_site.site_links(link, page, PAGES_OF_THE_SITE) == expected


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


def test_the_page_of_the_commands_is_what_their_help_says() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    assert page == commands_page(), "python -m covray.cli.reference > docs/commands.md"
    options = {name for name in options_of(typer.main.get_command(app)) if name.startswith("--")}
    assert [name for name in sorted(options) if name not in page] == ["--show-completion"]


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


@pytest.mark.parametrize(
    ("html", "outside"),
    [
        ('<script defer src="https://a.org/x.js">', ["https://a.org/x.js"]),
        ('<link rel="preconnect" href="https://fonts.org" crossorigin>', ["https://fonts.org"]),
        ('<img alt="a" src="https://a.org/b.png">', ["https://a.org/b.png"]),
        ('<a href="https://a.org">a</a><img src="b.png"><link rel="canonical" href="https://a.org">', []),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(html: str, outside: list[str]) -> None:
    assert docs_site.outside_requests(html) == outside
