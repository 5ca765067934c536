"""docs/formats.md says what the files hold: its tables are those of the records."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

import covray
from covray.io.records import Record, RecordPart

SCRIPT = Path(__file__).parents[1] / "scripts" / "formats.py"


@pytest.fixture(scope="module")
def formats() -> ModuleType:
    spec = importlib.util.spec_from_file_location("formats", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(formats: ModuleType) -> None:
    page = formats.PAGE.read_text(encoding="utf-8")
    assert page == formats.update_page(page), "python scripts/formats.py"


def test_every_record_of_the_package_is_on_the_page(formats: ModuleType) -> None:
    page = formats.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- record {name} -->\n" in page for name in formats.RECORDS)
    found = set()
    for info in pkgutil.walk_packages(covray.__path__, "covray."):
        if info.name.rpartition(".")[2] in ("records", "lock"):
            module = importlib.import_module(info.name)
            found |= {value for value in vars(module).values() if isinstance(value, type) and issubclass(value, Record)}
    assert found - {Record} == set(formats.RECORDS.values())


class Corner(RecordPart):
    """Where two lines meet."""

    x_px: float
    label: Literal["sharp", "round"] | None = None
    """What kind it is, or None."""


class Shape(Record):
    FILE = "shape.json"
    FIX = "draw it again"

    size: tuple[int, int]
    """Width | height."""
    corners: tuple[Corner, ...]
    by_name: dict[str, list[Corner]]
    first: Corner | None
    """``corners[0]``."""
    more: dict[str, object]


def test_a_table_has_the_keys_of_objects_in_lists_and_by_name(formats: ModuleType) -> None:
    assert formats.record_table(Shape).splitlines()[2:] == [
        "| `version` | integer | 1. |",
        "| `size` | list of 2 integers | Width \\| height. |",
        "| `corners` | list of objects | Where two lines meet. |",
        "| `corners[].x_px` | number |  |",
        "| `corners[].label` | `sharp` or `round` or null, may be absent | What kind it is, or null. |",
        "| `by_name` | object of list of objects | Where two lines meet. |",
        "| `by_name.*[].x_px` | number |  |",
        "| `by_name.*[].label` | `sharp` or `round` or null, may be absent | What kind it is, or null. |",
        "| `first` | object or null | `corners[0]`. |",
        "| `first.x_px` | number |  |",
        "| `first.label` | `sharp` or `round` or null, may be absent | What kind it is, or null. |",
        "| `more` | object of objects |  |",
    ]
