"""Records: one typed, checked class for each JSON file that covray writes and reads again."""

from __future__ import annotations

import json
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from covray.errors import CovrayError, DatasetError, one_line
from covray.io.storage import Folder


class RecordPart(BaseModel):
    """An object inside a record.

    Keys that the class does not know are kept and written back, so that files of a newer covray lose nothing. A field
    with a default may be absent in the file, and stays absent when the record is written again.
    """

    model_config = ConfigDict(
        extra="allow", frozen=True, use_attribute_docstrings=True, ser_json_inf_nan="constants", protected_namespaces=()
    )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON values, in the order of the fields, without the fields that were never set."""
        return self.model_dump(mode="json", exclude_unset=True)


class Record(RecordPart):
    """A JSON file with fixed keys.

    A subclass declares the keys as fields, in the order in which they are written, and names its file::

        class Audit(Record):
            FILE = "_audit.json"
            FIX = "build the dataset again"

            asked: int
            '''Pairs of the manifest.'''
    """

    FILE: ClassVar[str]
    """The name of the file in its folder."""
    FIX: ClassVar[str]
    """What the user can do about a file that cannot be used; the end of every error message."""
    VERSION: ClassVar[int | None] = 1
    """The value of the file's first key, ``version``. None for a format without that key."""
    ERROR: ClassVar[type[CovrayError]] = DatasetError
    """What ``read`` raises."""

    @classmethod
    def read(cls, folder: Folder | str, name: str | None = None) -> Self:
        """Read and check the file.

        Args:
            folder: The folder of the file, local or on any filesystem pyarrow knows.
            name: The name of the file in the folder; by default ``FILE``.

        Raises:
            CovrayError: Of the class ``ERROR``, in one line: the file is absent, cannot be read, is of another version,
                lacks a key, or has a value of the wrong type.
        """
        record = cls.read_if_present(folder, name)
        if record is None:
            raise cls.ERROR(f"{_folder(folder).join(name or cls.FILE)}: is not there; {cls.FIX}")
        return record

    @classmethod
    def read_if_present(cls, folder: Folder | str, name: str | None = None) -> Self | None:
        """Read and check the file as ``read`` does; return None when there is no such file."""
        folder, name = _folder(folder), name or cls.FILE
        path = folder.join(name)
        try:
            values = folder.read_json(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:  # the last: JSON that is nested without end
            raise cls.ERROR(f"{path}: cannot be read ({one_line(error)}); {cls.FIX}") from error
        if not isinstance(values, dict):
            raise cls.ERROR(f"{path}: is not a JSON object; {cls.FIX}")
        # Before the fields, any of which another version may lack.
        version = values.pop("version", None)
        if version != cls.VERSION:
            raise cls.ERROR(f"{path}: is of version {version}, not {cls.VERSION}; use the covray that wrote it")
        try:
            # As JSON, not as values: only then may a list become a tuple, while a text may not become a number.
            return cls.model_validate_json(json.dumps(values), strict=True)
        except ValidationError as error:
            raise cls.ERROR(f"{path}: {_first_problem(error)}; {cls.FIX}") from error

    def write(self, folder: Folder | str, name: str | None = None) -> None:
        """Write the file to ``folder``, whole or not at all, under ``name`` or ``FILE``. Raises OSError."""
        _folder(folder).write_json(name or self.FILE, self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Return what the file holds: the version first, then the fields in their order."""
        values = super().to_json()
        if self.VERSION is None:
            return values
        return {"version": self.VERSION, **values}


def _folder(folder: Folder | str) -> Folder:
    return folder if isinstance(folder, Folder) else Folder(folder)


def _first_problem(error: ValidationError) -> str:
    """Return the first problem of ``error`` in a few words, with the path of its key."""
    problem = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"lacks {key}"
    if problem["type"] == "value_error":  # raised by a validator of the record, with a text of its own
        return f"{key} {problem['ctx']['error']}"
    return f"{key}: {problem['msg'][:1].lower()}{problem['msg'][1:]}"
