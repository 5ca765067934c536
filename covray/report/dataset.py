"""The page of a dataset: one HTML file with everything inside, to look at chains and to pass on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from covray.chains.compatibility import require_same_tokens
from covray.chains.dataset import ChainDataset
from covray.chains.shard_rows import ShardRow
from covray.config import EngineConfig, TokenizerConfig
from covray.config.build import solver_text
from covray.errors import ConfigError, DatasetError, one_line
from covray.io import storage
from covray.models.tokenizer.vqgan import load_tokenizer
from covray.progress import stage
from covray.report.contact_sheets import ChainPictures, decode_chains, decode_rows, draw_sheet, quality_lines
from covray.report.formatting import NONE, duration, listed, readable
from covray.report.html import TILE_MIN_PX, Link, render
from covray.report.live_rows import find_row
from covray.report.pair_rows import COLUMNS, packed_rows
from covray.tasks import table_order

PAGE = "index.html"
_MAX_EXAMPLES = 20
"""Rejected pairs that are named for each task and reason."""
_TILE_MAX_PX = 128
"""The largest size of a picture at first; the page has a slider."""
_STRIP_PX = 840
"""The width that is left for a chain and its cross-fade."""
_GAP_PX = 6
_FIGURE_NAMES = {
    "quality": ("quality", "1 is a straight path between two typical noises; sentences.drop_worst goes by it"),
    "diffusion_path": ("path", "the way through the diffused frames over the direct way; 1 is straight"),
    "linear_path": ("linear path", "the same of the linear frames"),
    "end_psnr": ("end PSNR, dB", "the round trip of the end that is worse"),
    "source_noise_rms": ("source noise", "|z|/√d of the inverted source; 1 is typical"),
    "label_noise_rms": ("label noise", "|z|/√d of the inverted label; 1 is typical"),
}
"""A heading and an explanation for each of ``pair_rows.FIGURES``."""


@dataclass(frozen=True)
class ChainView:
    """A chain as the page shows it. Pictures are uint8 [s, s, 3]."""

    pair_id: int
    split: str
    quality: list[tuple[str, str]]
    source: np.ndarray
    label: np.ndarray
    methods: tuple[str, ...]
    """A row each; ``none`` for a chain without frames."""
    frames: Mapping[str, np.ndarray]
    """By method, [frames, s, s, 3]."""
    alphas: tuple[float, ...]

    @property
    def stops(self) -> str:
        """The alphas of all pictures, both ends included, for the page's script."""
        return ",".join(map(str, (0.0, *self.alphas, 1.0)))


@dataclass(frozen=True)
class TaskGroup:
    """The chains of one task."""

    task: str
    count: str
    chains: tuple[ChainView, ...]


@dataclass(frozen=True)
class Reject:
    """The pairs of a task that were rejected for one reason."""

    task: str
    reason: str
    count: int
    examples: tuple[tuple[int, str], ...]
    """The first of them, with the detail of their error."""


def view(
    dataset_path: str,
    out: str,
    *,
    limit_per_task: int = 8,
    tokenizer: TokenizerConfig | None = None,
    pair_ids: Sequence[int] = (),
) -> list[str]:
    """Write ``index.html`` and, for each task, a contact sheet ``TASK.png``.

    The page lists all pairs, and holds the pictures of some.

    Args:
        dataset_path: A dataset folder, finished or not.
        out: The folder to write to.
        limit_per_task: The number of chains to show of each task.
        tokenizer: Where the dataset's tokenizer is now, if it has moved.
        pair_ids: Show these pairs, whatever their task, and no others.

    Returns:
        The paths of the files.

    Raises:
        DatasetError: The dataset or the pair is absent, the pair was rejected, or the tokenizer has another codebook.
        WeightsError: The tokenizer cannot be loaded.
        ConfigError: ``out`` cannot be written.
    """
    dataset = ChainDataset(dataset_path, unfinished=True)
    storage.require_writable(out)
    # All rows are found before anything is decoded or written: a wrong id is refused at once.
    chosen = [_good_row(dataset, pair_id) for pair_id in pair_ids]
    config = tokenizer or TokenizerConfig.model_validate(dataset.config["tokenizer"])
    vqgan = load_tokenizer(config, EngineConfig())
    require_same_tokens(dataset, vqgan, config.path)
    with stage(f"decoding chains of {dataset_path}"):
        if chosen:
            # Sorted by task, because the page groups neighbours.
            chains = decode_rows(dataset, vqgan, sorted(chosen, key=lambda row: table_order(row["task"])))
        else:
            chains = decode_chains(dataset, vqgan, limit_per_task)

    written = []
    try:
        for task, group in groupby(chains, lambda chain: chain.task):
            of_task = list(group)
            subtitle = f"{dataset.path} · {len(of_task)} of its chains, decoded from their tokens"
            written.append(storage.join(out, f"{task}.png"))
            with stage(f"drawing {written[-1]}"):
                storage.write_bytes(written[-1], draw_sheet(of_task, readable(task), subtitle))
        written.append(storage.join(out, PAGE))
        write_page(dataset, chains, written[-1])
    except OSError as error:  # the disk may have become full
        raise ConfigError(f"{written[-1]}: cannot be written ({one_line(error)}); give another --out") from error
    return written


def _good_row(dataset: ChainDataset, pair_id: int) -> ShardRow:
    """Return the row of a pair. Raises DatasetError where there is none, or it was rejected."""
    row = find_row(dataset, pair_id)
    if row["error"] is not None:
        raise DatasetError(f"{dataset.path}: pair {pair_id} was rejected ({row['error']}); it has no chain to show")
    return row


def write_page(dataset: ChainDataset, chains: Sequence[ChainPictures], out: str) -> None:
    """Write the page of a dataset.

    The page holds all it needs, loads nothing, and runs no script but its own, whatever the dataset's texts are.

    Args:
        dataset: The dataset, finished or not.
        chains: The chains to show, grouped by task.
        out: The file to write.
    """
    storage.write_bytes(out, render_page(dataset, chains, dataset.table(COLUMNS, errors=True)))


def render_page(dataset: ChainDataset, chains: Sequence[ChainPictures], rows: pa.Table | None) -> bytes:
    """Return the page of a dataset.

    Args:
        dataset: The dataset, finished or not.
        chains: The chains to show, grouped by task.
        rows: The columns ``pair_rows.COLUMNS`` of all pairs; None: of a page that asks its server for them.
    """
    # Source, label and the name of the method stand beside the frames.
    # The pictures are as large as lets the longest chain be seen from end to end.
    columns = len(dataset.alphas) + 3
    tile_px = max(TILE_MIN_PX, min(_TILE_MAX_PX, _STRIP_PX // columns - _GAP_PX))
    groups = []
    for task, of_task in groupby(chains, lambda chain: chain.task):
        groups.append(_group(dataset, task, list(of_task)))
    rejects: list[Reject] = []
    packed = None
    # A page that a server shows asks for its rows; in a file they are part of it. NaN is no JSON.
    if rows is not None:
        rejects = _rejects(rows)
        packed = json.dumps(packed_rows(rows).to_json(), allow_nan=False)
    links = [Link("pairs", "All pairs")]
    links += [Link(group.task, readable(group.task)) for group in groups]
    if rejects:
        links.append(Link("rejected", "Rejected"))
    return render(
        "dataset.html",
        f"Chains of {dataset.path}",
        styles=["dataset.css"],
        scripts=["dataset.js", "pair_rows.js", "pair_list.js"],
        served=rows is None,
        tile_px=tile_px,
        links=links,
        path=dataset.path,
        unfinished=dataset.audit is None,
        tiles=_tiles(dataset),
        lines=_facts(dataset),
        fingerprints=_fingerprints(dataset),
        groups=groups,
        rejects=rejects,
        figures_of_pairs=_FIGURE_NAMES,
        rows=packed,
    )


def _tiles(dataset: ChainDataset) -> list[tuple[str, str]]:
    """Return the large figures of the head, each with what it counts."""
    audit = dataset.audit
    if audit is None:
        tiles = [(NONE, "pairs asked for"), (NONE, "pairs written"), (NONE, "pairs rejected")]
    else:
        tiles = [
            (f"{audit.asked:,}", "pairs asked for"),
            (f"{audit.written:,}", "pairs written"),
            (f"{audit.rejected:,}", "pairs rejected"),
        ]
        if audit.chains_per_s is not None:
            tiles.append((f"{audit.chains_per_s:.3g}", "chains a second"))
        if audit.seconds is not None:
            tiles.append((duration(audit.seconds), "build time"))
    tiles.append((str(dataset.tokens_per_image), "tokens a picture"))
    return tiles


def _fingerprints(dataset: ChainDataset) -> list[tuple[str, str]]:
    """Return the fingerprints by name; pairs without frames have none of a prior."""
    known = filter(itemgetter(1), dataset.fingerprints.items())
    return [(f"{readable(name)} fingerprint", value) for name, value in known]


def _facts(dataset: ChainDataset) -> list[tuple[str, str]]:
    """Return how the chains were made."""
    config = dataset.config
    if dataset.methods:
        lines = [
            ("Chain lengths", listed(config["lengths"])),
            ("Methods", listed(dataset.methods)),
            ("Alphas", listed((f"{alpha:.3g}" for alpha in dataset.alphas), empty="none")),
            ("Prior", f"{config['prior']['path']}, {solver_text(config['prior'])}"),
        ]
    else:
        lines = [("Frames", "none, pairs alone")]
    lines.append(("Tokenizer", config["tokenizer"]["path"]))
    if dataset.unreadable:
        lines.append(("Left out", f"{len(dataset.unreadable)} shards that cannot be read"))
    return lines


def _group(dataset: ChainDataset, task: str, chains: Sequence[ChainPictures]) -> TaskGroup:
    # Pairs beyond the limit are in the list without pictures.
    count = f"{len(chains)} shown"
    if dataset.audit is not None and task in dataset.audit.per_task:
        count += f" of {dataset.audit.per_task[task].written:,}"
    return TaskGroup(task, count, tuple(map(view_of, chains)))


def view_of(chain: ChainPictures) -> ChainView:
    """Return a decoded chain as the page shows it."""
    alphas: tuple[float, ...] = ()
    if chain.frames:
        alphas = chain.alphas
    return ChainView(
        pair_id=chain.pair_id,
        split=chain.split,
        quality=quality_lines(chain),
        source=chain.source,
        label=chain.label,
        methods=tuple(chain.frames) or ("none",),
        frames=chain.frames,
        alphas=alphas,
    )


def _rejects(rows: pa.Table) -> list[Reject]:
    """Return the rejected pairs by task and reason."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], list[tuple[int, str]]] = {}
    rejected = rows.select(["pair_id", "task", "error"]).filter(pc.is_valid(rows["error"]))
    for row in rejected.to_pylist():
        # An error is REASON: DETAIL; the detail differs from pair to pair.
        reason, _, detail = row["error"].partition(":")
        key = (row["task"], reason)
        counts[key] += 1
        # All are counted; examples are kept for the first of them.
        if counts[key] <= _MAX_EXAMPLES:
            examples.setdefault(key, []).append((row["pair_id"], detail.strip()))
    rejects = []
    for key in sorted(counts):
        rejects.append(Reject(*key, counts[key], tuple(examples[key])))
    return rejects
