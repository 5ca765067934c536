"""Weights that other programs wrote: found, read without running anything that is in them, checked; and new folders.

A pickle can run code, so PyTorch files are read with ``weights_only``; names in an index never lead out of its folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from covray.errors import ConfigError, WeightsError, one_line

Shape = tuple[int, ...]
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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
    """The files of the first of ``names`` that ``folder`` has: itself, or those that an ``.index.json`` lists.

    Empty when it has none. Raises WeightsError for an index that cannot be read, lists what is missing, or leads out
    of the folder.
    """
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        return []
    if found.suffix != ".json":
        return [found]
    try:
        listed = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in listed if PurePath(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{found}: cannot be read ({one_line(error)}); get the folder again") from error
    for name in outside or listed:
        if outside:
            raise WeightsError(f"{found}: lists {name}, which is not a file of its folder; get the folder again")
        if not (folder / name).is_file():
            raise WeightsError(f"{folder}: {name} is missing; complete the folder, or give another")
    return [folder / name for name in listed]


def read_tensors(file: Path, keys: Sequence[str] = (), inert: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a PyTorch file (a zip archive), by name.

    They are mapped: memory follows what is used. ``keys``: of a PyTorch file that holds more than weights, the first
    that it has is taken. ``inert``: full names of classes that the file may mention; nothing stands in their place.
    Raises WeightsError for a file that cannot be read, holds other things than tensors, or wants code to be run.
    """
    values = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pytorch(file, keys, inert)
    for name, value in values.items():
        named = isinstance(name, str) and name.isprintable()
        if not (named and isinstance(value, Tensor) and value.layout == torch.strided):
            shown = name if named else repr(name)[:60]
            raise WeightsError(f"{file}: {shown} is no plain tensor; give the weights alone, as safetensors")
    return values


def require_tensors(where: Path, found: Mapping[str, Shape], due: Mapping[str, Shape]) -> None:
    """Compare names and shapes, both as the file has them. Raises WeightsError naming ``where`` and the first tensor
    that is missing, too many, or of another shape."""
    for name, shape in due.items():
        if name not in found:
            raise WeightsError(f"{where}: {name} is missing; get the checkpoint again, or give another")
        if found[name] != shape:
            raise WeightsError(f"{where}: {name} is {list(found[name])}, not {list(shape)}; give another checkpoint")
    extra = found.keys() - due.keys()
    if extra:
        raise WeightsError(f"{where}: {min(extra)} is too many; give a checkpoint of the architecture it states")


def require_finite(where: Path, name: str, tensor: Tensor) -> Tensor:
    """``tensor``, or WeightsError when it is of no plain floating-point type or holds values that are not finite."""
    if tensor.dtype not in _FLOATS:
        raise WeightsError(f"{where}: {name} is of type {tensor.dtype}, not float16, 32 or 64; give another checkpoint")
    if not tensor.isfinite().all():
        raise WeightsError(f"{where}: {name} holds values that are not finite; get the checkpoint again")
    return tensor


def require_new(out: Path) -> None:
    """Refuse an ``out`` that would be overwritten. Raises ConfigError."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out}: is there already; give a new folder")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes ``out`` when all went well, so that ``out`` is never half a model."""
    require_new(out)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be written ({one_line(error)}); give another folder") from error
    try:
        yield aside
        aside.chmod(0o755)  # mkdtemp's is private
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get it again") from error
    return tensors


def _read_pytorch(file: Path, keys: Sequence[str], inert: Sequence[str]) -> dict[str, Tensor]:
    # Only zip archives can be mapped; PyTorch has written them since 1.6 (2020).
    if not _is_zip(file):
        raise WeightsError(
            f"{file}: is no PyTorch file (a zip archive), or a part of one; get it again (git lfs pull, where it came "
            "by git)"
        )
    stand_ins: list[tuple[Callable[..., object], str]] = [(_Inert, name) for name in inert]
    try:
        with torch.serialization.safe_globals([*stand_ins]):
            values = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # PyTorch's own words advise to trust the file.
        wanted = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"wants {wanted[1]}" if wanted else "is damaged"
        raise WeightsError(
            f"{file}: {reason}, and covray runs no code from a file; give its tensors alone, as safetensors"
        ) from error
    except _DAMAGED as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get it again") from error
    if keys:
        key = next((key for key in keys if isinstance(values, dict) and isinstance(values.get(key), dict)), None)
        if key is None:
            raise WeightsError(f"{file}: has no {' or '.join(keys)} in it; give the checkpoint of a whole model")
        values = values[key]
    if not isinstance(values, dict):
        raise WeightsError(f"{file}: holds a {type(values).__name__}, not tensors by name; give another checkpoint")
    return values


def _is_zip(file: Path) -> bool:
    try:
        return zipfile.is_zipfile(file)
    except (OSError, zipfile.BadZipFile) as error:
        raise WeightsError(f"{file}: cannot be read ({one_line(error)}); get it again") from error
