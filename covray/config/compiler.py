"""Whether this machine can do what ``compile`` asks for."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

from covray.errors import ConfigError


def require_compiler(field: str, device: str) -> None:
    """Check that this machine has what ``torch.compile`` needs.

    On a CPU it writes C++, on a GPU Triton writes C, and both use Python's headers.

    Args:
        field: The key of the configuration that asks for it.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: There is no compiler, or there are no headers.
    """
    name, default = ("CXX", ("g++",)) if device == "cpu" else ("CC", ("gcc", "clang"))
    compilers = (os.environ[name],) if os.environ.get(name) else default
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not any(shutil.which(compiler) for compiler in compilers):
        lacks, package = f"a compiler, and {' or '.join(compilers)} is not there", "g++"
    elif not header.is_file():
        lacks, package = f"Python's headers, and {header} is not there", "python3-dev"
    else:
        return
    raise ConfigError(f"{field}: torch.compile needs {lacks}; apt-get install {package}, or leave it false")
