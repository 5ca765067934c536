"""Answer over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from covray.cli.options import ConfigFile, Sets, StepOptions
from covray.cli.output import console
from covray.config import ServeConfig

SERVE = StepOptions(ServeConfig)


def serve(
    context: typer.Context,
    adapter: Annotated[
        list[str] | None,
        SERVE.option(
            "--adapter", "adapters", text="Finished run of covray train, or NAME=RUN; repeatable.", metavar="RUN"
        ),
    ] = None,
    think: Annotated[
        str | None,
        SERVE.option(
            "--think", "think.folder", text="Folder with ThinkDiff's parts: aligner, painter, text, vlm or clip.",
            metavar="FOLDER",
        ),
    ] = None,
    host: Annotated[str | None, SERVE.option("--host", "host")] = None,
    port: Annotated[int | None, SERVE.option("--port", "port")] = None,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="COVRAY_SERVE_TOKEN", help="Token that requests must bring; a process list shows it, so prefer the "
            "variable.",
        ),
    ] = None,
    config: ConfigFile = None,
    sets: Sets = None,
) -> None:  # fmt: skip
    """Answer queries over HTTP, and on a page, until Ctrl-C."""
    resolved = SERVE.resolve(context)
    from covray.serve.app import run

    def ready(address: str) -> None:
        console.print(f"{address}  (Ctrl-C ends it)", highlight=False, soft_wrap=True)

    # A variable may be set and empty: that counts as no token.
    run(resolved, token or None, ready)
