"""Check before anything starts that every split has the pairs that the trials of a sweep need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from covray.chains.dataset import ChainDataset
from covray.config import BuildConfig, EvaluateConfig, SweepConfig
from covray.errors import DatasetError
from covray.io import storage
from covray.pairs.manifest_reading import check_manifest, read_manifest

PairCounts = dict[str, dict[str, int]]
"""Pairs by split and task."""


@dataclass(frozen=True)
class Training:
    """What a trial reads while it trains."""

    splits: tuple[tuple[str, str], ...]
    """The key of each split in ``train.sentences``, and its name."""
    tasks: tuple[str, ...]
    """Empty: all tasks of the split."""
    pairs: int
    """Example pairs of a sentence."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation reads."""

    config: EvaluateConfig
    pairs: int
    """Example pairs of an episode."""
    tasks_key: str
    """The key that decides the tasks, for the message."""


@dataclass(frozen=True)
class _Need:
    split_key: str
    tasks_key: str
    split: str
    tasks: tuple[str, ...]
    """Empty: all tasks of the split."""
    pairs: int


def require_pairs(
    config: SweepConfig, build: BuildConfig | None, trainings: Iterable[Training], evaluations: Iterable[Evaluation]
) -> None:
    """Check that every split that is read has enough pairs, of every task that is asked for.

    Args:
        config: The sweep, for its data or manifest.
        build: The dataset that the sweep builds, if it does.
        trainings: What the trials train on.
        evaluations: What trials and references are evaluated on.

    Raises:
        DatasetError: A split has no pairs, or too few of a task.
    """
    # The good pairs of the dataset, or before it is built all pairs of the manifest.
    counts = count_pairs_by_task(config, build)
    source = finished_dataset(config, build) or config.manifest
    # Many trials need the same; each need is checked once, in the order of the trials.
    needs = dict.fromkeys(_training_needs(trainings)) | dict.fromkeys(_evaluation_needs(evaluations, counts))
    for need in needs:
        of_split = counts.get(need.split, {})
        if not of_split:
            raise DatasetError(
                f"{source}: no pairs in split {need.split}, only in {', '.join(sorted(counts))}; set {need.split_key}"
            )
        for task in need.tasks or of_split:
            present = of_split.get(task, 0)
            if present < need.pairs:
                raise DatasetError(
                    f"{source}: {task} has {present} pairs in split {need.split}, the grid needs {need.pairs}; "
                    f"lower grid.pairs, set {need.split_key}, or name the other tasks in {need.tasks_key}"
                )


def _training_needs(trainings: Iterable[Training]) -> Iterator[_Need]:
    """Yield the pairs that each training needs of its splits: a sentence is made of examples and one query."""
    for training in trainings:
        for key, split in training.splits:
            yield _Need(f"train.sentences.{key}", "grid.tasks", split, training.tasks, training.pairs + 1)


def _evaluation_needs(evaluations: Iterable[Evaluation], counts: PairCounts) -> Iterator[_Need]:
    for evaluation in evaluations:
        config = evaluation.config
        # Where no tasks are chosen, those of the queries need examples.
        tasks = tuple(config.tasks or counts.get(config.split, {}))
        # Where queries and examples share a split, the query itself is no example.
        is_shared = config.split == config.example_split
        yield _Need("evaluate.split", evaluation.tasks_key, config.split, tasks, 1)
        # A baseline needs an example even where no model is shown one.
        examples = max(1, evaluation.pairs + is_shared)
        yield _Need("evaluate.example_split", evaluation.tasks_key, config.example_split, tasks, examples)


def count_pairs_by_task(config: SweepConfig, build: BuildConfig | None) -> PairCounts:
    """Count the good pairs of the dataset, or all pairs of a manifest that is not built yet.

    Raises CovrayError where neither can be read.
    """
    columns = ["split", "task"]
    dataset = finished_dataset(config, build)
    if dataset is not None:
        table = ChainDataset(dataset).table(columns)
    else:
        check_manifest(str(config.manifest))
        table = pa.Table.from_batches(read_manifest(str(config.manifest), columns))
    # A row without a split or a task is counted nowhere.
    grouped = table.drop_null().group_by(columns).aggregate([([], "count_all")])
    counts: PairCounts = {}
    for row in grouped.sort_by("task").to_pylist():
        counts.setdefault(row["split"], {})[row["task"]] = row["count_all"]
    return counts


def finished_dataset(config: SweepConfig, build: BuildConfig | None) -> str | None:
    """Return the dataset of the trials; None where it is not built yet."""
    if build is None:
        return config.data
    # The audit is written last: with it the dataset is finished, and its rejected pairs are known.
    if not storage.exists(storage.join(build.out, "_audit.json")):
        return None
    return build.out


def pairs_of_tasks(counts: PairCounts, split: str | None, tasks: Sequence[str] | None) -> int:
    """Return the number of pairs of ``tasks``, or of all, in a split."""
    of_split = counts[str(split)]
    if tasks is None:
        return sum(of_split.values())
    return sum(of_split.get(task, 0) for task in tasks)
