"""The package in tests/plugin, installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def install_plugin(folder: Path) -> str:
    """Build and install the package below ``folder``, without any network; return a PYTHONPATH that has it."""
    shutil.copytree(ROOT / "tests" / "plugin", folder / "source")  # a build writes beside its sources
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation",
        "--target", str(folder / "site"), str(folder / "source"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    return os.pathsep.join([str(folder / "site"), str(ROOT)])
