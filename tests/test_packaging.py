"""What pyproject.toml requires: all that is imported and little else, installable where the documentation says."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = [Requirement(text) for text in PROJECT["dependencies"]]

MODULES = {
    "yaml": "pyyaml", "PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn",
    "huggingface_hub": "huggingface-hub", "pydantic_core": "pydantic", "markupsafe": "jinja2",
}  # fmt: skip
"""Module -> the package that brings it, where the names differ."""

PLATFORMS = {
    "Linux x86_64": {"sys_platform": "linux", "platform_machine": "x86_64", "platform_system": "Linux"},
    "Linux aarch64": {"sys_platform": "linux", "platform_machine": "aarch64", "platform_system": "Linux"},
    "macOS arm64": {"sys_platform": "darwin", "platform_machine": "arm64", "platform_system": "Darwin"},
    "Windows AMD64": {"sys_platform": "win32", "platform_machine": "AMD64", "platform_system": "Windows"},
}

EVERYWHERE = {
    "numpy", "pandas", "pillow", "pyarrow", "pydantic", "pyyaml", "msgpack", "ray", "safetensors", "scikit-image",
    "scikit-learn", "scipy", "simplejpeg", "sqlalchemy", "tokenizers", "torch",
}  # fmt: skip
"""Packages with compiled code that have a wheel for CPython 3.11 on all PLATFORMS, by pip on 2026-11-29."""

WHEELS = {"embreex": {"Linux x86_64", "macOS arm64", "Windows AMD64"}}
"""Packages with compiled code that have wheels on some PLATFORMS only, by pip on 2026-11-29."""

SOURCES = {"deepspeed": {"Linux x86_64", "Linux aarch64"}}
"""Packages that pip installs from source, as they compile nothing then, and where their authors support it."""

PURE = {
    "diffusers", "fastapi", "huggingface-hub", "jinja2", "mlflow", "packaging", "peft", "prometheus-client", "rich",
    "starlette", "transformers", "trimesh", "typer", "uvicorn",
}  # fmt: skip
"""Packages whose wheels are for any platform."""

OPTIONAL = {"tensorboard", "torchmetrics", "wandb"}
"""Packages of an extra for users: where one is not installed, what needs it says so."""

BESIDE = {"trackio"}
"""Optional packages that no extra can name: this one asks for an older Pillow than covray (docs/training.md)."""


def name_of(requirement: Requirement) -> str:
    return canonicalize_name(requirement.name)


@pytest.mark.parametrize("platform", PLATFORMS)
def test_every_requirement_can_be_installed(platform: str) -> None:
    environment = PLATFORMS[platform] | {"python_version": "3.11", "python_full_version": "3.11.7"}
    for requirement in REQUIREMENTS:
        name = name_of(requirement)
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            assert platform not in WHEELS.get(name, set()) | SOURCES.get(name, set()), f"{name} is left out here"
            continue
        places = WHEELS.get(name) or SOURCES.get(name)
        assert name in EVERYWHERE | PURE | {"python-multipart"} or (places and platform in places), name


def test_every_import_is_required_and_every_requirement_imported() -> None:
    imported = set()
    for file in sorted((ROOT / "covray").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    packages = set()
    for module in imported - set(sys.stdlib_module_names) - {"covray"}:
        packages.add(canonicalize_name(MODULES.get(module, module)))
    required = {name_of(requirement) for requirement in REQUIREMENTS}
    assert packages - required == OPTIONAL | BESIDE
    extras = PROJECT["optional-dependencies"]
    of_users = [Requirement(text) for name in extras if name not in ("test", "docs") for text in extras[name]]
    assert {name_of(requirement) for requirement in of_users} == OPTIONAL
    assert required - packages - {"python-multipart"} == set()


def test_every_cap_has_its_reason_beside_it() -> None:
    """The reason stands on the line, or on the line before, and names a test that there is."""
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    start = lines.index("dependencies = [")
    block = lines[start + 1 : lines.index("]", start)]
    for number, line in enumerate(block):
        if not re.match(r'\s*"[^"]*<', line):
            continue
        comment = line.partition("#")[2] or block[number - 1].partition("#")[2]
        tests = re.findall(r"tests/[\w/]+\.py", comment)
        assert tests, f"no reason: {line.strip()}"
        assert all((ROOT / test).exists() for test in tests), line


def test_the_page_says_how_many_packages_are_required() -> None:
    page = (ROOT / "docs" / "install.md").read_text()
    assert re.search(r"covray itself requires (\d+)", page)[1] == str(len(REQUIREMENTS))  # type: ignore[index]
