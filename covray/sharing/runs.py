"""A run's adapter or merged model, with a card."""

from __future__ import annotations

import contextlib
from pathlib import Path

from covray.errors import CovrayError
from covray.models.lvm.adapter import export_run
from covray.sharing.cards import model_card
from covray.training.records import RunRecord, TrainResult


def export_run_with_card(run: str, out: str, merge: bool, licence: str | None = None) -> None:
    """Write what the finished ``run`` learned to the new folder ``out``, and a model card where its records allow one.

    Args:
        run: The run folder.
        out: The folder.
        merge: Whether the adapter is merged into its backbone.
        licence: For the card.

    Raises:
        CovrayError: As ``export_run``.
    """
    export_run(run, out, merge)
    with contextlib.suppress(CovrayError):  # of a run whose records an earlier version wrote
        card = model_card(RunRecord.read(run), TrainResult.read(run), None, licence)
        (Path(out).expanduser() / "README.md").write_text(card, encoding="utf-8")
