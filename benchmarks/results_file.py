"""The dated file of a measurement, alike for all benchmarks: when, on what, which versions, by which command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

import torch


def write_result(path: Path, title: str, packages: Iterable[str], lines: Iterable[str]) -> None:
    """Write ``lines`` of Markdown below a heading that names the day, the hardware and the versions of ``packages``."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    heading = [
        f"# {title}, {datetime.date.today().isoformat()}",
        "",
        f"{cpu}, {os.cpu_count()} logical cores{gpu}; Python {platform.python_version()}, {versions}.",
        f"Load average at the end: {os.getloadavg()[0]:.1f}.",
        "",
        f"    python {shlex.join(sys.argv)}",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*heading, "", *lines, ""]), encoding="utf-8")
