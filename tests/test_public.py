"""The public names of the package: each is imported when it is first used, and no earlier."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import covray

ROOT = Path(__file__).parents[1]


def test_every_public_name_is_what_its_module_defines() -> None:
    assert set(covray.__all__) == {*covray._MODULES, "__version__"}
    assert dir(covray) == sorted(covray.__all__)
    for name, module in covray._MODULES.items():
        value = getattr(covray, name)
        assert value.__name__ == name
        assert value.__module__.startswith(module)
    with pytest.raises(AttributeError, match="no attribute 'fly'"):
        covray.fly  # noqa: B018


def imported_by(script: str) -> set[str]:
    """Return the packages outside the standard library that a fresh process has imported after ``script``."""
    script = f"import sys; before = set(sys.modules); {script}; print(*sorted(set(sys.modules) - before))"
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packages = {module.partition(".")[0] for module in output.split()}
    return packages - set(sys.stdlib_module_names)


def test_the_package_imports_the_standard_library_alone() -> None:
    assert imported_by("import covray") == {"covray"}


def test_a_configuration_is_made_without_the_heavy_packages() -> None:
    imported = imported_by("import covray; covray.BuildConfig(pairs='p', out='o')")
    assert not imported & {"torch", "ray", "pyarrow", "diffusers", "scipy", "numpy"}


def test_a_pipeline_and_chains_are_opened_without_ray() -> None:
    assert "ray" not in imported_by("from covray import Pipeline, load_chains")
