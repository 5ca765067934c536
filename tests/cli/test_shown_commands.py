"""The commands that the pages show are taken: each is parsed, and its configuration is accepted. Nothing is run.

``tests/test_cluster.py`` has those of the pages about clusters.
"""

from __future__ import annotations

import inspect
import itertools
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer

from covray.cli.app import app
from covray.cli.options import StepOptions

ROOT = Path(__file__).parents[2]
_OTHERS = ("CHANGELOG.md", "docs/commands.md", "docs/cluster.md")
"""What was once, what is generated, and what is tested elsewhere."""
PAGES = sorted(
    {*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "covray").rglob("README.md")}
    - {ROOT / name for name in _OTHERS}
)
COMMANDS: Any = typer.main.get_command(app)
_COMMAND = re.compile(r"^(?:[A-Z_]+=\S+ )*(?:\S*/)?(?:covray|python jobs/(\w+)\.py) (.*)")
_JOBS = {"build_chains": "build"}
"""Scripts of jobs/ that have another name than their command."""


def lines_of(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each line of the page's shell blocks that calls covray or a script of jobs/."""
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                found = _COMMAND.match(command)
                if found is None:
                    continue
                words = shlex.split(found[2], comments=True)
                words = list(itertools.takewhile(lambda word: word != ">", words))
                yield [_JOBS.get(found[1], found[1]), *words] if found[1] else words


LINES = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}-{number}")
    for page in PAGES
    for number, words in enumerate(lines_of(page))
]


def options_of(*commands: Any) -> set[str]:
    """Return the options of commands; every command takes the first three."""
    known = {"--help", "--debug", "--dashboard"}
    for command in commands:
        for parameter in command.params:
            known |= {*parameter.opts, *parameter.secondary_opts}
    return known


class Resolved(Exception):
    """Ends a command as soon as its configuration is accepted."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that looks like the reader's: a clone, and a plan of their own."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "configs" / "plan" / "ten-million.yaml", tmp_path / "my-plan.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("words", LINES)
def test_a_line_that_is_shown_is_taken(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, arguments = COMMANDS, words
    if words[0].startswith("--"):  # covray's own
        assert set(words) <= options_of(COMMANDS)
        return
    if words[0] == "submit":
        sent = COMMANDS.commands["submit"].make_context("submit", words[1:])
        arguments = [sent.params["step"], *sent.args]
    while hasattr(command, "commands"):
        command, arguments = command.commands[arguments[0]], arguments[1:]
    parsed = command.make_context(command.name, arguments)
    function = inspect.unwrap(command.callback)
    if not any(isinstance(value, StepOptions) for value in function.__globals__.values()):
        return
    if "resolve" not in function.__code__.co_names or parsed.params.get("resume"):
        return
    resolve = StepOptions.resolve

    def stop(*given: Any, **more: Any) -> NoReturn:
        resolve(*given, **more)
        raise Resolved

    monkeypatch.setattr(StepOptions, "resolve", stop)
    with pytest.raises(Resolved):
        command.invoke(parsed)


def phrases_of(page: Path) -> Iterator[list[str]]:
    """Yield the arguments of each covray command that stands within the page's text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for phrase in re.findall(r"`covray\s([^`]+)`", text):
        yield phrase.split()


PHRASES = [
    pytest.param(words, id=f"{page.relative_to(ROOT)}-{number}")
    for page in (*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")))
    for number, words in enumerate(phrases_of(page))
]


def named(command: Any, words: list[str]) -> Iterator[Any]:
    """Yield the commands that a phrase names: ``think features|train`` are two."""
    if not words or not hasattr(command, "commands") or words[0].startswith("--"):
        yield command
        return
    for name in words[0].split("|"):
        if name.isupper():  # any command
            continue
        yield from named(command.commands[name], words[1:])


@pytest.mark.parametrize("words", PHRASES)
def test_a_phrase_names_commands_and_options_that_there_are(words: list[str]) -> None:
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    for command in named(COMMANDS, words):
        if command.name != "submit":  # which takes the options of any step
            assert options <= options_of(command, *getattr(command, "commands", {}).values())
