"""The JSON file of an aligner's folder."""

from __future__ import annotations

from typing import Literal

from covray.config.section import JsonObject
from covray.errors import WeightsError
from covray.io.records import Record, RecordPart

Norm = Literal["encoder", "ones", "none"]
"""What an aligner ends with: a norm that starts as the language encoder's, one that starts as 1, or none."""


class FeaturesOrigin(RecordPart):
    """How features were taken."""

    variant: str = "lvlm"
    """`lvlm`: of a vision-language model; `clip`: of a vision tower."""
    vlm: JsonObject | None = None
    """The configuration of the model; absent where it is not known."""
    thought: JsonObject | None = None
    """How the model wrote its thoughts; of `lvlm`."""
    places: str = "text"
    """`text` or `prompt`: whose states the features are; of `lvlm`."""
    patches: int = 2
    """How many times smaller the grid of patches was made; of `clip`."""


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
    features: FeaturesOrigin | None = None
    """How the features were taken that it was trained on. Absent in a folder that no `covray think train` wrote."""
    trained_through: JsonObject | None = None
    """The language model of the training: `path`, `revision` and `max_tokens`. Absent like `features`."""
