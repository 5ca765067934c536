"""``covray pairs manifest`` and ``hub``: pairs of lists, with pictures in files, in the list itself, or on the web."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from covray.cli.options import Json, OutManifest, Seed, split_commas
from covray.cli.pairs_writing import Actors, Count, checked, made_by, write_manifest
from covray.errors import ConfigError

if TYPE_CHECKING:
    from covray.pairs.manifest import Pair
    from covray.pairs.user_labels import LabelRules

Classes = Annotated[str | None, typer.Option(help="YAML file of the masks' classes: names, numbers or colours, void.")]
MetresPerLevel = Annotated[
    float | None, typer.Option(min=0, help="Depth of one level of depth labels; 0.001 for millimetres.")
]
LabelOrientation = Annotated[
    Literal["stored", "upright"] | None,
    typer.Option(help="How labels lie to images that EXIF turns; by default as their size tells."),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host", help="Host that https pictures may come from: name, *.name or name:port. Repeat for more."
    ),
]
Timeout = Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds for a picture of the web, in one attempt.")]
MaxMb = Annotated[float, typer.Option(min=0.001, max=512, help="MB that a picture of the web may have.")]
Attempts = Annotated[int, typer.Option(min=1, max=20, help="Attempts for a picture of the web.")]
Retry = Annotated[
    str | None,
    typer.Option(
        metavar="REASON,...",
        help="Take --out as it is, and make only the rows again that were rejected so, such as unreachable.",
    ),
]


def manifest(
    file: Annotated[str, typer.Argument(help="Your own list: Parquet, CSV, TSV, JSONL, or Painter's JSON.")],
    out: OutManifest,
    task: Annotated[str | None, typer.Option(help="The task, where the list has no such column.")] = None,
    split: Annotated[str, typer.Option(help="The split, where the list has no such column.")] = "train",
    root: Annotated[
        str | None, typer.Option(help="Folder the list's paths are relative to; by default its own.")
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column of the images, if not image.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the labels, if not label.")] = None,
    classes: Classes = None,
    metres_per_level: MetresPerLevel = None,
    label_orientation: LabelOrientation = None,
    allow_host: AllowHost = None,
    timeout: Timeout = 30.0,
    max_mb: MaxMb = 64.0,
    attempts: Attempts = 3,
    retry: Retry = None,
    json_: Json = False,
) -> None:
    """Your own pairs, from a list of files."""
    from covray.pairs.user_labels import checked_pairs
    from covray.pairs.user_lists import list_root, read_user_list

    rules = label_rules(classes, metres_per_level, label_orientation, allow_host, (timeout, max_mb, attempts))
    if retry is not None:
        _write_again(out, retry, rules, json_)
        return
    place = list_root(file, root)
    columns = {}
    for key, column in (("image", image_column), ("label", label_column)):
        if column is not None:
            columns[key] = column
    pairs = checked_pairs(read_user_list(file, task, split, root, columns), place, rules)
    # Three errors of each reason in full, because users can correct their own lists.
    write_manifest(out, place, checked(pairs, None, examples=3), json_)


def hub(
    dataset: Annotated[str, typer.Argument(help="OWNER/NAME of a dataset of the hub with Parquet files.")],
    out: OutManifest,
    task: Annotated[str, typer.Option(help="The task of its labels.")],
    split: Annotated[str, typer.Option(help="Its split, which is the pairs' split.")] = "train",
    subset: Annotated[str | None, typer.Option(help="Its configuration, where it has several.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, tag or branch.")] = None,
    image_column: Annotated[str, typer.Option(help="Column of the images.")] = "image",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    classes: Classes = None,
    metres_per_level: MetresPerLevel = None,
    label_orientation: LabelOrientation = None,
    allow_host: AllowHost = None,
    timeout: Timeout = 30.0,
    max_mb: MaxMb = 64.0,
    attempts: Attempts = 3,
    retry: Retry = None,
    count: Count = None,
    seed: Seed = 0,
    actors: Actors = None,
    json_: Json = False,
) -> None:
    """A dataset of the Hugging Face hub, read from its Parquet files. HF_TOKEN opens private and gated ones."""
    from covray.pairs.hub import find_dataset
    from covray.pairs.parquet_rows import RowSource, row_pairs
    from covray.pairs.values import unknown_task
    from covray.tasks import TASKS

    if task not in TASKS:
        raise ConfigError(f"--task: {unknown_task(task)}")
    rules = label_rules(classes, metres_per_level, label_orientation, allow_host, (timeout, max_mb, attempts))
    # Before the hub is asked: rejected rows name their pictures themselves.
    if retry is not None:
        _write_again(out, retry, rules, json_)
        return
    found = find_dataset(dataset, split, subset, revision)
    meta = {"source": f"hub {found.name}", "revision": found.commit, "licence": found.licence}
    source = RowSource(task, split, image_column, label_column, meta)
    pairs = row_pairs(found.files, source, rules, count, seed)
    with made_by(pairs, out, actors) as made:
        write_manifest(out, None, checked(made, count, examples=3), json_, count)


def label_rules(
    classes: str | None,
    metres_per_level: float | None,
    orientation: Literal["stored", "upright"] | None,
    hosts: list[str] | None,
    limits: tuple[float, float, int],
) -> LabelRules:
    """Return the rules of the options; ``limits`` are seconds, MB and attempts of a picture of the web.

    Raises:
        ConfigError: An option cannot be used.
    """
    from covray.io.web import web_rules
    from covray.pairs.classes import load_classes
    from covray.pairs.user_labels import LabelRules

    # Typer's lower bound lets 0 and NaN pass, by which every label would be without depth.
    if metres_per_level is not None and not 0 < metres_per_level < math.inf:
        raise ConfigError(f"--metres-per-level {metres_per_level:g}: must be above 0; 0.001 is for millimetres")
    masks = None if classes is None else load_classes(classes)
    timeout_s, most_mb, attempts = limits
    web = web_rules(hosts or [], timeout_s, int(most_mb * 1e6), attempts)
    return LabelRules(masks, metres_per_level, orientation, web)


def _write_again(out: str, retry: str, rules: LabelRules, json_: bool) -> None:
    """Make the rows of the manifest ``out`` again that were rejected for the reasons ``retry``."""
    from covray.pairs.retry import retried_pairs

    if rules.web is None:
        raise ConfigError("--retry: give --allow-host, as when the manifest was made")
    info, again = retried_pairs(out, split_commas(retry) or [], rules)
    pairs: Iterable[Pair] = checked(again, None, examples=3)
    write_manifest(out, info.root, pairs, json_, info.rows)
