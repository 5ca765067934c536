"""List what covray and installed packages bring of each kind that packages may add to."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.table import Table

from covray.cli.options import Json
from covray.cli.output import console, escape


def plugins(json_: Json = False) -> None:
    """List tasks, metrics, sources of pairs, labellers, interpolations and trackers, covray's and installed ones."""
    from covray.distributed.trackers.base import tracker_registry
    from covray.methods import frame_makers
    from covray.pairs.labelling.pairs import labellers
    from covray.pairs.plugin_sources import pair_sources
    from covray.tasks import REGISTRY
    from covray.tasks.metrics import metric_registry

    found = []
    registries = (REGISTRY, metric_registry(), pair_sources(), labellers(), frame_makers(), tracker_registry())
    for registry in registries:
        found += registry.load_all()
    if json_:
        print(json.dumps([asdict(plugin) for plugin in found]))
        return
    table = Table("group", "name", "package", "", box=None, pad_edge=False)
    for plugin in found:
        package = f"{plugin.package} {plugin.version}".strip()
        table.add_row(*(escape(text) for text in (plugin.group, plugin.name, package, plugin.problem)))
    console.print(table)
