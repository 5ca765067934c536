"""One command at a time in a folder, on any filesystem.

Every command that writes to a folder puts a claim there, a small file of its own, and keeps touching it while it works.
It works only when, after writing its claim, it finds no other: of two commands that claim at once at least one finds
the other's claim, because the listing comes after the writing. A command that finds another claim withdraws its own,
then looks again:

- a claim of a process of this machine that has ended is deleted at once;
- a claim of a process of this machine that runs, or a claim that is touched while it is watched, is at work: the
  command is refused;
- a claim that nobody has touched for ``STALE_S`` seconds is deleted.

No clock of another machine is trusted: the age of a claim is the difference of two times of the storage itself, and
whether it is touched is seen by watching it.

What this guarantees: one command at most is at work, where a listing shows every file written before it (local disks,
S3, GCS; NFS as far as its clients do), and no command stands still for ``STALE_S`` seconds while a command on another
machine wants its folder. A command that stood still so long finds its claim gone and ends.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import posixpath
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pyarrow import fs

from covray.errors import ConfigError, DatasetError, one_line
from covray.io.records import Record
from covray.io.storage import Folder

HEARTBEAT_S = 5.0
"""A command at work touches its claim this often."""
STALE_S = 60.0
"""A claim of another machine that is not touched for so long is taken over."""
_WATCH_S = 2 * HEARTBEAT_S  # but never before it was watched for so long: the storage may have been away until now
PREFIX = "_lock."
"""How the names of claims begin."""
_LOOK_AGAIN_S = (0.2, 1.0)  # random, so that two commands that withdrew together do not claim together again

_LOGGER = logging.getLogger(__name__)
_own_tokens: set[str] = set()  # of this process, so that it knows a claim that it left behind


class Claim(Record):
    """The claim of one command on a folder; present while the command works there."""

    FILE = "_lock.TOKEN.json"
    FIX = "delete it if no command works there"

    command: str
    """The command, as `covray build`."""
    host: str
    """The name of the machine, for people."""
    process: int
    """The id of the process."""
    machine: str
    """What tells machines apart, and containers with process ids of their own: whether `process` is a process here."""
    started: int | None
    """When the process began, in the clock ticks of its kernel, as process ids are used again; null where unknown."""


class FolderLock:
    """A claim on a folder, held from ``acquire`` to ``release``; as a context manager, for a block."""

    def __init__(
        self,
        folder: Folder,
        command: str,
        *,
        patience_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Prepare a claim; nothing is written yet.

        Args:
            folder: The folder; it need not exist.
            command: The command, as a user knows it: ``covray build``.
            patience_s: Seconds to wait for a command at work to end, before it is a reason to refuse.
            clock: Seconds that only grow.
            sleep: Waits for that many seconds.
        """
        self._folder, self._command, self._patience_s = folder, command, patience_s
        self._clock, self._sleep = clock, sleep
        self._token = uuid.uuid4().hex[:12]
        self._name = f"{PREFIX}{self._token}.json"
        self._existed = True
        self._heart: threading.Thread | None = None
        self._stop = threading.Event()
        self._lost = False
        self._in_main_thread = False

    def __enter__(self) -> FolderLock:
        """Acquire the lock."""
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release the lock. Raises DatasetError when another command took the folder over meanwhile."""
        self.release()
        if self._lost:
            raise DatasetError(
                f"{self._folder.path}: this command stood still for more than {STALE_S:.0f} s, and another one took "
                "the folder over; wait for it, then run the same command again"
            ) from error

    def acquire(self) -> None:
        """Claim the folder.

        Raises:
            DatasetError: Another command is at work there.
            ConfigError: The folder cannot be written.
        """
        # Before the claim is there: another thread of this process would take it for one that was left behind.
        _own_tokens.add(self._token)
        try:
            self._existed = self._folder.exists()
            deadline = self._clock() + self._patience_s
            while True:
                self._claim()
                rivals = self._rivals()
                if not rivals:
                    break
                self._withdraw()
                self._outwait(rivals, deadline)
        except BaseException as error:
            self.release()
            if isinstance(error, OSError):
                raise ConfigError(
                    f"--out {self._folder.path}: cannot be written ({one_line(error)}); give another folder"
                ) from error
            raise
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._heart = threading.Thread(target=self._beat, name="covray-lock", daemon=True)
        self._heart.start()

    def release(self) -> None:
        """Give the folder up, if it was claimed; delete it if it was absent before and is still empty."""
        if self._token not in _own_tokens:
            return
        worked = self._heart is not None
        self._stop.set()
        if self._heart is not None:
            self._heart.join()
            self._heart = None
        with contextlib.suppress(OSError):  # storage that is away: the claim grows old, and is taken over
            if worked:
                self._rivals()  # a command killed before it could withdraw: perhaps nobody else comes here to see
            self._withdraw()
        _own_tokens.discard(self._token)
        # An object store has no empty folders: a listing would be a request for nothing.
        if not self._existed and isinstance(self._folder.filesystem, fs.LocalFileSystem):
            self._folder.delete_if_empty()

    def delete_ended(self) -> None:
        """Delete the claims of processes of this machine that have ended, where the folder can be written."""
        with contextlib.suppress(OSError):
            self._rivals()

    def touch(self) -> bool:
        """Touch the claim; return False, and do nothing, when it is gone."""
        if isinstance(self._folder.filesystem, fs.LocalFileSystem):
            try:
                os.utime(self._folder.inner_path(self._name))
            except FileNotFoundError:
                return False
            return True
        # The time of an object cannot be set: it is written again.
        if not self._folder.exists(self._name):
            return False
        self._claim()
        return True

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with contextlib.suppress(OSError):  # storage that is away for a while; other commands cannot claim either
                if not self.touch():
                    self._lost = True
                    if self._in_main_thread:  # a signal, because it also ends a sleep or a wait
                        os.kill(os.getpid(), signal.SIGINT)
                    return

    def _claim(self) -> None:
        claim = Claim(
            command=self._command,
            host=platform.node(),
            process=os.getpid(),
            machine=_machine(),
            started=_start_of(os.getpid()),
        )
        try:
            claim.write(self._folder, self._name)
        except FileNotFoundError:  # another command has just deleted the folder that it had made
            claim.write(self._folder, self._name)

    def _withdraw(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._folder.delete_file(self._name)

    def _times(self) -> dict[str, float]:
        """Return when each claim on the folder was last touched, in seconds of the storage's clock, by name."""
        selector = fs.FileSelector(self._folder.inner, allow_not_found=True)
        times = {}
        for info in self._folder.filesystem.get_file_info(selector):
            name = posixpath.basename(info.path)
            if info.type == fs.FileType.File and name.startswith(PREFIX):
                times[name] = info.mtime_ns / 1e9
        return times

    def _rivals(self) -> list[_Rival]:
        """Return the other claims; delete those of processes that have ended."""
        times = self._times()
        # Our own claim was written a moment ago: its time is the storage's now.
        now = times.pop(self._name, max(times.values(), default=0.0))
        rivals = []
        for name, touched in times.items():
            if self._is_alive_here(name) is False:
                self._delete(name)
            else:
                rivals.append(_Rival(name, touched, max(0.0, now - touched), self._clock()))
        return rivals

    def _outwait(self, rivals: list[_Rival], deadline: float) -> None:
        """Return when a claim of ``rivals`` is gone or taken over. Raises DatasetError when one is at work."""
        told = False
        while True:
            self._sleep(random.uniform(*_LOOK_AGAIN_S))
            times = self._times()
            for rival in rivals:
                if rival.name not in times:
                    return
                alive = self._is_alive_here(rival.name)
                touched = times[rival.name] != rival.touched
                if alive or (alive is None and touched):
                    if self._clock() >= deadline:
                        raise DatasetError(self._refusal(rival.name))
                    rival.touched, rival.age_s, rival.seen_at = times[rival.name], 0.0, self._clock()
                    continue
                watched_s = self._clock() - rival.seen_at
                stale = rival.age_s + watched_s >= STALE_S and watched_s >= _WATCH_S
                if alive is False or stale:
                    self._delete(rival.name)
                    return
                if not told:
                    told = True
                    self._tell(rival, max(_WATCH_S, STALE_S - rival.age_s) - watched_s)

    def _is_alive_here(self, name: str) -> bool | None:
        """Return whether the process of the claim ``name`` runs on this machine; None when that cannot be known."""
        claim = self._read(name)
        if claim is None or claim.machine != _machine():
            return None
        if claim.process == os.getpid():
            # This very process: it runs, but it may have left a claim behind that it no longer holds.
            return name.removeprefix(PREFIX).removesuffix(".json") in _own_tokens
        return _runs(claim.process, claim.started)

    def _read(self, name: str) -> Claim | None:
        try:
            return Claim.read_if_present(self._folder, name)
        except DatasetError:  # written by something else: only its age can say whether it is at work
            return None

    def _delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._folder.delete_file(name)

    def _who(self, name: str) -> str:
        claim = self._read(name)
        if claim is None:
            return "another command"
        return f"{claim.command} (process {claim.process} on {claim.host})"

    def _refusal(self, name: str) -> str:
        return (
            f"{self._folder.path}: {self._who(name)} is at work in this folder; wait for its end or stop it, or give "
            "another --out"
        )

    def _tell(self, rival: _Rival, left_s: float) -> None:
        _LOGGER.info(
            "%s: %s was at work here %.0f s ago; waiting at most %.0f s for a sign of life of it",
            self._folder.path, self._who(rival.name), rival.age_s, left_s,
        )  # fmt: skip


@dataclass
class _Rival:
    """The claim of another command, as it was first seen."""

    name: str
    touched: float  # in seconds of the storage's clock
    age_s: float
    seen_at: float  # in seconds of our own clock


def _machine() -> str:
    """Return what is the same for two processes exactly when each can ask whether the other runs."""
    try:
        # Containers share the machine's boot, but may each count processes of their own.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{platform.node()}/{uuid.getnode():x}"


def _runs(process: int, started: int | None) -> bool:
    """Return whether the process runs, and began at ``started``; one that was killed but not reaped does not run."""
    if not Path("/proc/self/stat").exists():
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True
    return _state_of(process) not in (None, "Z", "X") and started in (None, _start_of(process))


def _stat_of(process: int) -> list[str]:
    """Return the fields of a Linux process from its state on; none when there is no such process."""
    try:
        # The name before them stands in brackets, and may hold spaces and brackets itself.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _state_of(process: int) -> str | None:
    fields = _stat_of(process)
    if not fields:
        return None
    return fields[0]


def _start_of(process: int) -> int | None:
    fields = _stat_of(process)
    if not fields:
        return None
    return int(fields[19])  # starttime: the 22nd of proc(5), where the state is the third
