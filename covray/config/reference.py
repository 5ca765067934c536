"""What the fields say of themselves: the text of a key, the page of all keys, and a step's configuration as YAML.

``python -m covray.config.reference > docs/configuration.md`` writes the page again.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from operator import attrgetter
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from covray.config.build import BuildConfig
from covray.config.evaluate import EvaluateConfig
from covray.config.generate import GenerateConfig
from covray.config.plan import PlanConfig
from covray.config.section import Section
from covray.config.serve import ServeConfig
from covray.config.sweep import SweepConfig
from covray.config.think import ThinkEvaluateConfig, ThinkFeaturesConfig, ThinkGenerateConfig, ThinkTrainConfig
from covray.config.train import TrainConfig
from covray.config.vlm import VlmEvaluateConfig, VlmGenerateConfig, VlmTrainConfig

STEPS: dict[str, type[Section]] = {
    "build": BuildConfig,
    "train": TrainConfig,
    "generate": GenerateConfig,
    "evaluate": EvaluateConfig,
    "sweep": SweepConfig,
    "serve": ServeConfig,
    "plan": PlanConfig,
    "vlm train": VlmTrainConfig,
    "vlm generate": VlmGenerateConfig,
    "vlm evaluate": VlmEvaluateConfig,
    "think features": ThinkFeaturesConfig,
    "think train": ThinkTrainConfig,
    "think generate": ThinkGenerateConfig,
    "think evaluate": ThinkEvaluateConfig,
}
"""The configuration of every step, in the order of the page."""

_INTRODUCTION = """\
# Configuration

Defaults, then `--config FILE` (YAML), then the command's options, then `--set key=value`. Unknown keys are refused.
The resolved configuration is written into every result. `covray config STEP` prints the keys of a step as YAML with
their defaults. `--config` also takes the name of a file that covray ships, such as `paper/train-7b`: `covray config`
lists them.

This page is generated from the fields in `covray/config/`: `python -m covray.config.reference > docs/configuration.md`.
"""


def key_field(model: type[Section], key: str) -> FieldInfo:
    """Return the field of the dotted ``key`` of a configuration.

    Raises:
        KeyError: ``model`` has no such key.
    """
    section, _, rest = key.partition(".")
    field = model.model_fields[section]
    if not rest:
        return field
    inner = _section_in(field.annotation)
    if inner is None:
        raise KeyError(key)
    return key_field(inner, rest)


def key_text(model: type[Section], key: str) -> str:
    """Return what the dotted ``key`` of a configuration means: the docstring of its field, in one line.

    Raises:
        KeyError: ``model`` has no such key.
    """
    return _in_one_line(key_field(model, key).description or "")


def all_keys(model: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all values of a configuration, those of its sections in place of the sections."""
    for name, field in model.model_fields.items():
        section = _section_in(field.annotation)
        if section is not None and isinstance(field.default, Section):
            yield from all_keys(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def key_default(model: type[Section], key: str) -> str:
    """Return the default of the dotted ``key`` as YAML; "required" for a key without one.

    Raises:
        KeyError: ``model`` has no such key.
    """
    name, _, rest = key.partition(".")
    field = model.model_fields[name]
    if not rest:
        return "required" if field.is_required() else _as_yaml(field.get_default(call_default_factory=True))
    if isinstance(field.default, Section):
        return _as_yaml(attrgetter(rest)(field.default))
    if _section_in(field.annotation) is None:
        raise KeyError(key)
    return "null"  # by default there is no such section, and the command decides


def reference_page() -> str:
    """Return docs/configuration.md: every key of every step with its default and its meaning."""
    parts = [_INTRODUCTION]
    for step, model in STEPS.items():
        text = inspect.cleandoc(model.__doc__ or "").replace("``", "`")
        rows = "\n".join(_rows(model))
        parts.append(f"## {step}\n\n{text}\n\n| key | default | meaning |\n|---|---|---|\n{rows}\n")
    return "\n".join(parts)


def annotated_yaml(step: str) -> str:
    """Return the configuration of a step as YAML: every key with its meaning and its default.

    The keys stand behind a ``#``, so that the file changes nothing before it is edited: a default that is written out
    counts as asked for, and holds where another setting, such as the scale or the solver, has one of its own.
    """
    model = STEPS[step]
    about = _in_one_line(inspect.cleandoc(model.__doc__ or ""))
    introduction = [
        *_comment(about),
        *_comment("Delete the # before a key to change its value."),
    ]
    return "\n".join([*introduction, "", *_yaml_lines(model)]) + "\n"


def _yaml_lines(model: type[Section], indent: str = "", defaults: Section | None = None) -> Iterator[str]:
    """Yield the lines of ``annotated_yaml`` for the keys of ``model``; ``defaults`` as in ``_rows``."""
    for name, field in model.model_fields.items():
        section, text = _section_in(field.annotation), _in_one_line(field.description or "")
        if section is not None and isinstance(field.default, Section):
            yield ""
            yield from _comment(text or _in_one_line(section.__doc__ or ""), indent)
            yield f"{indent}{name}:"
            yield from _yaml_lines(section, f"{indent}  ", field.default)
            continue
        if section is not None:
            text = f"{text} Keys: {', '.join(section.model_fields)}.".strip()
        required = field.is_required()
        if required:
            text = f"{text} Required."
        yield from _comment(text, indent)
        default = key_default(model, name) if defaults is None else _as_yaml(getattr(defaults, name))
        yield f"{indent}#{name}:" if required else f"{indent}#{name}: {default}"


def _comment(text: str, indent: str = "") -> list[str]:
    """Return ``text`` as lines of YAML comment of at most 100 characters."""
    return textwrap.wrap(text.replace("``", "`"), 100, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def _rows(model: type[Section], prefix: str = "", defaults: Section | None = None) -> Iterator[str]:
    """Yield a table row for each key of ``model``; a section has a row for itself, then its keys.

    ``defaults`` is what a section holds by default where that is not what its class says.
    """
    for name, field in model.model_fields.items():
        key, text = f"{prefix}{name}", _in_one_line(field.description or "")
        section = _section_in(field.annotation)
        if section is not None and isinstance(field.default, Section):
            yield f"| **{key}** | | {_cell(text or _in_one_line(section.__doc__ or ''))} |"
            yield from _rows(section, f"{key}.", field.default)
            continue
        if section is not None:
            text = f"{text} Keys: {', '.join(section.model_fields)}.".strip()
        default = key_default(model, name) if defaults is None else _as_yaml(getattr(defaults, name))
        yield f"| `{key}` | {default} | {_cell(text)} |"


def _section_in(annotation: Any) -> type[Section] | None:
    """Return the section that a field holds, alone, or null, or several of; None for a field of plain values."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    if get_origin(annotation) in (Union, UnionType, tuple):
        for argument in get_args(annotation):
            section = _section_in(argument)
            if section is not None:
                return section
    return None


def _as_yaml(value: Any) -> str:
    """Return a default as a file or ``--set`` would give it."""
    # PyYAML ends a lone value with the mark of a document's end.
    return yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _in_one_line(docstring: str) -> str:
    return " ".join(docstring.split())


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    print(reference_page(), end="")
