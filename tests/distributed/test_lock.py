"""One command at a time in a folder: on this machine, between machines, on S3, and when commands start at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

from covray.distributed import lock as locking
from covray.distributed.lock import HEARTBEAT_S, STALE_S, Claim, FolderLock
from covray.errors import ConfigError, DatasetError
from covray.io.storage import Folder
from tests.support.chaos import create_bucket


@dataclass
class FakeTime:
    """A clock that only moves when somebody sleeps; ``events`` happen when it does, with the time."""

    now: float = 1000.0
    events: list[Callable[[float], None]] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for event in self.events:
            event(self.now)

    def lock(self, folder: Path | str, patience_s: float = 0.0) -> FolderLock:
        return FolderLock(
            Folder(str(folder)), "covray build", patience_s=patience_s, clock=lambda: self.now, sleep=self.sleep
        )


def claims(folder: Path | str) -> list[str]:
    return [name for name in Folder(str(folder)).list_files() if name.startswith("_lock.")]


def put_claim(folder: Path | str, name: str = "_lock.other.json", **changes: object) -> str:
    """Write the claim of a command on another machine."""
    claim = Claim(command="covray build", host="far", process=7, machine="another", started=1)
    claim.model_copy(update=changes).write(str(folder), name)
    return name


@pytest.fixture
def ended() -> tuple[int, int]:
    """The id and the start of a process of this machine that has been killed and reaped."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = locking._start_of(process.pid)
    assert started is not None
    process.kill()
    process.wait()
    return process.pid, started


def test_a_lock_leaves_nothing_behind(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with FolderLock(Folder(str(out)), "covray build"):
        assert len(claims(out)) == 1
    assert not out.exists()
    out.mkdir()
    with FolderLock(Folder(str(out)), "covray build"):
        (out / "result").touch()
    assert os.listdir(out) == ["result"]


def test_a_lock_that_was_never_acquired_touches_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = FolderLock(Folder(str(tmp_path)), "covray build")
    monkeypatch.setattr(Folder, "delete_file", lambda *_: pytest.fail("a read-only folder is only read"))
    lock.release()


def test_a_claim_says_who_works_there(tmp_path: Path) -> None:
    with FolderLock(Folder(str(tmp_path)), "covray sweep"):
        claim = Claim.read(str(tmp_path), claims(tmp_path)[0])
    assert (claim.command, claim.process, claim.host) == ("covray sweep", os.getpid(), os.uname().nodename)


def test_a_second_command_is_refused_in_one_line_that_names_the_first(tmp_path: Path) -> None:
    with FolderLock(Folder(str(tmp_path)), "covray build"):
        with pytest.raises(DatasetError) as caught:
            FakeTime().lock(tmp_path).acquire()
        assert len(claims(tmp_path)) == 1
    assert str(caught.value) == (
        f"{tmp_path}: covray build (process {os.getpid()} on {os.uname().nodename}) is at work in this folder; wait "
        "for its end or stop it, or give another --out"
    )
    with FolderLock(Folder(str(tmp_path)), "covray build"):
        pass


def test_a_killed_command_of_this_machine_is_followed_at_once(tmp_path: Path, ended: tuple[int, int]) -> None:
    put_claim(tmp_path, machine=locking._machine(), process=ended[0], started=ended[1])
    fake = FakeTime()
    with fake.lock(tmp_path):
        assert "_lock.other.json" not in claims(tmp_path)
    assert fake.now == 1000.0, "without waiting"


def test_a_command_killed_while_it_asked_leaves_no_claim_behind(tmp_path: Path, ended: tuple[int, int]) -> None:
    process, started = ended
    with FolderLock(Folder(str(tmp_path)), "covray build"):
        put_claim(tmp_path, "_lock.dead.json", process=process, started=started, machine=locking._machine())
        far = put_claim(tmp_path)
    assert claims(tmp_path) == [far], "of another machine's claim only time can tell"


def test_a_killed_command_that_nobody_has_reaped_is_no_command(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        put_claim(tmp_path, machine=locking._machine(), process=process.pid, started=locking._start_of(process.pid))
        with pytest.raises(DatasetError, match="is at work"):
            FakeTime().lock(tmp_path).acquire()
        process.kill()
        deadline = time.monotonic() + 10
        while locking._state_of(process.pid) != "Z" and time.monotonic() < deadline:
            time.sleep(0.01)
        with FakeTime().lock(tmp_path):
            pass
    finally:
        process.kill()
        process.wait()


def test_a_process_id_that_is_used_again_is_not_the_command(tmp_path: Path) -> None:
    put_claim(tmp_path, machine=locking._machine(), process=os.getppid(), started=1)
    with FakeTime().lock(tmp_path):
        pass


def test_a_claim_that_this_process_left_behind_is_no_rival(tmp_path: Path) -> None:
    put_claim(tmp_path, machine=locking._machine(), process=os.getpid(), started=locking._start_of(os.getpid()))
    with FakeTime().lock(tmp_path):
        pass


def test_a_command_at_work_on_another_machine_is_seen_by_its_heartbeat(tmp_path: Path) -> None:
    name, fake = put_claim(tmp_path), FakeTime()
    fake.events.append(lambda now: os.utime(tmp_path / name, (now, now)) if now > 1000 + HEARTBEAT_S else None)
    with pytest.raises(DatasetError, match=r"covray build \(process 7 on far\) is at work"):
        fake.lock(tmp_path).acquire()
    assert fake.now <= 1000 + HEARTBEAT_S + 1, "it need not wait until the claim would be stale"
    assert claims(tmp_path) == [name]


@pytest.mark.parametrize("age_s", [0, 30, 3600])
def test_a_command_of_another_machine_that_has_died_is_followed_after_the_stated_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, age_s: float
) -> None:
    caplog.set_level("INFO", logger="covray")
    name, fake = put_claim(tmp_path), FakeTime()
    touched = time.time() - age_s
    os.utime(tmp_path / name, (touched, touched))
    with fake.lock(tmp_path):
        assert name not in claims(tmp_path)
    waited_s = fake.now - 1000
    assert waited_s == pytest.approx(max(STALE_S - age_s, 2 * HEARTBEAT_S), abs=1.5)
    assert f"covray build (process 7 on far) was at work here {age_s} s ago; waiting at most" in caplog.text


def test_an_old_claim_that_is_touched_again_after_an_outage_is_at_work(tmp_path: Path) -> None:
    """Nobody could touch it while the storage was away: it is watched for longer than a heartbeat first."""
    name, fake = put_claim(tmp_path), FakeTime()
    os.utime(tmp_path / name, (1, 1))
    fake.events.append(lambda now: os.utime(tmp_path / name, (now, now)) if now > 1000 + HEARTBEAT_S else None)
    with pytest.raises(DatasetError, match="is at work"):
        fake.lock(tmp_path).acquire()


def test_with_patience_a_command_is_waited_for(tmp_path: Path) -> None:
    name, fake = put_claim(tmp_path), FakeTime()

    def work_for_40_s(now: float) -> None:
        path = tmp_path / name
        if now > 1040:
            path.unlink(missing_ok=True)
        else:
            os.utime(path, (now, now))

    fake.events.append(work_for_40_s)
    with fake.lock(tmp_path, patience_s=60):
        assert fake.now > 1040


def test_a_command_whose_claim_is_gone_ends_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locking, "HEARTBEAT_S", 0.01)
    with pytest.raises(DatasetError, match="another one took the folder over"):  # noqa: PT012, SIM117
        with FolderLock(Folder(str(tmp_path)), "covray build"):
            (tmp_path / claims(tmp_path)[0]).unlink()
            time.sleep(30)  # interrupted


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^--out .*file/out: cannot be written \(.+\); give another folder$"):
        FolderLock(Folder(str(tmp_path / "file" / "out")), "covray build").acquire()


def test_a_claim_that_cannot_be_read_counts_while_it_is_touched(tmp_path: Path) -> None:
    (tmp_path / "_lock.x.json").write_text("{")
    fake = FakeTime()
    with fake.lock(tmp_path):
        assert fake.now >= 1000 + STALE_S - 1.5


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    create_bucket(f"http://{host}:{port}", monkeypatch)
    yield "s3://covray"
    server.stop()


@pytest.mark.parametrize(("where", "commands", "rounds"), [("local", 6, 3), ("s3", 4, 1)])
def test_of_commands_that_start_at_once_one_works_at_a_time(
    tmp_path: Path, where: str, commands: int, rounds: int, request: pytest.FixtureRequest
) -> None:
    """Several threads want the folder; each that gets it works a moment, and nobody else may then."""
    out = f"{request.getfixturevalue('bucket')}/out" if where == "s3" else str(tmp_path / "out")
    at_work: list[int] = []
    worked: list[int] = []
    together: list[list[int]] = []
    refusals: list[str] = []
    start = threading.Barrier(commands)

    def command(number: int) -> None:
        start.wait()
        try:
            with FolderLock(Folder(out), "covray build"):
                at_work.append(number)
                time.sleep(0.3)
                if len(at_work) > 1:
                    together.append([*at_work])
                at_work.remove(number)
                worked.append(number)
        except DatasetError as error:
            refusals.append(str(error))

    for _ in range(rounds):
        worked.clear()
        threads = [threading.Thread(target=command, args=(number,)) for number in range(commands)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
        assert worked, "at least one of them works"
    assert not together
    assert all("is at work in this folder" in refusal for refusal in refusals)
    assert not claims(out)


def test_a_dead_claim_on_s3_is_taken_over_and_a_live_one_is_not(bucket: str, ended: tuple[int, int]) -> None:
    out = f"{bucket}/out"
    put_claim(out, machine=locking._machine(), process=ended[0], started=ended[1])
    with FakeTime().lock(out) as held:
        assert len(claims(out)) == 1
        assert held.touch()
        with pytest.raises(DatasetError, match="is at work"):
            FakeTime().lock(out).acquire()
        Folder(out).delete_file(claims(out)[0])
        assert not held.touch(), "a command that lost its claim does not write it again"
        assert not claims(out)
    put_claim(out)
    fake = FakeTime()
    with fake.lock(out):
        assert fake.now >= 1000 + STALE_S - 3  # S3 gives times in seconds
