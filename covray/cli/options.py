"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from covray.errors import ConfigError

if TYPE_CHECKING:
    from covray.config import Section

C = TypeVar("C", bound="Section")

Out = Annotated[str, typer.Option("--out", help="What the command writes.")]
Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object last.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Everything random follows from it.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file; see configs/.")]
Sets = Annotated[list[str] | None, typer.Option("--set", help="key=value, for any key of the configuration.")]
Tasks = Annotated[str | None, typer.Option("--tasks", help="Comma-separated; all that apply by default.")]

checking: ContextVar[bool] = ContextVar("checking", default=False)
"""Whether ``covray submit`` checks a command instead of running it."""


class Resolved(Exception):
    """Carries the configuration out of a command that is only checked."""


def split_commas(text: str | None) -> list[str] | None:
    """Return the comma-separated parts of ``text`` without the empty ones, or None for None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def shares(text: str | None) -> dict[str, float] | None:
    """Read ``name=share,name=share``, or None for None.

    Raises:
        ConfigError: a part is not ``name=share``, a share is negative, or all are 0.
    """
    if text is None:
        return None
    result = {}
    try:
        for part in text.split(","):
            name, share = part.split("=")
            result[name] = float(share)
    except ValueError as error:
        raise ConfigError(f"--splits {text}: write name=share, for example train=8,val=1,test=1") from error
    if min(result.values()) < 0 or not 0 < sum(result.values()) < float("inf"):
        raise ConfigError(f"--splits {text}: shares must be at least 0, and not all 0")
    return result


def numbers(option: str, text: str | None) -> list[int] | None:
    """Read comma-separated whole numbers, or None for None.

    Raises:
        ConfigError: a part is not a whole number; the message names ``option``.
    """
    if text is None:
        return None
    try:
        return [int(part) for part in split_commas(text) or []]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: write whole numbers separated by commas, for example 4,8") from error


def given(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that the user gave: those that are not None."""
    return {key: value for key, value in options.items() if value is not None}


def require_speed(tokens_per_s: float | None, plan: bool) -> None:
    """Check ``--tokens-per-s``.

    Raises:
        ConfigError: it is given without ``--plan``, or is not a positive number.
    """
    if tokens_per_s is not None and not plan:
        raise ConfigError("--tokens-per-s: is for --plan, which computes hours from it; give both")
    if tokens_per_s is not None and not 1e-6 <= tokens_per_s <= 1e12:  # false for NaN too
        raise ConfigError(f"--tokens-per-s {tokens_per_s:g}: must be a number above 0; covray train prints it")


def resolve(model: type[C], file: Path | None, options: Mapping[str, Any], sets: list[str] | None) -> C:
    """Return the configuration of a command; while ``covray submit`` checks the command, end it by ``Resolved``."""
    from covray.config import load_config

    config = load_config(model, file, given(options), sets or ())
    if checking.get():
        raise Resolved(config)
    return config
