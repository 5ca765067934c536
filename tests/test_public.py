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


def test_the_package_is_imported_without_torch_or_ray() -> None:
    script = (
        "import sys, covray; config = covray.BuildConfig(pairs='p', out='o'); "
        "sys.exit(bool({'torch', 'ray', 'pyarrow', 'diffusers', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
