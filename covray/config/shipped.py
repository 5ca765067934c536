"""The files of ``configs/`` and ``cluster/``: beside the package in a clone, inside it where it is installed."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = {"configs": (".yaml",), "cluster": (".yaml", "Dockerfile")}
"""Folder -> how the names of its files end."""


def shipped_files() -> dict[str, Path]:
    """Return the shipped files by name: ``paper/train-7b`` of configs/, ``cluster/gpu.yaml`` of cluster/; sorted."""
    files = {}
    for name, endings in _FOLDERS.items():
        folder = _folder(name)
        for path in sorted(folder.rglob("*")):
            if path.name.endswith(endings) and path.is_file():
                inner = path.relative_to(folder).as_posix()
                files[inner.removesuffix(".yaml") if name == "configs" else f"{name}/{inner}"] = path
    return files


def find_config(file: str | Path) -> Path:
    """Return the file that ``--config`` names: itself where it exists, else the shipped file of that name.

    ``paper/train-7b``, ``paper/train-7b.yaml`` and ``configs/paper/train-7b.yaml`` name the same. A name that is none
    comes back as it is.
    """
    given = Path(file)
    if given.exists():
        return given
    name = given.as_posix().removeprefix("configs/").removesuffix(".yaml")
    return shipped_files().get(name, given)


def _folder(name: str) -> Path:
    """Return the folder ``name``; the wheel has it below covray/assets/ (pyproject.toml)."""
    installed = _PACKAGE / "assets" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
