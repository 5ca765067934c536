"""``covray fetch``: an artefact by its name, whole and as it was recorded, in a folder.

A folder holds beside its files ``covray-fetch.json``: from where each came, the commit, its size and SHA-256. The first
download pins them; after that a folder is compared with its record, and needs no network while it is whole.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from covray.errors import ConfigError, WeightsError, one_line
from covray.fetching.archives import UNPACKED_LEAST, UNPACKED_RATIO, Unpacking
from covray.fetching.catalogue import (
    Archive,
    Artefact,
    FetchError,
    File,
    Source,
    default_folder,
    read_artefacts,
    read_record,
    write_record,
)
from covray.fetching.downloads import TIMEOUT_S, Unreachable, download, hub_errors, is_offline


def list_artefacts() -> list[dict[str, Any]]:
    """Every artefact with its ``state`` in its default folder: ``here``, ``in part`` or ``absent``, by sizes."""
    listed = []
    for name, artefact in read_artefacts().items():
        folder = default_folder(name, artefact)
        listed.append({"name": name, **artefact.model_dump(mode="json"), "folder": str(folder)})
        listed[-1]["state"] = _state(name, artefact, folder)
    return listed


def fetch(name: str, out: str | None = None, revision: str | None = None, hub_id: str | None = None) -> dict[str, Any]:
    """Make the artefact ``name`` complete in the folder ``out`` and compare all of it with its record.

    ``name`` may be a kind of model, such as ``prior``: its first entry in the manifest is the paper's. A folder that is
    whole needs no network. ``revision``: commit, tag or branch of a hub's repository; ``hub_id``: a
    mirror. Gives ``folder``, ``origin``, ``revision``, numbers of ``files`` and ``bytes``, what was ``fetched``, what
    was ``damaged`` before, ``next`` and, for a prior of which something was fetched, its ``self_test``.

    Raises ConfigError for a name or option that is not, WeightsError for a prior that fails its self-test, FetchError
    for all else: no connection, no such repository, other bytes than those expected, a hostile archive.
    """
    artefacts = read_artefacts()
    if name in ("prior", "tokenizer", "backbone"):
        name = next((entry for entry, artefact in artefacts.items() if artefact.kind == name), name)
    artefact = artefacts.get(name)
    if artefact is None:
        raise ConfigError(f"{name}: no such artefact; give one of {', '.join(artefacts)}")
    if artefact.id is None and (revision is not None or hub_id is not None):
        option = "--id" if revision is None else "--revision"
        raise ConfigError(f"{option}: {name} is not on the hub; give none")
    folder = Path(out).expanduser() if out is not None else default_folder(name, artefact)
    result: dict[str, Any] = {"name": name, "folder": str(folder), "next": artefact.next.format(folder=folder)}
    if artefact.page is not None:
        return result | _by_hand(artefact, folder)
    try:
        fetching = _Fetching(name, folder)
        if artefact.id is not None:
            fetching.repository(artefact, revision, hub_id)
        else:
            for archive in artefact.archives:
                fetching.archive(archive)
    except OSError as error:
        raise FetchError(
            f"{folder}: cannot be read or written ({one_line(error)}); the same command continues"
        ) from error
    result |= fetching.summary()
    if artefact.kind == "prior" and fetching.fetched:
        result["self_test"] = _self_test(folder)
    return result


class _Fetching:
    """One artefact on its way into its folder."""

    def __init__(self, name: str, folder: Path):
        self.name = name
        self.folder = folder
        self.sources = {source.origin: source for source in read_record(folder).get(name, ())}
        self.fetched: list[str] = []
        self.damaged: list[str] = []

    def summary(self) -> dict[str, Any]:
        """What is in the folder now, and what was done."""
        sources = list(self.sources.values())
        return {
            "origin": [source.origin for source in sources],
            "revision": sources[0].revision,
            "files": sum(len(source.files) for source in sources),
            "bytes": sum(file.bytes or 0 for source in sources for file in source.files.values()),
            "fetched": self.fetched,
            "damaged": self.damaged,
        }

    def repository(self, artefact: Artefact, revision: str | None, hub_id: str | None) -> None:
        """The files of a repository of the hub."""
        source = next(iter(self.sources.values()), None)
        if source is None:
            source = self._resolve(artefact, revision or artefact.revision, hub_id or artefact.id or "")
        elif hub_id not in (None, source.origin) or revision not in (None, source.asked, source.revision):
            there = source.origin if source.revision is None else f"{source.origin} at {source.revision}"
            raise ConfigError(f"{self.folder}: holds {there}; give another --out")
        else:
            source = _with_hashes(source, artefact.sha256)
        good, bad = self._compare(source.files)
        self.damaged = [path for path, why in bad.items() if why != "missing"]
        if bad:
            self._download(source, bad)
            fresh, wrong = self._compare({path: source.files[path] for path in bad})
            for path in wrong:
                (self.folder / path).unlink(missing_ok=True)  # so that nothing uses it
            for path, why in wrong.items():
                raise FetchError(f"{self.folder / path}: what {source.origin} gave {why}; it was removed, try again")
            good |= fresh
            self.fetched += bad
        self._record(source.model_copy(update={"files": {path: good[path] for path in source.files}}))

    def archive(self, archive: Archive) -> None:
        """The members of an archive. It is removed when they are in place."""
        known = self.sources.get(archive.url)
        if known is not None:
            _, bad = self._compare(known.files)
            self.damaged += [path for path, why in bad.items() if why != "missing"]
            if not bad:
                return
        file = self.folder / archive.name
        expected = archive.sha256 or (known.sha256 if known else None)
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            download(archive.url, file)
        found, sha256 = file.stat().st_size, _sha256(file)
        if (archive.bytes not in (None, found)) or expected not in (None, sha256):
            file.unlink()
            due = f"SHA-256 {expected}" if expected else f"{archive.bytes} bytes"
            raise FetchError(
                f"{archive.url}: has {found} bytes and SHA-256 {sha256}, not {due}; it was removed, try again"
            )
        files = Unpacking(self.folder, archive, max(UNPACKED_LEAST, UNPACKED_RATIO * found)).unpack(file)
        self._record(Source(origin=archive.url, sha256=sha256, files=files))
        file.unlink()
        self.fetched += files

    def _resolve(self, artefact: Artefact, revision: str | None, hub_id: str) -> Source:
        """The files of the repository, pinned to its commit; recorded at once, so that a continued download has the
        same. Without a network what was put in the folder by hand is taken, if it is complete."""
        from huggingface_hub import HfApi

        try:
            with hub_errors(hub_id, revision):
                about = HfApi().model_info(hub_id, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
        except Unreachable as error:
            return self._adopt(artefact, hub_id, error)
        there = {file.rfilename: file for file in about.siblings or ()}
        chosen, missing = _choose(artefact.files, there)
        if missing:
            raise FetchError(f"{hub_id}: has no {missing[0]}; give --id of a repository that has all of {self.name}")
        files = {}
        for path in chosen:
            lfs = there[path].lfs
            files[path] = File(bytes=there[path].size, sha256=lfs.sha256 if lfs else None)
        try:
            source = Source(origin=hub_id, asked=revision, revision=about.sha, files=files)
        except ValidationError as error:
            raise FetchError(f"{hub_id}: {one_line(error)}; give another --id") from error
        source = _with_hashes(source, artefact.sha256)
        self._record(source)
        return source

    def _adopt(self, artefact: Artefact, hub_id: str, error: Unreachable) -> Source:
        there = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        chosen, missing = _choose(artefact.files, there)
        if missing:
            raise self._lost(missing, hub_id, error) from error
        source = Source(origin=hub_id, files={path: File(bytes=None, sha256=None) for path in chosen})
        return _with_hashes(source, artefact.sha256)

    def _download(self, source: Source, bad: Mapping[str, str]) -> None:
        from huggingface_hub import snapshot_download

        try:
            with hub_errors(source.origin, source.revision):
                if is_offline():
                    raise Unreachable("HF_HUB_OFFLINE is set")
                for path in bad:
                    (self.folder / path).unlink(missing_ok=True)  # the hub's client believes what is there
                snapshot_download(
                    source.origin,
                    revision=source.revision,
                    local_dir=self.folder,
                    allow_patterns=[glob.escape(path) for path in bad],
                )
        except Unreachable as error:
            missing = [path if why == "missing" else f"{path} ({why})" for path, why in bad.items()]
            raise self._lost(missing, source.origin, error) from error

    def _lost(self, missing: Iterable[str], hub_id: str, error: Unreachable) -> FetchError:
        paths = ", ".join(f"{self.folder}/{path}" for path in missing)
        return FetchError(f"missing: {paths}; {error}: put these of {hub_id} there, or go where there is a network")

    def _compare(self, files: Mapping[str, File]) -> tuple[dict[str, File], dict[str, str]]:
        """Of ``files`` those that are in the folder as they should be, measured, and what is wrong with the others."""
        good, bad = {}, {}
        for path, due in files.items():
            file = self.folder / path
            if not file.is_file():
                bad[path] = "missing"
                continue
            found = file.stat().st_size
            if due.bytes not in (None, found):
                bad[path] = f"has {found} bytes, not {due.bytes}"
                continue
            sha256 = _sha256(file)
            if due.sha256 not in (None, sha256):
                bad[path] = f"has SHA-256 {sha256}, not {due.sha256}"
            else:
                good[path] = File(bytes=found, sha256=sha256)
        return good, bad

    def _record(self, source: Source) -> None:
        if self.sources.get(source.origin) == source:
            return  # a whole folder may be read-only
        self.sources[source.origin] = source
        record = read_record(self.folder) | {self.name: tuple(self.sources.values())}
        write_record(self.folder, record)


def _choose(patterns: Iterable[str | tuple[str, ...]], there: Iterable[str]) -> tuple[list[str], list[str]]:
    """Of the paths ``there`` those that are wanted, and the patterns that none of them matches."""
    names = sorted(there)
    chosen: dict[str, None] = {}
    missing = []
    for pattern in patterns:
        choices = (pattern,) if isinstance(pattern, str) else pattern
        found = next((hits for choice in choices if (hits := fnmatch.filter(names, choice))), [])
        chosen |= dict.fromkeys(found)
        if not found:
            missing.append(" or ".join(choices))
    return list(chosen), missing


def _with_hashes(source: Source, known: Mapping[str, str]) -> Source:
    """``source`` with the hashes of the manifest. Raises FetchError where it has others."""
    files = dict(source.files)
    for path in files.keys() & known.keys():
        if files[path].sha256 not in (None, known[path]):
            raise FetchError(
                f"{source.origin}: {path} has SHA-256 {files[path].sha256}, not {known[path]}: it is not that "
                "artefact; give another --id or --revision"
            )
        files[path] = files[path].model_copy(update={"sha256": known[path]})
    return source.model_copy(update={"files": files})


def _by_hand(artefact: Artefact, folder: Path) -> dict[str, Any]:
    for pattern in artefact.files:
        choices = (pattern,) if isinstance(pattern, str) else pattern
        if not any(next(folder.glob(choice), None) for choice in choices):
            raise FetchError(
                f"{folder}/{' or '.join(choices)} is missing; get it by hand from {artefact.page} and unpack it there"
            )
    return {"origin": [artefact.page], "revision": None, "fetched": [], "damaged": []}


def _state(name: str, artefact: Artefact, folder: Path) -> str:
    if artefact.page is not None:
        with contextlib.suppress(FetchError):
            _by_hand(artefact, folder)
            return "here"
        return "absent"
    sources = read_record(folder).get(name, ())
    if not sources:
        return "absent"
    whole = len(sources) == max(1, len(artefact.archives)) and all(
        (folder / path).is_file() and (folder / path).stat().st_size == file.bytes
        for source in sources
        for path, file in source.files.items()
    )
    return "here" if whole else "in part"


def _self_test(folder: Path) -> dict[str, Any]:
    """The golden self-test of a prior: its fingerprint, and by how much it differs from what is recorded for it (null:
    nothing is). Raises WeightsError for a prior that cannot be loaded or computes something else."""
    # Imported here: it loads torch, and other artefacts need none.
    from covray.models.diffusion.selftest import TOLERANCE, compare, golden, self_test

    tested = self_test(str(folder))
    recorded = golden(tested["fingerprint"])
    difference = None if recorded is None else compare(tested["digest"], recorded["digest"])
    if difference is not None and difference > TOLERANCE:
        raise WeightsError(
            f"{folder}: holds the recorded files, but its self-test differs by {difference:.2g} from what is recorded, "
            f"more than {TOLERANCE:g}: this machine or its libraries compute otherwise; see covray doctor"
        )
    return {"fingerprint": tested["fingerprint"], "difference": difference, "seconds": tested["seconds"]}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
