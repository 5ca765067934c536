"""A Ray that does not come up is one line."""

from __future__ import annotations

import os

import pytest
import ray

from covray.distributed.session import ray_session
from covray.errors import ConfigError


@pytest.mark.parametrize(
    ("address", "error", "told"),
    [
        (None, Exception("The current node timed out during startup.\nMore."), "Ray did not start on this machine"),
        ("10.0.0.1:6379", ConnectionError("no answer"), "no Ray cluster answers there"),
    ],
)
def test_a_ray_that_does_not_come_up_is_one_line(
    monkeypatch: pytest.MonkeyPatch, address: str | None, error: Exception, told: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)

    def late(**_: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(ConfigError, match=told) as caught, ray_session():
        raise AssertionError("there is no Ray to work on")
    assert "\n" not in str(caught.value)


def test_a_ray_that_is_late_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    started: list[object] = []

    def late(**options: object) -> None:
        started.append(options)
        if len(started) < 3:
            raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.setattr(ray, "init", late)
    with ray_session() as cores:
        assert cores == os.cpu_count()
    assert len(started) == 3
