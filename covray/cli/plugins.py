"""List what installed packages add to covray."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.table import Table

from covray.cli.options import Json
from covray.cli.output import console, escape


def plugins(json_: Json = False) -> None:
    """Tasks and sources of pairs that installed packages add, and why one is not used."""
    from covray.pairs.plugin_sources import pair_sources
    from covray.tasks import PLUGINS

    found = [*PLUGINS, *pair_sources()[1]]
    if json_:
        print(json.dumps([asdict(plugin) for plugin in found]))
        return
    if not found:
        console.print(
            "no installed package adds tasks (covray.tasks) or sources of pairs (covray.pairs)", soft_wrap=True
        )
        return
    table = Table("group", "name", "package", "", box=None, pad_edge=False)
    for plugin in found:
        package = f"{plugin.package} {plugin.version}".strip()
        table.add_row(*(escape(text) for text in (plugin.group, plugin.name, package, plugin.problem)))
    console.print(table)
