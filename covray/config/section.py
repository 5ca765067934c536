"""What every configuration is: strict sections, loaded from YAML and options, and compared on a resume."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, JsonValue, SerializerFunctionWrapHandler, ValidationError, model_serializer

from covray.config.shipped import find_config
from covray.errors import ConfigError, one_line

_DEEPEST = 20
"""Sections within sections that are read; the deepest of covray stand two deep."""


class Section(BaseModel):
    """A part of a configuration: immutable, and strict about what it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class GrownSection(Section):
    """A section that has got fields since it was first written, which files leave out where they ask for nothing.

    Identities made before these fields existed so stay the same.
    """

    def unused_fields(self) -> Iterable[str]:
        """Return the younger fields that ask for nothing."""
        raise NotImplementedError

    @model_serializer(mode="wrap")
    def _leave_out_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = handler(self)
        for name in self.unused_fields():
            values.pop(name, None)
        return values


C = TypeVar("C", bound=Section)
JsonObject = dict[str, JsonValue]
"""A configuration, or what decides the results of one, as a file holds it; compared as a whole, not looked into."""
LeftOut = dict[str, bool | set[str]]
"""Which keys of a configuration decide nothing: the whole key, or some keys of that section."""


def load_config(
    model: type[C], file: str | Path | None, options: dict[str, Any] | None = None, sets: Iterable[str] = ()
) -> C:
    """Resolve a configuration: defaults, then ``file`` (YAML), then ``options``, then ``sets`` (``a.b=value``).

    ``file`` may be the name of a file that covray ships, such as ``paper/train-7b``.

    ``options`` has dotted keys. None is a value like others below a section (``a.b``); in place of a section it leaves
    the defaults, as YAML reads a section whose keys are all commented out. Raises ConfigError with the full key path.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            loaded = read_yaml(find_config(file).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(
                f"--config {file}: {one_line(error)}; give a YAML file, or a name that covray config lists"
            ) from error
        except ValueError as error:  # also bytes that are no text
            raise ConfigError(f"--config {file}: not valid YAML: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"--config {file}: holds {type(loaded).__name__}, not keys and values")
        values = _without_empty_sections(model, _without_null(loaded or {}))
    for key, value in _without_null(copy.deepcopy(options or {})).items():  # sets change what is below a section
        _set(values, str(key), value)  # YAML has keys that are numbers; the model refuses them by name
    for assignment in sets:
        key, separator, text = assignment.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {assignment}: write key=value, for example --set engine.batch=32")
        try:
            _set(values, key, read_yaml(text))
        except ValueError as error:
            raise ConfigError(f"--set {assignment}: the value is not valid YAML") from error
    for _ in leaves(values):  # refuses a section that stands in itself
        pass
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_describe(model, entry) for entry in error.errors())) from error


def recorded_section(config: JsonObject, name: str) -> dict[str, Any]:
    """Return the section ``name`` of a configuration that a file holds; empty where it has none."""
    section = config.get(name, {})
    assert isinstance(section, dict), name
    return section


def read_yaml(text: str) -> Any:
    """The value that ``text`` is in YAML. Raises ValueError, in one line: no YAML, or nested too deeply."""
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: dates of a 13th month
        raise ValueError(one_line(error)) from error
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def differences(theirs: JsonObject, ours: JsonObject, *, open_matches: bool = False) -> list[str]:
    """Keys in which two identities differ, each as ``key was X, is Y``.

    ``open_matches``: what ours leaves open (null or ``auto``) agrees with anything.
    """
    first, second = dict(leaves(theirs)), dict(leaves(ours))
    differing = []
    for key in sorted(first.keys() | second.keys()):
        # A key that is absent reads as null: sections leave out younger fields that ask for nothing.
        was, now = first.get(key), second.get(key)
        is_open = open_matches and now in (None, "auto")
        if was != now and not is_open:
            differing.append(f"{key} was {was!r}, is {now!r}")
    return differing


def leaves(value: JsonObject, prefix: str = "") -> Iterator[tuple[str, JsonValue]]:
    """Every value of nested dictionaries with its dotted key. Raises ConfigError for one that holds itself."""
    if prefix.count(".") > _DEEPEST:  # with an alias, YAML can put a section into itself
        raise ConfigError(f"{prefix.partition('.')[0]}: is nested too deeply, or in itself; give the section's keys")
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from leaves(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def _without_null(values: JsonObject) -> JsonObject:
    """``values`` without sections that are null: their keys are all commented out."""
    return {key: value for key, value in values.items() if value is not None or "." in str(key)}


def _without_empty_sections(model: type[Section], values: JsonObject) -> JsonObject:
    """Return ``values`` of a file without sections within sections whose keys are all commented out."""
    kept: JsonObject = {}
    for key, value in values.items():
        default = model.model_fields[key].default if key in model.model_fields else None
        if isinstance(default, Section) and isinstance(value, dict):
            value = _without_empty_sections(type(default), value)
        if isinstance(default, Section) and value in (None, {}):
            continue
        kept[key] = value
    return kept


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {part} is a value, not a section")
    values[last] = value


def _describe(model: type[Section], entry: Any) -> str:
    where = ".".join(str(part) for part in entry["loc"]) or model.__name__
    if entry["type"] == "extra_forbidden":
        return f"{where}: no such key in {model.__name__}; see --help or docs/configuration.md"
    if entry["type"] == "missing":
        return f"{where}: is required"
    if entry["type"] == "tuple_type":
        return f"{where}: give a list, such as [4, 8] (got {entry['input']!r})"
    if entry["type"] == "model_type":
        return f"{where}: is a section; give one of its keys, as {where}.key (got {entry['input']!r})"
    return f"{where}: {entry['msg'].removeprefix('Value error, ')} (got {entry['input']!r})"
