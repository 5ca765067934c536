"""Model folders: where the weights are, whether they are complete, and a fingerprint of what is loaded."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePath

from covray.errors import WeightsError, one_line

NANO_FOLDER = Path(__file__).parents[1] / "assets" / "nano"
"""The first edition of the models that ship with the package: one folder a model."""
NANO_2_FOLDER = NANO_FOLDER.with_name("nano-2")
"""The second edition, of a tokenizer and an LVM."""
_ONE_EDITION = ("prior", "vlm")
"""Models that both editions have in common."""
NANO_NAMES = ("nano", "nano-1", "nano-2")
"""Paths that name models of the package; ``nano`` is the first edition."""
INDEX_SUFFIX = ".index.json"
"""Of the file that lists the files that sharded weights are in."""


def resolve_folder(path: str, revision: str | None, nano_name: str, allow_patterns: Sequence[str]) -> Path:
    """Return the local folder of a model; a hub's repository is downloaded, or taken from the hub's cache.

    Args:
        path: One of ``NANO_NAMES``, an existing folder, or a hub id (``owner/name``).
        revision: Commit, tag or branch of the hub id; None is its main branch.
        nano_name: Folder of the shipped model that such a name stands for.
        allow_patterns: Files of the hub id that are downloaded, and with them the files that their indexes list.

    Raises:
        WeightsError: There is no such folder, or the hub does not provide it.
    """
    if path in NANO_NAMES:
        folder = NANO_FOLDER / nano_name
        if path == "nano-2" and nano_name not in _ONE_EDITION:
            folder = NANO_2_FOLDER / nano_name
        if not folder.is_dir():
            raise WeightsError(f"{folder}: the nano {nano_name} is not installed; reinstall covray, or give a folder")
        return folder
    local = local_path(path)
    if local.is_dir():
        return local
    if not is_hub_id(path):
        raise WeightsError(f"{path}: no such folder; give nano, an existing model folder, or a hub id (owner/name)")
    return _download(path, revision, allow_patterns)


def local_path(path: str) -> Path:
    """Return ``path`` with ``~`` and ``~name`` as the homes that they stand for."""
    # Path.expanduser raises for a home that nobody has; os.path's leaves the ~, and the folder is simply not there.
    return Path(os.path.expanduser(path))


def is_here(path: str) -> bool:
    """Return whether the models of ``path`` ship with the package or are a folder of this machine."""
    return path in NANO_NAMES or local_path(path).is_dir()


def is_hub_id(path: str) -> bool:
    """Return whether ``path`` is ``owner/name`` on a hub, and no folder here."""
    local = local_path(path)
    if local.is_dir() or local.is_absolute() or path.startswith((".", "~")):
        return False
    return path.count("/") == 1


def require_files(folder: Path, names: Iterable[str | tuple[str, ...]]) -> None:
    """Check that the files ``names`` (relative to ``folder``) exist; of a tuple of names any one is enough.

    Raises WeightsError naming the first that is missing.
    """
    for name in names:
        choices = (name,) if isinstance(name, str) else name
        if not any((folder / choice).is_file() for choice in choices):
            raise WeightsError(f"{folder}: {' or '.join(choices)} is missing; complete the folder, or give another")


def require_whole(folder: Path, report: Mapping[str, Collection[str]]) -> None:
    """Refuse a folder of which diffusers or transformers report missing tensors. Raises WeightsError.

    They fill a missing tensor with random numbers and only warn.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise WeightsError(
            f"{folder}: {len(missing)} tensors are missing, {missing[0]} among them; fetch the folder again"
        )


def indexed_files(index: Path) -> list[Path]:
    """Return the files that an index (``*.index.json``) lists, sorted; whatever they are called.

    Raises WeightsError for an index that cannot be read, or that leads out of its folder.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if PurePath(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index}: cannot be read ({one_line(error)}); get the folder again") from error
    if outside:
        raise WeightsError(f"{index}: lists {outside[0]}, which is not a file of its folder; get the folder again")
    return [index.parent / name for name in names]


def fingerprint_folder(folder: Path, patterns: Iterable[str]) -> str:
    """Return a SHA-256 (hex) over the names and bytes of the files below ``folder`` that are loaded.

    They are those that match any of the glob ``patterns``, and all files that an index among them lists. Files are
    streamed: no tensor is loaded. Raises WeightsError when nothing matches, or for an index that leads out of its
    folder; listed files that are missing are left to the loader, which may not need that index.
    """
    files: set[Path] = set()
    for pattern in patterns:
        files.update(file for file in folder.glob(pattern) if file.is_file())
    for file in list(files):  # a copy: what the indexes list is added meanwhile
        if file.name.endswith(INDEX_SUFFIX):
            files.update(listed for listed in indexed_files(file) if listed.is_file())
    if not files:
        raise WeightsError(f"{folder}: holds no model files; give a complete model folder")
    whole = hashlib.sha256()
    for name in sorted(file.relative_to(folder).as_posix() for file in files):
        with (folder / name).open("rb") as opened:
            # Parted by a zero byte, which no name holds: other names and hashes cannot make the same text.
            whole.update(f"{name}\0{hashlib.file_digest(opened, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _download(hub_id: str, revision: str | None, allow_patterns: Sequence[str]) -> Path:
    # Imported here: a run on local weights needs no hub client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(allow_patterns)))
        listed = _unmatched_shards(folder, allow_patterns)
        if listed:
            # A snapshot's folder is named by its commit, so that both downloads are of one revision.
            folder = Path(snapshot_download(hub_id, revision=folder.name, allow_patterns=listed))
    # Offline with an empty cache is a FileNotFoundError; Xet, where the hub keeps large files, raises RuntimeErrors.
    except (HfHubHTTPError, HFValidationError, OSError, RuntimeError) as error:
        name = hub_id
        if revision is not None:
            name += f"@{revision}"
        raise WeightsError(
            f"{name}: no such folder, and the hub does not provide it ({one_line(error)}); download it where there is "
            "a network and give its folder"
        ) from error
    return folder


def _unmatched_shards(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Return patterns of the files that the downloaded indexes list and that no pattern has brought."""
    missing = []
    for pattern in patterns:
        if pattern.endswith(INDEX_SUFFIX):
            for index in folder.glob(pattern):
                missing += [file for file in indexed_files(index) if not file.is_file()]
    return [glob.escape(file.relative_to(folder).as_posix()) for file in missing]
