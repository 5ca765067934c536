"""A tracker: lines of JSON beside the folder of a command."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Lines:
    """Appends a line for each step to ``NAME.lines.jsonl``."""

    def __init__(self, config: Any, run_id: str | None, command: str):
        """Choose the file."""
        self._file = Path(f"{config.out.rstrip('/')}.lines.jsonl")

    def start(self) -> str:
        """Return the file's name."""
        return self._file.name

    def log(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Append the metrics of a step."""
        self._append({"step": step, **metrics})

    def artefacts(self, folder: str, names: Iterable[str]) -> None:
        """Append the files' names."""
        self._append({"files": list(names)})

    def finish(self, status: str) -> bool:
        """Append how the command ended."""
        self._append({"status": status})
        return True

    def _append(self, line: dict[str, Any]) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{json.dumps(line)}\n")
