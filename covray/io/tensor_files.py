"""Weights that other programs wrote: found, read without running anything that is in them, checked; and new folders.

A pickle can run code, so PyTorch files are read with ``weights_only``; names in an index never lead out of its folder.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import secrets
import shutil
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from covray.errors import ConfigError, WeightsError, one_line
from covray.io.model_folders import INDEX_SUFFIX, indexed_files, require_files

Shape = tuple[int, ...]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights. Integers and 8-bit floats are codes of a quantised model, which need scales to mean anything."""
STORED_FLOATS = ("F16", "BF16", "F32", "F64")
"""``FLOATS`` by their names in safetensors."""
_LEGACY_MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa85019")
"""In the first pickle of a PyTorch file that is no zip archive, as PyTorch wrote them before 1.6 (2020): its magic
number, ``torch.serialization.MAGIC_NUMBER``."""
_FRAME = pickle.FRAME[0]
"""First instruction of a pickle of protocol 4 or later. ``torch.save`` writes protocol 2."""
# What PyTorch's reader, plain Python for the most part, raises on damaged files.
_DAMAGED = (
    OSError,
    RuntimeError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    struct.error,
)


class _Inert:
    """Stands for a class that a file names without needing it."""


def weight_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of the first of ``names`` that ``folder`` has: the file itself, or all that an index lists.

    Empty when it has none of them. Raises WeightsError for an index that cannot be read, lists a file that is missing,
    or leads out of the folder.
    """
    for name in names:
        if (folder / name).is_file():
            files = indexed_files(folder / name) if name.endswith(INDEX_SUFFIX) else [folder / name]
            require_files(folder, [file.name for file in files])
            return files
    return []


def read_tensors(file: Path, keys: Sequence[str] = (), inert: Sequence[str] = ()) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` file, or of a PyTorch file of any age, by name.

    Those of safetensors and of PyTorch's zip archives are mapped: memory follows what is used. PyTorch files from
    before 1.6 are read whole.

    Args:
        file: The file; its suffix tells the two kinds apart.
        keys: Of a PyTorch file that holds more than weights, the first of these keys that it has is taken.
        inert: Full names of classes that the file may mention; an empty class stands in for them.

    Raises:
        WeightsError: The file cannot be read, holds other things than tensors, or needs code to be run.
    """
    values = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pytorch(file, keys, inert)
    for name, value in values.items():
        named = isinstance(name, str) and name.isprintable()  # else it could break the lines of a message
        if not (named and isinstance(value, Tensor) and value.layout == torch.strided):
            shown = name if named else repr(name)[:60]
            raise WeightsError(f"{file}: {shown} is not a plain tensor; give the weights alone, as safetensors")
    return values


def read_all_tensors(files: Sequence[Path]) -> dict[str, Tensor]:
    """Return the tensors of all ``files`` of a sharded model, by name.

    Raises WeightsError as ``read_tensors``, and for a tensor that is in two files: readers disagree on which counts.
    """
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_tensors(file).items():
            if name in tensors:
                raise duplicate_tensor(file, name)
            tensors[name] = tensor
    return tensors


def duplicate_tensor(file: Path, name: str) -> WeightsError:
    """Return the error about a tensor of ``file`` that another file of the folder has, too."""
    return WeightsError(f"{file}: {name} is also in another file of the folder; get the folder again")


def require_tensors(where: Path, shapes: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Compare names and shapes, both as the file has them.

    Raises WeightsError naming ``where`` and the first tensor that is missing, unexpected, or of another shape.
    """
    for name, shape in expected.items():
        if name not in shapes:
            raise WeightsError(f"{where}: {name} is missing; get the checkpoint again, or give another")
        if shapes[name] != shape:
            raise WeightsError(f"{where}: {name} is {list(shapes[name])}, not {list(shape)}; give another checkpoint")
    unexpected = shapes.keys() - expected.keys()
    if unexpected:
        raise WeightsError(
            f"{where}: unexpected tensor {min(unexpected)}; give a checkpoint of the architecture it states"
        )


def require_finite(where: Path | str, name: str, tensor: Tensor) -> Tensor:
    """Return ``tensor``, of any shape; raise WeightsError unless it is floating-point (``FLOATS``) and finite."""
    if tensor.dtype not in FLOATS:
        raise WeightsError(f"{where}: {name} is of type {tensor.dtype}, not float16, 32 or 64; give another checkpoint")
    if not tensor.isfinite().all():
        raise WeightsError(f"{where}: {name} holds values that are not finite; get the checkpoint again")
    return tensor


def require_stored_floats(files: Sequence[Path]) -> None:
    """Check the types of the tensors in safetensors ``files``; reads headers only.

    Libraries load the codes of a quantised model as if they were weights. Positions, which some files store, are whole
    numbers. Raises WeightsError naming the first tensor that is not floating-point (``STORED_FLOATS``).
    """
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (no mapping)
                stored = opened.get_slice(name).get_dtype()
                if stored not in STORED_FLOATS and not name.endswith("position_ids"):
                    raise quantised_tensor(file, name, stored)


def quantised_tensor(where: Path, name: str, stored: str) -> WeightsError:
    """Return the error about a tensor of another type than weights have."""
    return WeightsError(
        f"{where}: {name} is stored as {stored}, not {', '.join(STORED_FLOATS)}; give the weights as they were before "
        "quantisation"
    )


def require_new(out: Path) -> None:
    """Refuse an ``out`` that would be overwritten. Raises ConfigError."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out}: already exists; give a new folder")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder beside ``out`` that is renamed to ``out`` at the end, so that ``out`` is never half a model.

    Its files can be read by whom the umask lets: safetensors writes files that only their owner can read. An exception
    in the block deletes the folder. Raises ConfigError for an ``out`` that exists or cannot be written.
    """
    require_new(out)
    # Without links and dots: the system renames no folder to "." or over a link.
    target = Path(os.path.realpath(out))
    # Beside it: a folder is renamed in one step only within its filesystem.
    draft = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        draft.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({one_line(error)}); give another folder") from error
    try:
        yield draft
        permitted = stat.S_IMODE(draft.stat().st_mode)  # what the umask leaves of 777
        for path in draft.rglob("*"):
            if not path.is_symlink():
                path.chmod(permitted if path.is_dir() else permitted & 0o666)
        os.replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get it again") from error
    return tensors


def _read_pytorch(file: Path, keys: Sequence[str], inert: Sequence[str]) -> dict[str, Tensor]:
    values = _unpickle(file, inert)
    if keys:
        found = None
        for key in keys:
            if found is None and isinstance(values, dict) and isinstance(values.get(key), dict):
                found = values[key]
        if found is None:
            raise WeightsError(f"{file}: has no {' or '.join(keys)} in it; give the checkpoint of a whole model")
        values = found
    if not isinstance(values, dict):
        raise WeightsError(f"{file}: holds a {type(values).__name__}, not tensors by name; give another checkpoint")
    return values


def _unpickle(file: Path, inert: Sequence[str]) -> Any:
    """Return what a PyTorch file holds, without running code from it."""
    is_zip = _is_zip(file)
    if not is_zip and not _is_legacy(file):
        raise WeightsError(
            f"{file}: is not a PyTorch file, or only a part of one; get it again (git lfs pull, where it came by git)"
        )
    stand_ins: list[tuple[Callable[..., object], str]] = [(_Inert, name) for name in inert]
    try:
        with torch.serialization.safe_globals([*stand_ins]):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)  # only a zip can be mapped
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{file}: {_refusal(str(error))}, and covray runs no code from a file; give its tensors alone, as "
            "safetensors"
        ) from error
    except _DAMAGED as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get it again") from error


def _refusal(message: str) -> str:
    """Return why PyTorch refused a pickle; its own words advise to trust the file."""
    wanted = re.search(r"GLOBAL (\S+)", message)
    if wanted:
        return f"needs {wanted[1]}"
    if f"Unsupported operand {_FRAME}" in message:
        return "is pickled by protocol 4 or later, which PyTorch reads only by running it"
    return "is damaged"


def _is_zip(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except (OSError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get it again") from error


def _is_legacy(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            return _LEGACY_MAGIC in opened.read(32)
    except OSError as error:  # is_zipfile says "no zip" of a file that it cannot open
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get it again") from error
