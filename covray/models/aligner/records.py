"""The JSON file of an aligner's folder."""

from __future__ import annotations

from typing import Any, Literal

from covray.errors import WeightsError
from covray.io.records import Record

Norm = Literal["encoder", "ones", "none"]
"""What an aligner ends with: a norm that starts as the language encoder's, one that starts as 1, or none."""


class AlignerRecord(Record):
    """What an aligner is, and between which models it stands."""

    FILE = "aligner.json"
    FIX = "get the folder again"
    ERROR = WeightsError

    input_width: int
    """Width of the vision-language model's features."""
    width: int
    """Width of the language model's encoder outputs."""
    norm: Norm
    """What its norm started as: ``encoder``, the language encoder's final norm; ``ones``; or ``none``, no norm."""
    epsilon: float
    """The norm's epsilon, the language model's."""
    vlm: str | None
    """Fingerprint (SHA-256, hex) of the vision-language model; None: not known, any of this width is accepted."""
    language_model: str | None
    """Fingerprint of the language model; None: not known, any of this width is accepted."""
    features: dict[str, Any] | None = None
    """How the features were taken that it was trained on: `variant`, `vlm`, and `thought` and `places`, or `patches`.
    Absent in a folder that no `covray think train` wrote."""
    trained_through: dict[str, Any] | None = None
    """The language model of the training: `path`, `revision` and `max_tokens`. Absent like `features`."""
