"""Checks of the storage for datasets and runs: space, speed, and its clock."""

from __future__ import annotations

import os
import posixpath
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pyarrow import fs

from covray.doctor.findings import GIB, Finding, Status, clock_skew, skew_status
from covray.errors import ConfigError, one_line
from covray.io import storage

PROBE_BYTES = 16 * 2**20
"""Written to the storage and read again."""
SLOW_BYTES_PER_S = 20e6
"""Below it a checkpoint of the 7B's adapter and its two moments (1 GB) takes almost a minute."""
_SPACE_BYTES = 10 * GIB
"""A million chains of four frames of 256 tokens are 2 GB; 10 checkpoints of the 7B's adapter are 10 GB."""


@dataclass(frozen=True)
class _Probe:
    """A file that was written, read and deleted again."""

    write_s: float
    read_s: float
    intact: bool
    started_s: float
    """When writing began, and when it ended, by this machine's clock (Unix)."""
    ended_s: float
    stamp_ns: int | None
    """When the storage says it was written; None where it keeps no times."""


def check_storage(path: str) -> list[Finding]:
    """Check the storage that ``path`` is, or will be, on; folders that do not exist are not created."""
    filesystem, _ = storage.resolve(path)
    target = nearest_existing(path)
    folder = storage.resolve(target)[1]
    if filesystem.get_file_info(folder).type == fs.FileType.File:
        return [Finding("storage", "problem", f"{target}: is a file", "give --path a folder")]
    findings = []
    # An object store has no disk that could be full.
    if isinstance(filesystem, fs.LocalFileSystem):
        findings.append(_check_space(folder))
    try:
        probe = _write_and_read(filesystem, target)
    except OSError as error:
        message = f"{target}: cannot be written and read ({one_line(error)})"
        advice = "fix its permissions or free some space, or give another --path"
        return [*findings, Finding("storage", "problem", message, advice)]
    return [*findings, _check_speed(target, probe), check_clock(probe.started_s, probe.ended_s, probe.stamp_ns)]


def _write_and_read(filesystem: fs.FileSystem, target: str) -> _Probe:
    """Write a file to the folder ``target``, read it, and delete it in any case. Raises OSError."""
    file = storage.join(target, f".covray-doctor-{os.getpid()}")
    inner = storage.resolve(file)[1]
    data = np.random.default_rng(0).bytes(PROBE_BYTES)  # no storage can compress it
    try:
        started_s, tick = time.time(), time.perf_counter()
        storage.write_bytes(file, data)
        write_s, ended_s = time.perf_counter() - tick, time.time()
        stamp_ns = filesystem.get_file_info(inner).mtime_ns
        if isinstance(filesystem, fs.LocalFileSystem):
            _drop_from_memory(inner)
        tick = time.perf_counter()
        intact = storage.read_bytes(file) == data
        read_s = time.perf_counter() - tick
    finally:
        with suppress(OSError):  # what was not written cannot be deleted
            filesystem.delete_file(inner)
    return _Probe(write_s, read_s, intact, started_s, ended_s, stamp_ns)


def _check_speed(target: str, probe: _Probe) -> Finding:
    write, read = PROBE_BYTES / probe.write_s, PROBE_BYTES / probe.read_s
    message = f"{target}: writes {write / 1e6:,.0f} MB/s, reads {read / 1e6:,.0f} MB/s"
    if not probe.intact:
        advice = "do not use it: check the disk, or the server"
        return Finding("storage", "problem", f"{message}; what is read is not what was written", advice)
    if min(write, read) < SLOW_BYTES_PER_S:
        advice = "write checkpoints less often (checkpoints.every_steps), or use a faster storage"
        return Finding("storage", "note", f"{message}: slow", advice)
    return Finding("storage", "ok", message)


def _check_space(folder: str) -> Finding:
    usage = shutil.disk_usage(folder)
    message = f"{folder}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free >= _SPACE_BYTES:
        return Finding("disk", "ok", message)
    status: Status = "problem" if usage.free < GIB else "note"
    return Finding("disk", status, f"{message}: little", "free some space, or give a --path on a larger disk")


def check_clock(started_s: float, ended_s: float, stamp_ns: int | None) -> Finding:
    """Compare this machine's clock with the age of covray's files, and with the storage's clock.

    Args:
        started_s: When writing a file began, by this machine's clock (Unix).
        ended_s: When it ended.
        stamp_ns: When the storage says that the file was written; None where it keeps no times.
    """
    if ended_s < Path(__file__).stat().st_mtime:
        now = time.strftime("%Y-%m-%d %H:%M", time.gmtime(ended_s))
        message = f"{now} UTC, which is before covray was installed"
        return Finding("clock", "problem", message, "set the clock (timedatectl set-ntp true)")
    if stamp_ns is None:
        return Finding("clock", "ok", "the storage keeps no times to compare with")
    skew = clock_skew(stamp_ns / 1e9, started_s, ended_s)
    status = skew_status(skew)
    advice = ""
    if status != "ok":
        advice = "synchronise this machine's clock (timedatectl set-ntp true), or the storage's"
    return Finding("clock", status, f"the storage's is {skew:+.1f} s from this machine's", advice)


def nearest_existing(path: str) -> str:
    """Return ``path``, or the nearest folder above it that exists. Raises ConfigError where none does."""
    # Upwards until something exists, so that a check creates no folders.
    target = path.rstrip("/") if "://" in path else storage.resolve(path)[1]
    while not storage.exists(target):
        above = posixpath.dirname(target)
        if above == target or above.endswith(":/"):
            raise ConfigError(f"{path}: nothing of it exists; create its bucket or disk, or give another --path")
        target = above
    return target


def _drop_from_memory(file: str) -> None:
    """Ask the system to read the file from its disk the next time, not from memory."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
