"""The contributor's pages name files that exist, and the package keeps what they promise of it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FOLDERS = ("covray/", "tests/", "scripts/", "docs/", "benchmarks", ".ci/")


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/architecture.md"])
def test_every_file_that_a_page_names_exists(page: str) -> None:
    names = re.findall(r"`([\w./-]+)`", (ROOT / page).read_text())
    paths = [name for name in names if name.startswith(FOLDERS) and "NAME" not in name]
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_the_citation_and_the_changelog_are_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert f"## [{project['version']}] - {citation['date-released']}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_hooks_are_tools_that_the_tests_need_anyway() -> None:
    tests = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    installed = {re.split(r"[>=\[]", requirement)[0] for requirement in tests}
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    names = {hook["id"].removesuffix("-check").removesuffix("-format") for hook in local["hooks"]}
    assert names == {"ruff", "mypy", "import-linter", "codespell"}
    assert names <= installed


def test_the_workflow_runs_what_must_hold_for_every_commit() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert workflow["permissions"] == {"contents": "read"}


def test_the_package_ships_what_its_pages_are_made_of_and_says_that_it_is_typed() -> None:
    package = ROOT / "covray"
    assert (package / "py.typed").exists()
    for folder, ending in (("templates", ".html"), ("static", ".css")):
        assert any(file.suffix == ending for file in (package / "report" / folder).iterdir())
    ignored = (ROOT / ".gitignore").read_text().split()
    assert not {"templates/", "static/", "*.css", "*.html"} & set(ignored), "hatch leaves out what git ignores"
