"""``covray pairs``: make a manifest of pairs from photographs, scenes, lists and data sets, and check one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from covray.cli.completion import complete_tasks
from covray.cli.options import Json, OutManifest, Seed, shares, split_commas
from covray.cli.output import console, escape
from covray.cli.pairs_writing import Actors, Count, write_drawn, write_manifest
from covray.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa

    from covray.pairs.check import PairsReport
    from covray.pairs.manifest_reading import ManifestInfo

Task = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK,...",
        help="Comma-separated; all that apply by default.",
        autocompletion=complete_tasks,
    ),
]
Splits = Annotated[str | None, typer.Option(help="Shares, such as train=8,val=1,test=1.")]
Root = Annotated[str, typer.Argument(help="The dataset's folder; docs/datasets.md says what lies in it.")]
Base = Annotated[
    str | None, typer.Option("--root", help="Folder that holds it: paths are below that, so that several build as one.")
]


def photos(
    folder: Annotated[
        list[str], typer.Argument(help="Any folders of photographs, or patterns such as '2024/**/*.jpg'.")
    ],
    out: OutManifest,
    task: Task = None,
    size: Annotated[int, typer.Option(min=16, max=4096, help="Shorter side is shrunk to this many pixels.")] = 512,
    splits: Splits = None,
    count: Count = None,
    seed: Seed = 0,
    base: Base = None,
    actors: Actors = None,
    json_: Json = False,
) -> None:
    """Photographs label themselves: colorization, edges, low light."""
    from covray.pairs.photographs import root_of
    from covray.pairs.photos import PHOTO_TASKS, photo_pairs

    chosen = split_commas(task) or list(PHOTO_TASKS)
    pairs = photo_pairs(folder, chosen, size, shares(splits), seed, count)
    # The total that the progress shows; None where all photographs are taken.
    write_drawn(out, root_of(folder), base, pairs, count and count * len(set(chosen)), json_, actors)


def label(
    folder: Annotated[list[str], typer.Argument(help="Folders of photographs, or patterns such as '2024/**/*.jpg'.")],
    out: OutManifest,
    task: Annotated[str, typer.Option(help="depth, normals, segmentation or pose; with --labeller any task.")],
    model: Annotated[
        str, typer.Option(help="Model of transformers, or diffusers' Marigold: a folder or a hub id. Safetensors only.")
    ] = "",
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch of the hub id.")] = None,
    scale: Annotated[
        str | None,
        typer.Option(
            help="How relative depth d becomes metres: metres, linear:A,B (A d + B), inverse:A,B (1 / (A d + B))."
        ),
    ] = None,
    axes: Annotated[
        str | None,
        typer.Option(help="What a model's three numbers of a normal are; x right, y up, z to the viewer. As x,-y,-z."),
    ] = None,
    confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Less sure pixels become void, less sure keypoints are left out.")
    ] = 0.0,
    detector: Annotated[
        str | None,
        typer.Option(help="Of people, for pose: a folder or a hub id. By default one person fills the picture."),
    ] = None,
    labeller: Annotated[
        str | None, typer.Option(help="A plug-in's labeller in place of a model; covray plugins lists them.")
    ] = None,
    size: Annotated[int, typer.Option(min=16, max=4096, help="Shorter side is shrunk to this before labelling.")] = 512,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where the model runs.")] = "auto",
    splits: Splits = None,
    count: Count = None,
    seed: Seed = 0,
    base: Base = None,
    actors: Actors = None,
    json_: Json = False,
) -> None:
    """Photographs labelled by your own model: depth, normals, segmentation, pose."""
    from covray.pairs.labelling.pairs import label_pairs
    from covray.pairs.labelling.spec import LabelOptions, read_axes, read_scale
    from covray.pairs.photographs import root_of

    if not model and not labeller:
        raise ConfigError("--model: name a model's folder or hub id, or a plug-in by --labeller")
    options = LabelOptions(task, model, revision, read_scale(scale), read_axes(axes), confidence, detector, seed)
    pairs = label_pairs(folder, options, size, shares(splits), count, device=device, labeller=labeller)
    write_drawn(out, root_of(folder), base, pairs, count, json_, actors)


def scenes(
    out: OutManifest,
    count: Annotated[int, typer.Option(min=1, help="Scenes; each gives a pair for every task.")] = 100,
    task: Task = None,
    size: Annotated[int, typer.Option(min=16, max=2048, help="Side of the pictures in pixels.")] = 64,
    splits: Splits = None,
    captions: Annotated[
        bool, typer.Option("--captions", help="Give every pair the scene's caption, for prior.context of a build.")
    ] = False,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Rendered scenes with exact labels for all seven tasks; --task caption gives their captions and questions."""
    from covray.pairs.scenes import scene_pairs
    from covray.pairs.words import CAPTION_TASK
    from covray.tasks import TASKS

    chosen = split_commas(task) or list(TASKS)
    # Asked here: the generator below would refuse it only after the manifest was begun.
    unknown = [name for name in chosen if name not in TASKS and name != CAPTION_TASK]
    if unknown:
        raise ConfigError(f"--task {unknown[0]}: no such task; the tasks are {', '.join(TASKS)}")
    pairs = scene_pairs(count, chosen, size, seed, shares(splits), captions)
    write_manifest(out, None, pairs, json_, count * len(chosen), captions or CAPTION_TASK in chosen)


def portraits(
    out: OutManifest,
    count: Annotated[int, typer.Option(min=1, help="Pictures.")] = 1000,
    size: Annotated[int, typer.Option(min=16, max=2048, help="Side of the pictures in pixels.")] = 64,
    splits: Splits = None,
    seed: Seed = 0,
    json_: Json = False,
) -> None:
    """Rendered solids with captions, attributes, and questions of one-word answers.

    A picture shows one solid or two, in one of ten colours, textures, backgrounds, styles and arrangements.

    Of each theme 15 of the 100 combinations with an object are held out. Every picture of the split test shows one of
    them, and no picture of another split does.
    """
    from covray.pairs.scenes.portraits import portrait_pairs

    pairs = portrait_pairs(count, size, seed, shares(splits))
    write_manifest(out, None, pairs, json_, count, captions=True)


def coco(
    root: Root,
    out: OutManifest,
    task: Annotated[str, typer.Option(help="segmentation or pose.")] = "segmentation",
    labels: Annotated[
        str, typer.Option(help="panoptic (133 classes) or stuff (182); or stuffthingmaps or pixelmaps, by name.")
    ] = "panoptic",
    split: Annotated[str, typer.Option(help="train or val.")] = "train",
    count: Count = None,
    seed: Seed = 0,
    base: Base = None,
    actors: Actors = None,
    json_: Json = False,
) -> None:
    """COCO 2017: classes of the panoptic or stuff labels, or people's skeletons."""
    from covray.pairs.coco import coco_pairs

    write_drawn(out, root, base, coco_pairs(root, task, labels, split, count, seed), count, json_, actors)


def nyuv2(
    root: Root,
    out: OutManifest,
    task: Annotated[str, typer.Option(help="depth or normals.")],
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
    count: Count = None,
    seed: Seed = 0,
    base: Base = None,
    actors: Actors = None,
    json_: Json = False,
) -> None:
    """NYU Depth v2: depth in metres, or surface normals."""
    from covray.pairs.nyuv2 import nyuv2_pairs

    write_drawn(out, root, base, nyuv2_pairs(root, task, split, count, seed), count, json_, actors)


def bsds(
    root: Root,
    out: OutManifest,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "train",
    share: Annotated[float, typer.Option(help="Share of the annotators who must have drawn an edge.")] = 0.5,
    listing: Annotated[
        str | None, typer.Option("--list", help="File below ROOT of lines 'image label', as HED-BSDS has.")
    ] = None,
    count: Count = None,
    seed: Seed = 0,
    base: Base = None,
    actors: Actors = None,
    json_: Json = False,
) -> None:
    """BSDS500, or HED-BSDS: the edges that people drew."""
    from covray.pairs.bsds import bsds_pairs

    write_drawn(out, root, base, bsds_pairs(root, split, share, listing, count, seed), count, json_, actors)


def lol(
    root: Root,
    out: OutManifest,
    split: Annotated[str, typer.Option(help="train (our485) or test (eval15).")] = "train",
    count: Count = None,
    seed: Seed = 0,
    base: Base = None,
    actors: Actors = None,
    json_: Json = False,
) -> None:
    """LOL: photographs in the dark and in good light."""
    from covray.pairs.lol import lol_pairs

    write_drawn(out, root, base, lol_pairs(root, split, count, seed), count, json_, actors)


def from_plugin(
    source: Annotated[str, typer.Argument(help="Name of the source; covray plugins lists them.")],
    root: Annotated[str, typer.Argument(help="The data set's folder.")],
    out: OutManifest,
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "train",
    count: Count = None,
    seed: Seed = 0,
    base: Base = None,
    actors: Actors = None,
    json_: Json = False,
) -> None:
    """A data set that another installed package knows."""
    from covray.pairs.plugin_sources import pair_sources

    pairs = pair_sources().find(source)(root, split=split, count=count, seed=seed)
    write_drawn(out, root, base, pairs, count, json_, actors)


def check(
    manifest: Annotated[str, typer.Argument(help="Manifest, or a folder of manifests.")],
    limit: Annotated[int, typer.Option(min=0, help="Pairs that cannot be used: named up to so many.")] = 20,
    json_: Json = False,
) -> None:
    """Open every picture of a manifest: what is missing or broken, and what the labels hold."""
    from covray.pairs.check import check_pairs

    report = check_pairs(manifest, _on_ray)
    if json_:
        print(json.dumps(report.to_json()))
    else:
        _print_report(report, limit)


def _on_ray(manifest: str, info: ManifestInfo) -> Iterator[pa.Table]:
    from covray.distributed.check import checked_on_ray  # Ray takes seconds to import: only where it is needed

    return checked_on_ray(manifest, info)


def _print_report(report: PairsReport, limit: int) -> None:
    table = Table("task", "pairs", "usable", "splits", "images", "labels", box=None, pad_edge=False)
    for name, task in report.tasks.items():
        splits = ", ".join(f"{escape(split)} {count}" for split, count in task.splits.items())
        sizes = [_sizes(counts) for counts in (task.image_px, task.label_px)]
        table.add_row(name, str(task.pairs), str(task.usable), splits, *sizes)
    console.print(table)
    for name, task in report.tasks.items():
        # Less than 0.05% would be shown as 0.0%.
        shares = [f"{escape(meaning)} {share:.1%}" for meaning, share in task.shares().items() if share >= 0.0005]
        ranges = [f"{quantity} {low:.4g} to {high:.4g}" for quantity, (low, high) in task.ranges.items()]
        if shares or ranges:
            console.print(f"{name}: {', '.join(shares + ranges)}", highlight=False, soft_wrap=True)
    for note in report.notes():
        console.print(f"look at {escape(note)}", highlight=False, soft_wrap=True)
    for bad in report.bad[:limit]:
        line = f"{bad.name}: {bad.task}: {bad.reason}: {bad.detail}"
        console.print(escape(line), highlight=False, soft_wrap=True)
    if len(report.bad) > limit:
        console.print(f"and {len(report.bad) - limit} more; --json names all", soft_wrap=True)
    reasons = ", ".join(f"{reason} {count}" for reason, count in report.reasons().most_common())
    usable = report.pairs - len(report.bad)
    because = f"; {reasons}" if reasons else ""
    console.print(f"{usable} of {report.pairs} pairs can be used{because}", highlight=False, soft_wrap=True)


def _sizes(counts: Counter[str]) -> str:
    """Return the most frequent size, and how many others there are."""
    if not counts:
        return "-"
    most_frequent = counts.most_common(1)[0][0]
    if len(counts) == 1:
        return most_frequent
    return f"{most_frequent} and {len(counts) - 1} others"
