"""Upload what was made to the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from covray.cli.options import Json
from covray.cli.output import print_values


def push(
    source: Annotated[str, typer.Argument(help="Folder of a finished training, build or evaluation.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository; made if it is absent.")],
    licence: Annotated[
        str | None, typer.Option("--licence", help="The hub's name of its licence, as apache-2.0; required.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="A repository that is made now is for everybody.")] = False,
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The hub's name of a run's backbone, if it was a folder.")
    ] = None,
    scores: Annotated[
        str | None, typer.Option("--scores", help="Evaluation whose table the card of a run shows.")
    ] = None,
    json_: Json = False,
) -> None:
    """Upload a run, a dataset or an evaluation with its card to the Hugging Face hub, as one commit."""
    from covray.sharing.hub import push as upload

    result = upload(source, repository, licence=licence, public=public, base_model=base_model, scores=scores)
    print_values(result, json_)
