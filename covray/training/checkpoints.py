"""The checkpoints of a run folder, so that a training can be killed anywhere and continued.

    checkpoints/step-00000100/{adapter_config.json, adapter_model.safetensors, state.safetensors, state.json}

A checkpoint counts once it has its ``state.json``, which names the hashes of its other files. Its state holds whole
tensors by parameter, so it depends neither on the number of workers nor on the ZeRO stage. docs/formats.md describes
the rest of a run folder.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from covray.config import differences
from covray.config.section import JsonObject
from covray.errors import ConfigError, DatasetError
from covray.io.storage import Folder
from covray.training.records import BestValidation, CheckpointRecord

CHECKPOINTS = "checkpoints"
EXPORT = "adapter"
"""The folder of the result, a copy of the files that the chosen checkpoint exports."""
_STATE_FILE = "state.safetensors"
_NAME = re.compile(r"step-\d{8,}")
"""What ``checkpoint_name`` returns."""


@dataclass(frozen=True)
class State:
    """Where a training stands after ``step`` steps."""

    step: int
    cursor: int
    """Examples that the steps took, counted through all epochs: the next step begins there."""
    tensors: Mapping[str, Tensor]
    """For every trained parameter, by name: ``NAME`` its float32 value, ``NAME.exp_avg`` and ``NAME.exp_avg_sq`` the
    moments of Adam. Beside them what the objective's ``Rewriter`` wrote."""
    best: BestValidation | None
    numerics: JsonObject
    """The settings that change the order in which floats are added, and so the last bits, but not the result."""


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after ``step`` steps, below ``checkpoints``."""
    return f"step-{step:08d}"


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, out: str, identity: JsonObject, keep: int):
        """Open the checkpoints; nothing is read yet.

        Args:
            out: The run folder, local or on any filesystem pyarrow knows.
            identity: The part of the configuration that decides the losses.
            keep: How many of the last checkpoints to keep, beside the best.
        """
        self._run = Folder(out)
        self._folder = self._run / CHECKPOINTS
        self._identity, self._keep = dict(identity), keep

    def write(self, state: State, exported: Mapping[str, bytes]) -> None:
        """Write a whole checkpoint, then delete the checkpoints that need not be kept.

        Args:
            state: The state of the training.
            exported: The files of the result as they are after this step, by name.
        """
        folder = self._folder / checkpoint_name(state.step)
        files = {**exported, _STATE_FILE: save(dict(state.tensors))}
        hashes = {}
        for name, data in files.items():
            folder.write_bytes(name, data)
            # Hashes are checked when a checkpoint is read: one that storage damaged must not be continued from.
            hashes[name] = _sha256(data)
        record = CheckpointRecord(
            step=state.step,
            cursor=state.cursor,
            best=state.best,
            how=dict(state.numerics),
            identity=self._identity,
            files=hashes,
        )
        # The description is written last, so that a checkpoint without it is known to be incomplete.
        record.write(folder)
        self._delete_others(state)

    def read_last(self) -> tuple[State | None, list[str]]:
        """Return the newest whole checkpoint, or None, and the names of newer ones that are corrupt.

        Raises:
            ConfigError: The checkpoint is of another configuration.
            OSError: The storage failed.
        """
        corrupt = []
        for name in sorted(_checkpoint_names(self._folder.list_files()), reverse=True):
            folder = self._folder / name
            try:
                record, tensors = _read(folder)
            except (DatasetError, FileNotFoundError, SafetensorError, ValueError):
                # A process that is killed while it writes leaves such a folder: the one before it is used.
                corrupt.append(name)
                continue
            require_same(folder.path, record.identity, self._identity)
            return State(record.step, record.cursor, tensors, record.best, record.how), corrupt
        return None, corrupt

    def export(self, step: int) -> str:
        """Copy the files that the checkpoint after ``step`` steps exports to the run's ``adapter``; return its path."""
        checkpoint, result = self._folder / checkpoint_name(step), self._run / EXPORT
        for name in CheckpointRecord.read(checkpoint).files:
            if name != _STATE_FILE:
                result.write_bytes(name, checkpoint.read_bytes(name))
        return result.path

    def _delete_others(self, state: State) -> None:
        """Keep the last checkpoints up to ``state`` and the best; delete later and incomplete ones."""
        files = set(self._folder.list_files())
        names = _checkpoint_names(files)
        whole = {name for name in names if f"{name}/{CheckpointRecord.FILE}" in files}
        newest = checkpoint_name(state.step)
        # Names sort as their steps do. Later ones are of a run that was continued from an earlier checkpoint.
        up_to_now = sorted(name for name in whole if name <= newest)
        kept = set(up_to_now[-self._keep :])
        if state.best is not None:
            kept.add(checkpoint_name(state.best.step))
        for name in names - kept:
            folder = self._folder / name
            if name in whole:  # first: a kill in between must not leave half a checkpoint that counts
                folder.delete_file(CheckpointRecord.FILE)
            folder.delete()


def _checkpoint_names(files: Iterable[str]) -> set[str]:
    """Return the names of the checkpoints that ``files`` lie in; what else a user keeps there is left alone."""
    names = set()
    for file in files:
        name, below, _ = file.partition("/")
        if below and _NAME.fullmatch(name):
            names.add(name)
    return names


def require_same(path: str, recorded: JsonObject, current: JsonObject, *, open_matches: bool = False) -> None:
    """Refuse to continue with another configuration. Raises ConfigError, which says what differs.

    Args:
        path: What is continued.
        recorded: The identity of what is continued.
        current: The identity of the configuration at hand.
        open_matches: Whether values that the configuration at hand leaves open agree with anything.
    """
    differing = differences(dict(recorded), dict(current), open_matches=open_matches)
    if differing:
        raise ConfigError(
            f"{path}: was begun with another configuration: {'; '.join(differing)}; give the same, or another --out"
        )


def _read(folder: Folder) -> tuple[CheckpointRecord, dict[str, Tensor]]:
    """Return a whole checkpoint: its description and the tensors of its state.

    Raises:
        DatasetError: The description is absent or cannot be used.
        FileNotFoundError: A file is missing.
        SafetensorError: The state cannot be parsed.
        ValueError: A file is not the one that was written.
        OSError: The storage failed.
    """
    try:
        record = CheckpointRecord.read(folder)
    except DatasetError as error:
        if isinstance(error.__cause__, OSError):  # storage that is away does not make a checkpoint corrupt
            raise error.__cause__ from None
        raise
    contents = {}
    for name, expected in record.files.items():
        contents[name] = folder.read_bytes(name)
        if _sha256(contents[name]) != expected:
            raise ValueError(f"{name}: is not the file that was written")
    if _STATE_FILE not in contents:
        raise ValueError(f"{_STATE_FILE}: is missing")
    return record, load(contents[_STATE_FILE])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
