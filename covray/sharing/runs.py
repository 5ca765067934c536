"""A run's adapter or merged model, with a card."""

from __future__ import annotations

import contextlib

from covray.errors import CovrayError
from covray.evaluation.records import EvaluationResults
from covray.io.model_folders import local_path
from covray.io.storage import Folder
from covray.models.lvm.adapter import export_run
from covray.sharing.cards import answer_pictures, model_card, score_table
from covray.sharing.strips import evaluation_strips
from covray.training.records import RunRecord, TrainResult


def export_run_with_card(
    run: str, out: str, merge: bool, licence: str | None = None, scores: str | None = None
) -> None:
    """Write what the finished ``run`` learned to the new folder ``out``, and a model card where its records allow one.

    Args:
        run: The run folder.
        out: The folder.
        merge: Whether the adapter is merged into its backbone.
        licence: For the card.
        scores: Folder of an evaluation whose table and pictures the card shows.

    Raises:
        CovrayError: As ``export_run``, or the evaluation is unfinished.
    """
    table, strips = scores_of(scores)  # refused before anything is written
    export_run(run, out, merge)
    target = local_path(out)
    with contextlib.suppress(CovrayError):  # of a run whose records an earlier version wrote
        card = model_card(RunRecord.read(run), TrainResult.read(run), None, licence, table)
        (target / "README.md").write_text(card, encoding="utf-8")
        for name, picture in strips.items():
            Folder(str(target)).write_bytes(name, picture)


def scores_of(evaluation: str | None) -> tuple[str, dict[str, bytes]]:
    """Return a card's section on the scores of an evaluation, and the pictures that it shows by their names.

    Both are empty for None. Raises CovrayError for a folder that is no finished evaluation.
    """
    if evaluation is None:
        return "", {}
    strips = evaluation_strips(Folder(evaluation))
    return "## Scores\n" + score_table(EvaluationResults.read(evaluation)) + answer_pictures(strips), strips
