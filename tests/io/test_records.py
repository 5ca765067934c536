"""Records: a file is read as it was written, or refused in one line that names it and says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import field_validator

from covray.errors import ConfigError, DatasetError
from covray.io.records import Record, RecordPart


class Size(RecordPart):
    width_px: int


class Album(Record):
    FILE = "_album.json"
    FIX = "make the album again"

    name: str
    sizes: tuple[Size, ...]
    score: float | None
    note: str | None = None

    @field_validator("name")
    @classmethod
    def _named(cls, name: str) -> str:
        if not name:
            raise ValueError("is empty")
        return name


class Unversioned(Record):
    FILE = "plain.json"
    FIX = "start again"
    VERSION = None
    ERROR = ConfigError

    steps: int


WHOLE: dict[str, Any] = {"version": 1, "name": "ü", "sizes": [{"width_px": 8}], "score": None}


def put(folder: Path, values: Any, name: str = "_album.json") -> Path:
    (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder / name


def test_a_record_writes_the_bytes_of_its_values(tmp_path: Path) -> None:
    Album(name="ü", sizes=(Size(width_px=8),), score=None).write(str(tmp_path))
    assert (tmp_path / "_album.json").read_bytes() == (json.dumps(WHOLE, indent=2) + "\n").encode()


@pytest.mark.parametrize(
    "values",
    [
        WHOLE,
        WHOLE | {"note": None},
        WHOLE | {"note": "read", "unknown": {"a": [1]}},
        WHOLE | {"sizes": [{"width_px": 8, "unknown": 1.5}]},
        WHOLE | {"score": 0.1},
        WHOLE | {"score": float("nan")},
    ],
    ids=["whole", "null", "unknown key", "unknown key below", "number", "not a number"],
)
def test_what_is_read_is_written_again_byte_for_byte(tmp_path: Path, values: dict[str, Any]) -> None:
    path = put(tmp_path, values)
    Album.read(str(tmp_path)).write(str(tmp_path), "again.json")
    assert (tmp_path / "again.json").read_text() == json.dumps(json.loads(path.read_text()), indent=2) + "\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{", "cannot be read (Expecting property name enclosed in double quotes"),
        ([], "is not a JSON object; make the album again"),
        (WHOLE | {"version": 2}, "is of version 2, not 1; use the covray that wrote it"),
        ({"name": "a"}, "is of version None, not 1; use the covray that wrote it"),
        ({"version": 1, "name": "a", "score": 1.0}, "lacks sizes; make the album again"),
        (WHOLE | {"sizes": [{}]}, "lacks sizes.0.width_px; make the album again"),
        (WHOLE | {"sizes": [{"width_px": "8"}]}, "sizes.0.width_px: input should be a valid integer"),
        (WHOLE | {"name": ""}, "name is empty; make the album again"),
        (WHOLE | {"name": 3}, "name: input should be a valid string; make the album again"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(tmp_path: Path, values: Any, message: str) -> None:
    path = put(tmp_path, values)
    with pytest.raises(DatasetError) as caught:
        Album.read(str(tmp_path))
    assert str(caught.value).startswith(f"{path}: {message}")
    assert str(caught.value).endswith(("make the album again", "use the covray that wrote it"))
    assert "\n" not in str(caught.value)


def test_an_absent_file_is_none_or_an_error(tmp_path: Path) -> None:
    assert Album.read_if_present(str(tmp_path / "nowhere")) is None
    with pytest.raises(DatasetError, match=r"_album\.json: is not there; make the album again"):
        Album.read(str(tmp_path))


def test_a_format_may_have_no_version_another_name_and_its_own_error(tmp_path: Path) -> None:
    put(tmp_path, {"steps": 3}, "7.json")
    record = Unversioned.read(str(tmp_path), "7.json")
    assert record.to_json() == {"steps": 3}
    with pytest.raises(ConfigError, match="start again"):
        Unversioned.read(str(tmp_path))


def test_json_that_is_nested_without_end_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "_album.json").write_text("[" * 100_000)
    with pytest.raises(DatasetError, match=r"_album.json: cannot be read \(maximum recursion depth") as refused:
        Album.read(tmp_path.as_posix())
    assert "\n" not in str(refused.value)
