"""Which version of a dataset ``covray build`` writes: the first, or with ``--append`` one of a larger manifest.

The description names every version that was begun, the audit every one that is finished. A version under way is the one
after the newest finished one, and readers see the finished ones meanwhile.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from covray.chains.dataset import ChainDataset
from covray.chains.records import AppendedPairs, Audit, DatasetRecord, PairSet, VersionCounts
from covray.config import BuildConfig
from covray.distributed.resumable import Output
from covray.errors import DatasetError
from covray.io.storage import Folder
from covray.pairs.manifest_reading import ManifestInfo, read_classes
from covray.tasks import segmentation
from covray.tasks.base import Meta


@dataclass(frozen=True)
class Version:
    """The version of a dataset that a build writes."""

    number: int
    """Counted from 1."""
    finished: int
    """How many versions are finished."""
    is_new: bool
    """Whether the description does not name it yet; version 1 is never new in this sense."""
    record: DatasetRecord | None = None
    """The description that names a new version."""


def choose_version(config: BuildConfig, output: Output[DatasetRecord], info: ManifestInfo, append: bool) -> Version:
    """Return the version that a build of the manifest writes, or has written.

    Raises:
        DatasetError: The dataset is of another manifest, or an earlier version must be finished first.
    """
    begun, out = output.begun, config.out
    if begun is None:
        if append:
            raise DatasetError(f"--append: {out} holds no dataset yet; leave out --append to build its first version")
        return Version(number=1, finished=0, is_new=False)
    audit = Audit.read_if_present(output.folder)
    finished = 0
    if audit is not None:
        finished = audit.version
    pairs, known = pair_set(info), begun.pair_sets
    # A manifest that the description names: its version is written, or read where it is finished.
    if begun.pairs is not None and pairs in known:
        number = known.index(pairs) + 1
        if number > finished + 1:
            manifest = begun.of_version(finished + 1).config["pairs"]
            raise DatasetError(f"{out}: version {finished + 1} is unfinished; run covray build --manifest {manifest}")
        return Version(number, finished, is_new=False)
    # Another manifest: it may be the next version of a dataset whose last one is finished.
    if append and begun.pairs is not None and finished == len(known):
        return Version(finished + 1, finished, is_new=True)
    if append and begun.pairs is not None:
        manifest = begun.of_version(len(known)).config["pairs"]
        raise DatasetError(f"{out}: the build of {manifest} is unfinished; run it again before you append more")
    rows: int | str = "unknown"  # of a dataset that an earlier version of covray began
    if begun.pairs is not None:
        rows = begun.pairs.rows
    raise DatasetError(
        f"{out}: was begun with another manifest ({rows} pairs, {config.pairs} has {info.rows}, or others); "
        "give that one, or another --out, or --append a manifest that holds its pairs and more"
    )


def grows(config: BuildConfig, info: ManifestInfo, append: bool) -> bool:
    """Return whether a finished dataset is to become a larger one, by this command or by one that was stopped."""
    begun = DatasetRecord.read_if_present(config.out)
    audit = Audit.read_if_present(config.out)
    if begun is None or audit is None:
        return False
    pairs, known = pair_set(info), begun.pair_sets
    if pairs not in known:
        return append
    return known.index(pairs) >= audit.version


def with_version(config: BuildConfig, begun: DatasetRecord, info: ManifestInfo) -> DatasetRecord:
    """Return the description with a new version.

    Raises:
        DatasetError: The manifest lacks pairs of the version before, or has other classes of segmentation.
    """
    before = ChainDataset(config.out)
    present = before.table(["pair_id"], errors=True)["pair_id"].to_numpy()
    lacking = np.setdiff1d(present, info.pair_ids)
    if len(lacking):
        raise DatasetError(
            f"{config.pairs}: lacks {len(lacking)} pairs that {config.out} has; --append a manifest that holds all of "
            "them and more, such as a folder with both manifests"
        )
    classes = classes_of(config, info)
    assert before.audit is not None
    if segmentation.name in before.audit.per_task and classes != begun.classes:
        raise DatasetError(
            f"{config.pairs}: its segmentation has other classes than {config.out}, so that one colour would stand for "
            "two things; write it with the same --classes, or build it into another --out"
        )
    appended = [*(begun.appended or ()), AppendedPairs(manifest=config.pairs, pairs=pair_set(info))]
    update: dict[str, Any] = {"appended": appended}
    if classes is not None:
        update["classes"] = classes
    return begun.model_copy(update=update)


def asked_before(audit: Audit, task: str) -> int:
    """Return the pairs of a task in the manifest of an audit."""
    if task not in audit.per_task:
        return 0
    return audit.per_task[task].asked


def pair_set(info: ManifestInfo) -> PairSet:
    """Return what the description says of a manifest's pairs."""
    # Sorted: a manifest is the same set whatever the order of its rows and files.
    ids = info.pair_ids.copy()
    ids.sort()
    return PairSet(rows=info.rows, sha256=hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest())


def classes_of(config: BuildConfig, info: ManifestInfo) -> Meta | None:
    """Return the classes of the manifest's segmentation; ManifestError where one colour would stand for two."""
    if segmentation.name not in info.per_task:
        return None
    return read_classes(config.pairs)


def earlier_counts(folder: Folder, version: int) -> list[VersionCounts]:
    """Return what each version before ``version`` holds."""
    audit = Audit.read(folder)
    return [audit.of_version(number).counts() for number in range(1, version)]
