"""Datasets of the Hugging Face hub, by their Parquet files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from covray.errors import ManifestError, one_line

CONVERTED = "refs/convert/parquet"
"""The branch where the hub keeps the Parquet files that it has made of a dataset's own files."""


@dataclass(frozen=True)
class HubDataset:
    """Parquet files of one split of a dataset, pinned to a commit."""

    name: str
    commit: str
    licence: str | None
    files: tuple[str, ...]
    """Addresses that ``covray.io.storage`` reads, in the order of their names."""


def find_dataset(name: str, split: str, subset: str | None = None, revision: str | None = None) -> HubDataset:
    """Find the files of a split; none is read.

    Args:
        name: ``OWNER/NAME``.
        split: The split, which the files' paths name.
        subset: A configuration of the dataset, which is a folder of its files.
        revision: Commit, tag or branch; None: the main branch, or the hub's own conversion where that has no Parquet.

    Raises:
        ManifestError: There is no such dataset, it needs a token, the hub does not answer, or no file fits.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ManifestError(f"{name}: is no dataset of the hub; give OWNER/NAME")
    commit, paths, licence = _listed(name, revision)
    if not paths and revision is None:
        commit, paths, converted_licence = _listed(name, CONVERTED)
        licence = licence or converted_licence
    if not paths:
        raise ManifestError(f"{name}: holds no Parquet files; download it, and make a list for covray pairs manifest")
    # The addresses hold the commit: what actors read later is what was listed now.
    files = [f"hf://datasets/{name}@{commit}/{path}" for path in _chosen(name, paths, split, subset)]
    return HubDataset(name, commit, licence, tuple(files))


def _listed(name: str, revision: str | None) -> tuple[str, list[str], str | None]:
    """Return commit, Parquet files and licence of a dataset at a revision; no files where there is no such branch."""
    # Imported here: other sources need no hub client.
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().dataset_info(name, revision=revision, timeout=_TIMEOUT_S)
    except RevisionNotFoundError as error:
        if revision == CONVERTED:
            return "", [], None
        raise ManifestError(f"{name}: has no revision {revision}; give a commit, a tag or a branch") from error
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise ManifestError(
            f"{name}: the hub has no such dataset for us; if it is private or gated, accept its terms and set HF_TOKEN"
        ) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, HTTPError, OSError, ValueError) as error:
        raise ManifestError(
            f"{name}: the hub does not answer ({one_line(error)}); run the same command again"
        ) from error
    licence = info.card_data.get("license") if info.card_data is not None else None
    if licence is not None:
        licence = str(licence)
    files = [file.rfilename for file in info.siblings or [] if file.rfilename.endswith(".parquet")]
    return str(info.sha), sorted(files), licence


_TIMEOUT_S = 20.0


def _chosen(name: str, paths: Sequence[str], split: str, subset: str | None) -> list[str]:
    """Return the files of a split. Raises ManifestError where there are none, or of several subsets."""
    # As a whole part of the path: of train-00000-of-00002.parquet, and not of constraints.parquet.
    of_split = re.compile(rf"(^|[/_.-]){re.escape(split)}([-_./]|$)")
    chosen = [path for path in paths if of_split.search(path)]
    if not chosen and len(paths) == 1:
        chosen = list(paths)  # a dataset of one file names no split
    subsets = sorted({_subset(path, split) for path in chosen} - {""})
    if subset is not None:
        chosen = [path for path in chosen if _subset(path, split) == subset]
    elif len(subsets) > 1:
        raise ManifestError(f"{name}: has the subsets {', '.join(subsets[:10])}; choose one by --subset")
    if not chosen:
        sought = f"split {split}"
        if subset:
            sought += f" and subset {subset}"
        shown = ", ".join(paths[:3])
        raise ManifestError(f"{name}: no Parquet file is of {sought}; it has {len(paths)} files, such as {shown}")
    return chosen


def _subset(path: str, split: str) -> str:
    """Return the folder of a file that is neither ``data`` nor the split: what the hub calls a configuration."""
    folders = [part for part in path.split("/")[:-1] if part not in ("data", split, f"partial-{split}")]
    return folders[-1] if folders else ""
