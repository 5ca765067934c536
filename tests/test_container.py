"""The image's Dockerfile, without a builder: its stages, what it copies, the shell of its steps, its health check."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

import pytest
import typer

from covray.cli.app import app

ROOT = Path(__file__).parents[1]
FILE = ROOT / "cluster" / "kuberay" / "Dockerfile"
INSTRUCTIONS = {"ARG", "FROM", "RUN", "COPY", "HEALTHCHECK"}


@dataclass
class Stage:
    """A stage of the file: what it begins with, its name, and its instructions."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)


def instructions() -> list[tuple[str, str]]:
    """Return the instructions with their arguments, each on one line."""
    lines = [line for line in FILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    words = [line.partition(" ") for line in joined.splitlines()]
    return [(word, rest.strip()) for word, _, rest in words]


def stages() -> list[Stage]:
    """Return the stages, in order."""
    found: list[Stage] = []
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append(Stage(base, name))
        elif found:
            found[-1].steps.append((word, rest))
    return found


def test_every_instruction_is_one_that_is_checked_here() -> None:
    assert {word for word, _ in instructions()} == INSTRUCTIONS


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
def test_every_device_and_processor_has_a_base(device: str, architecture: str) -> None:
    *bases, image = stages()
    by_name = {stage.name: stage for stage in bases}
    name = Template(image.base).substitute(DEVICE=device, TARGETARCH=architecture)
    ending = "-aarch64" if architecture == "arm64" else ""
    assert by_name[name].base.endswith(f"-py311-{device}{ending}")
    assert len(by_name) == 4
    assert instructions()[0] == ("ARG", "DEVICE=gpu")  # the first: an argument of FROM


def test_what_is_copied_exists_and_arguments_are_declared() -> None:
    image = stages()[-1]
    declared = {rest.partition("=")[0] for word, rest in image.steps if word == "ARG"}
    for word, rest in image.steps:
        if word == "COPY":
            *sources, target = shlex.split(rest)[1:]
            assert target.startswith("/tmp/project/")
            assert all((ROOT / source).exists() for source in sources)
        if word == "RUN":
            assert set(re.findall(r"\$\{?(\w+)", rest)) <= declared
            subprocess.run(["sh", "-n", "-c", rest], check=True)


def test_torch_is_what_the_package_requires() -> None:
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (torch,) = [requirement for requirement in required if requirement.startswith("torch")]
    assert f'"{torch}"' in FILE.read_text()


def test_the_health_check_is_the_demo() -> None:
    ((_, check),) = [step for step in stages()[-1].steps if step[0] == "HEALTHCHECK"]
    options, _, command = check.partition(" CMD ")
    assert all(
        re.fullmatch(r"--(interval|start-period|timeout|retries)=\d+[ms]?", option) for option in options.split()
    )
    proof, _, demo = command.partition(" || ")
    words = shlex.split(demo)
    words = words[words.index("covray") + 1 :]
    root = typer.main.get_command(app)
    context = root.commands["demo"].make_context("demo", words[1:])  # type: ignore[attr-defined]
    assert words[0] == "demo"
    assert proof == f"test -s {context.params['out']}/evaluation/index.html"
