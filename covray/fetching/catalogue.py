"""The manifest of artefacts, and the record of what was fetched into a folder.

Both are treated as untrusted: unknown keys, and paths that lead out of their folder, are refused.
"""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, model_validator

from covray.config import Section
from covray.config.section import read_yaml
from covray.errors import ConfigError, CovrayError, one_line
from covray.io.storage import Folder

ARTEFACTS_FILE = Path(__file__).with_name("artefacts.yaml")
RECORD_FILE = "covray-fetch.json"


class FetchError(CovrayError):
    """An artefact that cannot be downloaded, or is not what it should be."""


def inner_path(path: str) -> str:
    """Return ``path`` if it lies below the folder it is relative to, on any system; raise ValueError if not."""
    parts = PureWindowsPath(path)  # understands both separators, and drives
    if parts.anchor or ".." in parts.parts or not path.isprintable():
        raise ValueError(f"{path!r} leads out of its folder")
    return path


InnerPath = Annotated[str, AfterValidator(inner_path)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Archive(Section):
    """A zip or tar at an address."""

    url: str = Field(pattern="^https?://[^/]+/.+")
    bytes: int | None = Field(default=None, ge=1)
    sha256: Sha256 | None = None
    into: InnerPath | None = None
    """Folder below the artefact's that the archive is unpacked to."""
    members: tuple[str, ...]
    """Patterns of the files that covray reads, by path below the artefact's folder; nothing else is unpacked."""
    inner: tuple[InnerPath, ...] = ()
    """Archives inside the archive, unpacked in their own folder."""

    @property
    def name(self) -> str:
        """Name of the file that is downloaded."""
        return self.url.rpartition("/")[2]


class Artefact(Section):
    """An entry of ``artefacts.yaml``. It comes from the hub (``id``), from ``archives``, or by hand from ``page``."""

    kind: Literal["prior", "tokenizer", "backbone", "dataset"]
    id: str | None = None
    revision: str | None = None
    """Commit or tag of ``id``; null is the main branch at the time of the first download."""
    files: tuple[InnerPath | tuple[InnerPath, ...], ...] = ()
    """Patterns of the files that covray reads; of a list of patterns, the first that any file matches."""
    sha256: dict[str, Sha256] = Field(default_factory=dict)
    """SHA-256 of files, where it is known; it is the same on any mirror."""
    archives: tuple[Archive, ...] = ()
    page: str | None = None
    """Page where a person downloads it, because there is no address for programs."""
    folder: str | None = None
    """Folder below ``data`` or ``models``, if it is not the name: several datasets share one folder."""
    licence: str
    size: str
    """Text for people: parameters of a model, bytes or pairs of a dataset."""
    next: str
    """The command that reads the artefact; ``{folder}`` stands for its folder."""
    note: str | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Artefact:
        if [self.id is None, not self.archives, self.page is None].count(False) != 1:
            raise ValueError("give one of id, archives and page")
        if bool(self.files) == bool(self.archives):
            raise ValueError("files are those of id or page; those of an archive are its members")
        return self


class File(Section):
    """Size and hash of a file, as far as they are known."""

    bytes: int | None = Field(ge=0)
    sha256: Sha256 | None


class Source(Section):
    """Files of one origin, as they were fetched."""

    origin: str
    """Hub id, or URL of an archive."""
    asked: str | None = None
    """Revision that the user asked for; null is the main branch."""
    revision: str | None = None
    """Commit of the hub that ``asked`` was at the first download."""
    sha256: Sha256 | None = None
    """SHA-256 of the archive."""
    files: dict[InnerPath, File]


_Artefacts = TypeAdapter(dict[str, Artefact])
_Record = TypeAdapter(dict[str, tuple[Source, ...]])


def read_artefacts(catalogue: Path | None = None) -> dict[str, Artefact]:
    """Return the artefacts by name: those that covray ships, and those of a user's catalogue, which win.

    Args:
        catalogue: A YAML file with the fields of ``Artefact`` by name; None: there is none.

    Raises:
        ConfigError: A file cannot be read or is not valid.
    """
    try:
        artefacts = _Artefacts.validate_python(yaml.safe_load(ARTEFACTS_FILE.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise ConfigError(f"{ARTEFACTS_FILE}: {one_line(error)}; reinstall covray") from error
    if catalogue is None:
        return artefacts
    try:
        return artefacts | _Artefacts.validate_python(read_yaml(catalogue.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:  # ValidationError is a ValueError
        raise ConfigError(f"--catalogue {catalogue}: {one_line(error)}; see docs/weights.md for its keys") from error


def default_folder(name: str, artefact: Artefact) -> Path:
    """Return ``models/NAME`` or ``data/NAME`` below the working folder."""
    return Path("data" if artefact.kind == "dataset" else "models", artefact.folder or name)


def read_record(folder: Path) -> dict[str, tuple[Source, ...]]:
    """Return what was fetched into ``folder``, by artefact. Raises FetchError for a record that cannot be read."""
    file = folder / RECORD_FILE
    try:
        return _Record.validate_json(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        raise FetchError(
            f"{file}: is not a record of covray fetch ({one_line(error)}); delete it, and fetch again"
        ) from error


def write_record(folder: Path, record: dict[str, tuple[Source, ...]]) -> None:
    """Write the file that ``read_record`` reads."""
    Folder(str(folder)).write_json(RECORD_FILE, _Record.dump_python(record, mode="json"))
