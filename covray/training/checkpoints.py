"""The run folder: what a training keeps of itself, so that it can be killed anywhere and continued.

    _run.json        written first: configuration, identity, fingerprints
    metrics.jsonl    one record a step, and one a validation
    checkpoints/step-00000100/{adapter_config.json, adapter_model.safetensors, state.safetensors, state.json}
    adapter/         PEFT, at the end: the best by validation loss, else the last
    _result.json     written last

A checkpoint counts once its ``state.json`` is there and names the bytes of its other files. Its state holds whole
tensors by parameter, so it depends neither on the number of workers nor on the ZeRO stage.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from covray.config import TrainConfig, differences
from covray.errors import ConfigError
from covray.io import storage

CHECKPOINTS = "checkpoints"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_REWRITE_EVERY_S = 5.0


@dataclass(frozen=True)
class State:
    """Where a run stands after ``step`` steps."""

    step: int
    cursor: int
    """Sentences seen, counted through all epochs: the next step begins there."""
    tensors: Mapping[str, Tensor]
    """Of every LoRA parameter, by our name: ``NAME`` its float32 value, ``NAME.exp_avg`` and ``NAME.exp_avg_sq``
    Adam's moments."""
    best: dict[str, float] | None
    """``step`` and ``validation_loss`` of the best validation so far."""
    how: Mapping[str, Any]
    """What changes the order in which floats are added, and so the last bits, but not the result: see ``summation``."""


def summation(config: TrainConfig, world: int) -> dict[str, Any]:
    """What may change between a run and its continuation, at the price of equality to the bit."""
    compute = config.compute.model_dump(include={"device", "threads", "recompute", "compile", "deepspeed"})
    return {"workers": world, "micro_batch_tokens": config.optimizer.micro_batch_tokens, **compute}


def checkpoint_name(step: int) -> str:
    """The folder of the checkpoint after ``step`` steps, below ``checkpoints``."""
    return f"step-{step:08d}"


def write_checkpoint(config: TrainConfig, state: State, adapter: Mapping[str, bytes]) -> None:
    """Write a whole checkpoint with the files ``adapter`` of PEFT, then delete those that need not be kept."""
    folder = storage.join(config.out, CHECKPOINTS, checkpoint_name(state.step))
    files = {**adapter, "state.safetensors": save(dict(state.tensors))}
    for name, data in files.items():
        storage.write_bytes(storage.join(folder, name), data)
    description = {
        "version": 1,
        "step": state.step,
        "cursor": state.cursor,
        "best": state.best,
        "how": dict(state.how),
        "identity": config.identity(),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    storage.write_json(storage.join(folder, "state.json"), description)
    _delete_others(config, state)


def read_last_checkpoint(config: TrainConfig) -> tuple[State | None, list[str]]:
    """The newest whole checkpoint of the run, if there is one, and the names of torn ones that were passed over.

    Raises ConfigError when it is of another configuration.
    """
    torn = []
    names = {name.split("/")[0] for name in storage.list_files(storage.join(config.out, CHECKPOINTS))}
    for name in sorted(names, reverse=True):
        folder = storage.join(config.out, CHECKPOINTS, name)
        try:
            description = storage.read_json(storage.join(folder, "state.json"))
            data = {file: storage.read_bytes(storage.join(folder, file)) for file in description["files"]}
            if any(hashlib.sha256(data[file]).hexdigest() != due for file, due in description["files"].items()):
                raise ValueError("a file is not the one that was written")
            tensors = load(data["state.safetensors"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, SafetensorError):
            torn.append(name)
            continue
        require_same(folder, description["identity"], config.identity())
        return State(description["step"], description["cursor"], tensors, description["best"], description["how"]), torn
    return None, torn


def require_same(where: str, theirs: dict[str, Any], ours: dict[str, Any], *, open_matches: bool = False) -> None:
    """Refuse to go on with another configuration; see ``covray.config.differences``. Raises ConfigError."""
    differing = differences(theirs, ours, open_matches=open_matches)
    if differing:
        raise ConfigError(
            f"{where}: was begun with another configuration: {'; '.join(differing)}; give the same, or another --out"
        )


def write_adapter(config: TrainConfig, step: int) -> str:
    """Copy the adapter of the checkpoint after ``step`` steps to the run's ``adapter``; gives that folder."""
    folder = storage.join(config.out, "adapter")
    for name in ADAPTER_FILES:
        source = storage.join(config.out, CHECKPOINTS, checkpoint_name(step), name)
        storage.write_bytes(storage.join(folder, name), storage.read_bytes(source))
    return folder


def read_records(path: str) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a last line that was cut short is none."""
    try:
        lines = storage.read_bytes(path).decode().split("\n")[:-1]  # what follows the last newline is cut short
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


class Curve:
    """``metrics.jsonl``, cut back to ``step`` and then added to: every step is there once, however often the run died.

    A local file grows by a line. Objects of a store cannot grow: they are written anew every few seconds.
    """

    def __init__(self, out: str, step: int | None):
        self.path = storage.join(out, "metrics.jsonl")
        self.records = [] if step is None else [r for r in read_records(self.path) if r["step"] <= step]
        storage.write_bytes(self.path, b"".join(map(_line, self.records)))
        self._file: io.BufferedWriter | None = None
        if "://" not in out:
            self._file = open(storage.resolve(self.path)[1], "ab")  # noqa: SIM115 (closed by close)
        self._written = time.monotonic()

    def add(self, record: dict[str, Any]) -> None:
        """Write a record: it has a ``step`` that is not below those before it."""
        self.records.append(record)
        if self._file:
            self._file.write(_line(record))
            self._file.flush()
        elif time.monotonic() - self._written > _REWRITE_EVERY_S:
            self.flush()

    def flush(self) -> None:
        """Make sure that all records can be read."""
        if not self._file:
            storage.write_bytes(self.path, b"".join(map(_line, self.records)))
            self._written = time.monotonic()

    def close(self) -> None:
        """Flush and let go of the file."""
        self.flush()
        if self._file:
            self._file.close()


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


def _delete_others(config: TrainConfig, state: State) -> None:
    """Keep the last ``keep`` checkpoints up to ``state`` and the best; later and torn ones belong to nobody."""
    folder = storage.join(config.out, CHECKPOINTS)
    files = storage.list_files(folder)
    whole = sorted(name.split("/")[0] for name in files if name.endswith("/state.json"))
    newest = checkpoint_name(state.step)
    kept = {name for name in whole if name <= newest}
    kept = set(sorted(kept)[-config.checkpoints.keep :])
    if state.best is not None:
        kept.add(checkpoint_name(int(state.best["step"])))
    filesystem, inner = storage.resolve(folder)
    for name in {name.split("/")[0] for name in files} - kept:
        if f"{name}/state.json" in files:  # first what makes it whole, so that a kill leaves no half that counts
            filesystem.delete_file(f"{inner}/{name}/state.json")
        filesystem.delete_dir(f"{inner}/{name}")
