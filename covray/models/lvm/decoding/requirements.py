"""What of an adapter a sampling needs: drafts to decode speculatively, a verifier to choose among candidates."""

from __future__ import annotations

from typing import TypeVar

from covray.config import SamplingConfig
from covray.errors import ConfigError
from covray.models.lvm.draft import Draft
from covray.models.lvm.lora import Lora
from covray.models.lvm.verifier import Verifier

T = TypeVar("T")


def require_trained_parts(sampling: SamplingConfig, lora: Lora | None, run: str | None) -> None:
    """Refuse a sampling that needs drafts, or a verifier, where there are none. Raises ConfigError.

    Args:
        sampling: The sampling.
        lora: The adapter of ``run``; None: none.
        run: Folder of a run, if there is one.
    """
    if sampling.decoder == "speculative":
        require_draft(None if lora is None else lora.draft, run)
    if sampling.choose_by == "verifier":
        require_verifier(None if lora is None else lora.verifier, run)


def require_draft(draft: Draft | None, run: str | None = None) -> Draft:
    """Return the draft adapter. Raises ConfigError where there is none; it names the ``run`` that lacks it."""
    return _require(draft, "sampling.decoder: speculative", "draft", run, "jacobi or sequential")


def require_verifier(verifier: Verifier | None, run: str | None = None) -> Verifier:
    """Return the verifier. Raises ConfigError where there is none; it names the ``run`` that lacks it."""
    return _require(verifier, "sampling.choose_by: verifier", "verifier", run, "answer or chain")


def _require(part: T | None, option: str, objective: str, run: str | None, instead: str) -> T:
    if part is None:
        which = "" if run is None else f", which {run} is not"
        raise ConfigError(f"{option} needs a run trained with objective={objective}{which}; take {instead}")
    return part
