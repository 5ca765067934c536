"""A signal lets a command save its work; a second one ends it at once; and it ends as the signal says."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from covray.distributed.interrupts import GracefulStop


class Terminated(Exception):
    """What the program's own handler of SIGTERM raises here."""


@pytest.fixture
def handler() -> Iterator[None]:
    """The program's own handler of SIGTERM, as the command line has one."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_the_first_signal_asks_and_the_end_is_that_of_the_signal(
    handler: None, number: int, ending: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    requests: list[None] = []
    with caplog.at_level("INFO", "covray"), GracefulStop(lambda: requests.append(None), "stopping") as stop:
        os.kill(os.getpid(), number)
        assert len(requests) == 1
        assert "stopping" in caplog.text
        with pytest.raises(ending):
            stop.end()


def test_a_second_signal_ends_at_once(handler: None) -> None:
    with GracefulStop(lambda: None, "stopping"):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_the_handlers_are_put_back(handler: None) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with GracefulStop(lambda: None, "stopping"):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_another_thread_is_left_alone() -> None:
    entered = []

    def enter() -> None:
        with GracefulStop(lambda: None, "stopping"):
            entered.append(True)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered
