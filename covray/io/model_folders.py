"""Model folders: where the weights are, whether they are complete, and a fingerprint of what was loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from covray.errors import WeightsError, one_line

NANO_FOLDER = Path(__file__).parents[1] / "assets" / "nano"
"""The family that ships with the package: one folder a model."""


def resolve_folder(path: str, revision: str | None, nano_name: str, allow_patterns: Sequence[str]) -> Path:
    """The local folder of a model.

    ``path`` is ``nano`` (the folder ``nano_name`` of the family that ships with the package), an existing folder, or a
    hub id, of which the files matching ``allow_patterns`` are downloaded, or taken from the hub's cache, at
    ``revision``.
    Raises WeightsError when there is no such folder or the hub does not give it.
    """
    if path == "nano":
        folder = NANO_FOLDER / nano_name
        if not folder.is_dir():
            raise WeightsError(f"{folder}: the nano {nano_name} is not installed; reinstall covray, or give a folder")
        return folder
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if local.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise WeightsError(f"{path}: no such folder; give nano, an existing model folder, or a hub id (owner/name)")
    return _download(path, revision, allow_patterns)


def require_files(folder: Path, names: Iterable[str | tuple[str, ...]]) -> None:
    """Check that the files ``names`` (relative to ``folder``) exist; of a tuple of names any one will do.

    Raises WeightsError naming the first that is missing.
    """
    for name in names:
        choices = (name,) if isinstance(name, str) else name
        if not any((folder / choice).is_file() for choice in choices):
            raise WeightsError(f"{folder}: {' or '.join(choices)} is missing; complete the folder, or give another")


def fingerprint_folder(folder: Path, patterns: Iterable[str]) -> str:
    """SHA-256 (hex) over the names and bytes of the files below ``folder`` that match any of the glob ``patterns``.

    Streams: no tensor is loaded. Raises WeightsError when nothing matches.
    """
    files = sorted({file.relative_to(folder).as_posix() for p in patterns for file in folder.glob(p) if file.is_file()})
    if not files:
        raise WeightsError(f"{folder}: holds no model files; give a complete model folder")
    whole = hashlib.sha256()
    for name in files:
        with (folder / name).open("rb") as file:
            whole.update(f"{name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _download(hub_id: str, revision: str | None, allow_patterns: Sequence[str]) -> Path:
    # Imported here: a run on local weights needs no hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(allow_patterns)))
    # Offline with an empty cache is a FileNotFoundError; Xet, where the hub keeps large files, raises RuntimeErrors.
    except (HfHubHTTPError, HFValidationError, OSError, RuntimeError) as error:
        raise WeightsError(
            f"{hub_id}{f'@{revision}' if revision else ''}: no such folder, and the hub does not give it "
            f"({one_line(error)}); download it where there is a network and give its folder"
        ) from error
