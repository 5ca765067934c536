"""``covray fetch`` downloads an artefact by its name, and checks that a folder has all of it as it was recorded.

``covray-fetch.json`` in the folder records the origin, commit, size and SHA-256 of every file. The first download pins
them; from then on the folder is compared with its record, and needs no network while it is complete.
"""

from __future__ import annotations

import contextlib
import fnmatch
import glob
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from covray.config.section import JsonObject
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
from covray.io.model_folders import local_path
from covray.io.records import RecordPart

State = Literal["here", "in part", "absent"]
"""How much of an artefact is in a folder, by the sizes of its files."""


@dataclass(frozen=True)
class ListedArtefact:
    """An artefact, and how much of it is in its default folder."""

    name: str
    artefact: Artefact
    folder: Path
    state: State

    def to_json(self) -> JsonObject:
        """Return the fields of the catalogue with the name, the state, and the whole path of the folder."""
        entry = self.artefact.model_dump(mode="json")
        return {"name": self.name, **entry, "folder": str(self.folder), "state": self.state}


class PriorTest(RecordPart):
    """The golden self-test of a prior that was fetched."""

    fingerprint: str
    difference: float | None
    """From what is recorded for the fingerprint; null where nothing is."""
    seconds: float


class FetchResult(RecordPart):
    """What is in the folder of an artefact, and what was done; the keys of ``covray fetch NAME --json``."""

    name: str
    folder: str
    next: str
    """The command that reads the artefact."""
    origin: tuple[str, ...]
    """Hub id, URLs of archives, or the page that it is downloaded from by hand."""
    revision: str | None
    """Commit of the hub."""
    files: int | None = None
    """Absent, as ``bytes``, for what is downloaded by hand."""
    bytes: int | None = None
    fetched: tuple[str, ...]
    """Files that were fetched now."""
    damaged: tuple[str, ...]
    """Files that were not as recorded before."""
    self_test: PriorTest | None = None
    """Absent for all but a prior of which something was fetched."""


def list_artefacts(catalogue: Path | None = None) -> list[ListedArtefact]:
    """Return every artefact, and how much of it is in its default folder.

    ``catalogue``: a file with further artefacts.
    """
    listed = []
    for name, artefact in read_artefacts(catalogue).items():
        folder = default_folder(name, artefact)
        listed.append(ListedArtefact(name, artefact, folder, _state(name, artefact, folder)))
    return listed


def fetch(
    name: str,
    out: str | None = None,
    revision: str | None = None,
    hub_id: str | None = None,
    catalogue: Path | None = None,
) -> FetchResult:
    """Make the artefact ``name`` complete in the folder ``out`` and compare all of it with its record.

    A folder that is complete needs no network.

    Args:
        name: Of the artefact, or a kind of model such as ``prior``, which stands for the paper's.
        out: Folder; by default ``models/NAME`` or ``data/NAME``.
        revision: Commit, tag or branch of a hub's repository.
        hub_id: Repository of a mirror.
        catalogue: A file with further artefacts.

    Returns:
        What is in the folder now, and what was done.

    Raises:
        ConfigError: The name or an option is not known.
        WeightsError: A prior fails its self-test.
        FetchError: Anything else: no connection, no such repository, unexpected bytes, a hostile archive.
    """
    name, artefact = _find(name, read_artefacts(catalogue))
    if artefact.id is None and (revision is not None or hub_id is not None):
        option = "--id" if revision is None else "--revision"
        raise ConfigError(f"{option}: {name} is not on the hub; leave the option out")
    folder = local_path(out) if out is not None else default_folder(name, artefact)
    following = artefact.next.replace("{folder}", str(folder))  # not format: a user's command may have other braces
    # What asks for a licence to be accepted is downloaded by hand, and only checked here.
    if artefact.page is not None:
        _require_by_hand(artefact, folder)
        return FetchResult(
            name=name,
            folder=str(folder),
            next=following,
            origin=(artefact.page,),
            revision=None,
            fetched=(),
            damaged=(),
        )
    try:
        fetching = _Fetching(name, folder, "dataset" if artefact.kind == "dataset" else "model")
        if artefact.id is not None:
            fetching.repository(artefact, revision, hub_id)
        else:
            for archive in artefact.archives:
                fetching.archive(archive)
    except OSError as error:
        raise FetchError(
            f"{folder}: cannot be read or written ({one_line(error)}); run the same command again to continue"
        ) from error
    result = fetching.result(following)
    # A prior that was just downloaded must compute what it should, or a build would be of noise.
    if artefact.kind == "prior" and fetching.fetched:
        return result.model_copy(update={"self_test": _self_test(folder)})
    return result


def _find(name: str, artefacts: Mapping[str, Artefact]) -> tuple[str, Artefact]:
    """Return the artefact ``name`` with its name; of a kind, the first artefact. Raises ConfigError for none."""
    if name in ("prior", "tokenizer", "backbone"):
        for entry, candidate in artefacts.items():
            if candidate.kind == name:
                return entry, candidate
    if name not in artefacts:
        raise ConfigError(f"{name}: no such artefact; give one of {', '.join(artefacts)}")
    return name, artefacts[name]


class _Fetching:
    """The download of one artefact into its folder."""

    def __init__(self, name: str, folder: Path, repository_kind: str):
        """Read what the folder's record has of the artefact ``name``; its repository is a ``model`` or ``dataset``."""
        self.name = name
        self._repository_kind = repository_kind
        self.folder = folder
        self.sources = {source.origin: source for source in read_record(folder).get(name, ())}
        self.fetched: list[str] = []
        self.damaged: list[str] = []

    def result(self, following: str) -> FetchResult:
        """Return what is in the folder now, and what was done; ``following`` is the command that reads it."""
        files: list[File] = []
        for source in self.sources.values():
            files += source.files.values()
        return FetchResult(
            name=self.name,
            folder=str(self.folder),
            next=following,
            origin=tuple(self.sources),
            revision=next(iter(self.sources.values())).revision,
            files=len(files),
            bytes=sum(file.bytes or 0 for file in files),
            fetched=tuple(self.fetched),
            damaged=tuple(self.damaged),
        )

    def repository(self, artefact: Artefact, revision: str | None, hub_id: str | None) -> None:
        """Fetch the files of a repository of the hub."""
        source = next(iter(self.sources.values()), None)
        if source is None:
            source = self._resolve(artefact, revision or artefact.revision, hub_id or artefact.id or "")
        elif hub_id not in (None, source.origin) or revision not in (None, source.asked, source.revision):
            # What is in the folder is pinned: another repository or commit needs another folder.
            present = source.origin
            if source.revision is not None:
                present += f" at {source.revision}"
            raise ConfigError(f"{self.folder}: holds {present}; give another --out")
        else:
            source = _with_hashes(source, artefact.sha256)
        good, bad = self._compare(source.files)
        # Missing files are no damage: they are what is left to fetch.
        self.damaged = [path for path, why in bad.items() if why != "missing"]
        if bad:
            self._download(source, bad)
            # Compared again: what the hub gave must be what it named.
            fresh, wrong = self._compare({path: source.files[path] for path in bad})
            for path in wrong:
                (self.folder / path).unlink(missing_ok=True)  # so that nothing uses it
            for path, why in wrong.items():
                raise FetchError(f"{self.folder / path}: what {source.origin} gave {why}; it was deleted, try again")
            good |= fresh
            self.fetched += bad
        # Recorded with measured sizes and hashes, so that the next call compares all of it.
        self._record(source.model_copy(update={"files": {path: good[path] for path in source.files}}))

    def archive(self, archive: Archive) -> None:
        """Fetch the members of an archive, which is deleted when they are in place."""
        known = self.sources.get(archive.url)
        if known is not None:
            _, bad = self._compare(known.files)
            self.damaged += [path for path, why in bad.items() if why != "missing"]
            if not bad:
                return
        file = self.folder / archive.name
        expected = archive.sha256
        # Of an archive that is not in the catalogue with a hash, the first download decides.
        if not expected and known is not None:
            expected = known.sha256
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            download(archive.url, file)
        size, sha256 = file.stat().st_size, _sha256(file)
        if (archive.bytes not in (None, size)) or expected not in (None, sha256):
            file.unlink()
            recorded = f"{archive.bytes} bytes"
            if expected:
                recorded = f"SHA-256 {expected}"
            raise FetchError(
                f"{archive.url}: has {size} bytes and SHA-256 {sha256}, not {recorded}; it was deleted, try again"
            )
        # An archive may not unpack to many times its size.
        files = Unpacking(self.folder, archive, max(UNPACKED_LEAST, UNPACKED_RATIO * size)).unpack(file)
        self._record(Source(origin=archive.url, sha256=sha256, files=files))
        file.unlink()
        self.fetched += files

    def _resolve(self, artefact: Artefact, revision: str | None, hub_id: str) -> Source:
        """Return the files of the repository, pinned to its commit.

        They are recorded at once, so that a resumed download gets the same. Without a network, files that were put in
        the folder by hand are used, if they are complete.
        """
        from huggingface_hub import HfApi

        try:
            with hub_errors(hub_id, revision):
                about: Any = HfApi().repo_info(
                    hub_id,
                    revision=revision,
                    repo_type=self._repository_kind,
                    files_metadata=True,
                    timeout=TIMEOUT_S,
                )
        # Without the hub, files that were put there by hand are taken as they are.
        except Unreachable as error:
            return self._adopt(artefact, hub_id, error)
        siblings = {file.rfilename: file for file in about.siblings or ()}
        chosen, missing = _choose(artefact.files, siblings)
        if missing:
            raise FetchError(f"{hub_id}: has no {missing[0]}; give --id of a repository that has all of {self.name}")
        files = {}
        for path in chosen:
            # The hub knows the SHA-256 of large files only.
            lfs = siblings[path].lfs
            files[path] = File(bytes=siblings[path].size, sha256=lfs.sha256 if lfs else None)
        try:
            source = Source(origin=hub_id, asked=revision, revision=about.sha, files=files)
        except ValidationError as error:
            raise FetchError(f"{hub_id}: {one_line(error)}; give another --id") from error
        source = _with_hashes(source, artefact.sha256)
        # Before the download: a call that is killed goes on with the same commit.
        self._record(source)
        return source

    def _adopt(self, artefact: Artefact, hub_id: str, error: Unreachable) -> Source:
        """Return the files that were put in the folder by hand. Raises FetchError where any is missing."""
        present = [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]
        chosen, missing = _choose(artefact.files, present)
        if missing:
            raise self._missing(missing, hub_id, error) from error
        source = Source(origin=hub_id, files={path: File(bytes=None, sha256=None) for path in chosen})
        return _with_hashes(source, artefact.sha256)

    def _download(self, source: Source, bad: Mapping[str, str]) -> None:
        """Download the files ``bad``, by path with what is wrong with each."""
        from huggingface_hub import snapshot_download

        try:
            with hub_errors(source.origin, source.revision):
                if is_offline():
                    raise Unreachable("HF_HUB_OFFLINE is set")
                for path in bad:
                    (self.folder / path).unlink(missing_ok=True)  # the hub's client would keep an existing file
                snapshot_download(
                    source.origin,
                    repo_type=self._repository_kind,
                    revision=source.revision,
                    local_dir=self.folder,
                    allow_patterns=[glob.escape(path) for path in bad],
                )
        except Unreachable as error:
            missing = []
            for path, why in bad.items():
                missing.append(path if why == "missing" else f"{path} ({why})")
            raise self._missing(missing, source.origin, error) from error

    def _missing(self, missing: Iterable[str], hub_id: str, error: Unreachable) -> FetchError:
        paths = ", ".join(f"{self.folder}/{path}" for path in missing)
        return FetchError(
            f"missing: {paths}; {error}: put these of {hub_id} there, or run the same command again where there is a "
            "network"
        )

    def _compare(self, files: Mapping[str, File]) -> tuple[dict[str, File], dict[str, str]]:
        """Return the ``files`` that are in the folder as recorded, measured, and what is wrong with each other one."""
        good, bad = {}, {}
        for path, recorded in files.items():
            # Compared from cheap to dear: presence, size, then the hash of all bytes.
            file = self.folder / path
            if not file.is_file():
                bad[path] = "missing"
                continue
            size = file.stat().st_size
            if recorded.bytes not in (None, size):
                bad[path] = f"has {size} bytes, not {recorded.bytes}"
                continue
            sha256 = _sha256(file)
            if recorded.sha256 not in (None, sha256):
                bad[path] = f"has SHA-256 {sha256}, not {recorded.sha256}"
            else:
                good[path] = File(bytes=size, sha256=sha256)
        return good, bad

    def _record(self, source: Source) -> None:
        if self.sources.get(source.origin) == source:
            return  # a complete folder may be read-only
        self.sources[source.origin] = source
        record = read_record(self.folder) | {self.name: tuple(self.sources.values())}
        write_record(self.folder, record)


def _choose(patterns: Iterable[str | tuple[str, ...]], paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the ``paths`` that the patterns match (see ``Artefact.files``), and the patterns that match none."""
    names = sorted(paths)
    chosen: dict[str, None] = {}
    missing = []
    for pattern in patterns:
        choices = (pattern,) if isinstance(pattern, str) else pattern
        for choice in choices:
            # Of several choices the first that matches anything is taken.
            matches = fnmatch.filter(names, choice)
            if matches:
                chosen |= dict.fromkeys(matches)
                break
        else:
            missing.append(" or ".join(choices))
    return list(chosen), missing


def _with_hashes(source: Source, known: Mapping[str, str]) -> Source:
    """Return ``source`` with the ``known`` hashes of the manifest. Raises FetchError where it has others."""
    files = dict(source.files)
    for path in files.keys() & known.keys():
        if files[path].sha256 not in (None, known[path]):
            raise FetchError(
                f"{source.origin}: {path} has SHA-256 {files[path].sha256}, not {known[path]}: it is not that "
                "artefact; give another --id or --revision"
            )
        files[path] = files[path].model_copy(update={"sha256": known[path]})
    return source.model_copy(update={"files": files})


def _require_by_hand(artefact: Artefact, folder: Path) -> None:
    """Check that an artefact that people download by hand is in ``folder``. Raises FetchError for a missing file."""
    for pattern in artefact.files:
        choices = (pattern,) if isinstance(pattern, str) else pattern
        if not any(next(folder.glob(choice), None) for choice in choices):
            raise FetchError(
                f"{folder}/{' or '.join(choices)} is missing; get it by hand from {artefact.page} and unpack it there"
            )


def _state(name: str, artefact: Artefact, folder: Path) -> State:
    if artefact.page is not None:
        with contextlib.suppress(FetchError):
            _require_by_hand(artefact, folder)
            return "here"
        return "absent"
    sources = read_record(folder).get(name, ())
    if not sources:
        return "absent"
    complete = len(sources) == max(1, len(artefact.archives))
    for source in sources:
        for path, recorded in source.files.items():
            file = folder / path
            complete = complete and file.is_file() and file.stat().st_size == recorded.bytes
    return "here" if complete else "in part"


def _self_test(folder: Path) -> PriorTest:
    """Run the golden self-test of a prior.

    Raises WeightsError for a prior that cannot be loaded or that differs too much from what is recorded.
    """
    # Imported here: it loads torch, and other artefacts need none.
    from covray.models.diffusion.selftest import TOLERANCE, compare, golden, self_test

    tested = self_test(str(folder))
    recorded, difference = golden(tested.fingerprint), None
    if recorded is not None:
        difference = compare(tested.digest, recorded.digest)
        if difference > TOLERANCE:
            raise WeightsError(
                f"{folder}: holds the recorded files, but its self-test differs by {difference:.2g} from what is "
                f"recorded, more than {TOLERANCE:g}: this machine or its libraries compute something else; see covray "
                "doctor"
            )
    return PriorTest(fingerprint=tested.fingerprint, difference=difference, seconds=tested.seconds)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
