"""Options that several commands share, how their texts are read, and which keys of a configuration they set."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Generic, TypeVar

import typer

from covray.cli.completion import complete_config_files, complete_keys, completion_of
from covray.config import Section, load_config
from covray.config.reference import key_default, key_text
from covray.errors import ConfigError

C = TypeVar("C", bound=Section)

OutPath = TypeVar("OutPath", str, Path, str | None)

_FILE_ENDINGS = frozenset(
    (
        ".bin", ".ckpt", ".csv", ".db", ".gz", ".html", ".jpeg", ".jpg", ".json", ".jsonl", ".parquet", ".png", ".pt",
        ".safetensors", ".tar", ".tgz", ".txt", ".yaml", ".yml", ".zip",
    )
)  # fmt: skip
"""Endings that name a format of files."""


def require_folder_name(out: OutPath) -> OutPath:
    """Return ``--out`` of a command that writes a folder, which must not name a file.

    Raises:
        ConfigError: It has the ending of a file format, and there is no such folder yet.
    """
    from covray.io import storage

    ending = PurePosixPath(out or "").suffix.lower()
    if ending in _FILE_ENDINGS and not storage.exists(str(out)):
        raise ConfigError(f"--out {out}: this command writes a folder; give a name that does not end in {ending}")
    return out


def require_manifest_name(out: str) -> str:
    """Return ``--out`` of a command that writes a manifest, which must not name another format.

    Raises:
        ConfigError: It has the ending of another format than Parquet.
    """
    ending = PurePosixPath(out).suffix.lower()
    if ending in _FILE_ENDINGS - {".parquet"}:
        raise ConfigError(f"--out {out}: a manifest is a Parquet file; give a name that ends in .parquet")
    return out


OutFolder = Annotated[str, typer.Option("--out", help="Folder to write.", callback=require_folder_name)]
OutManifest = Annotated[
    str, typer.Option("--out", help="Manifest to write, PATH.parquet.", callback=require_manifest_name)
]
Json = Annotated[bool, typer.Option("--json", help="Print one machine-readable object last.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Everything random follows from it.")]
ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file, or the name of a shipped one as paper/build; see covray config.",
        autocompletion=complete_config_files,
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", help="key=value, for any key of the configuration.", autocompletion=complete_keys),
]
Plan = Annotated[bool, typer.Option("--plan", help="Say what would happen, and stop.")]
TokensPerS = Annotated[
    float | None, typer.Option("--tokens-per-s", help="With --plan: the speed of one worker, for the hours.")
]


@dataclass(frozen=True)
class _Setting:
    """What one option sets."""

    keys: tuple[str, ...]
    read: Callable[[str, Any], Any] | None
    """Turns the option's name and value into the value of the keys; None: the value as it is."""
    also: Mapping[str, Any]
    """Further keys with constant values."""


class StepOptions(Generic[C]):
    """The options of a command that runs a configuration: each says which keys it sets, and takes its help from them.

    A command's function declares them in its signature, and gets its configuration from ``resolve``.
    """

    def __init__(self, config: type[C]):
        """Begin without options, for a command that runs ``config``."""
        self.config = config
        self._settings: dict[str, _Setting] = {}

    def option(
        self,
        name: str,
        *keys: str,
        read: Callable[[str, Any], Any] | None = None,
        also: Mapping[str, Any] | None = None,
        text: str | None = None,
        **typer_settings: Any,
    ) -> Any:
        """Declare the option ``name``.

        Args:
            name: The option, such as ``--prior``.
            keys: The dotted keys that it sets; its help is the text of the first, with its default.
            read: Turns the option's name and value into the value of the keys.
            also: Further keys with the values that they get when the option is given.
            text: Help in place of the first key's text.
            typer_settings: Passed on to ``typer.Option``.
        """
        self._settings[name] = _Setting(keys, read, also or {})
        help_text = text
        if help_text is None:
            help_text = key_text(self.config, keys[0])
            default = key_default(self.config, keys[0]).strip("[]")  # brackets would be read as markup
            if default not in ("", "required", "null"):
                help_text += f" Default: {default}."
        typer_settings.setdefault("autocompletion", completion_of(self.config, keys[0]))
        return typer.Option(name, help=help_text.replace("``", ""), **typer_settings)

    def resolve(self, context: typer.Context, **more: Any) -> C:
        """Return the configuration of a command that was parsed, whether or not it is run.

        Args:
            context: What the command was given.
            more: Further values by key; None leaves a key as it is.

        Raises:
            ConfigError: The configuration is refused, or ``--out`` names a file.
        """
        options = {key: value for key, value in more.items() if value is not None}
        for parameter in context.command.params:
            value = context.params.get(parameter.name)
            name = parameter.opts[0]
            # An option that may be given several times and was not is an empty tuple.
            if value is None or value == () or name not in self._settings:
                continue
            setting = self._settings[name]
            options |= dict.fromkeys(setting.keys, setting.read(name, value) if setting.read else value)
            options |= setting.also  # keys that go with the option, whatever its value
        config = load_config(self.config, context.params["config"], options, context.params["sets"] or ())
        if hasattr(config, "out"):
            require_folder_name(config.out)
        return config


def split_commas(text: str | None) -> list[str] | None:
    """Return the comma-separated parts of ``text`` without the empty ones, or None for None."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def words(option: str, text: str) -> list[str]:
    """Read the comma-separated words of an option."""
    return split_commas(text) or []


def numbers(option: str, text: str) -> list[int]:
    """Read the comma-separated whole numbers of an option.

    Raises:
        ConfigError: A part is not a whole number; the message names ``option``.
    """
    try:
        return [int(part) for part in words(option, text)]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: write whole numbers separated by commas, for example 4,8") from error


def shares(text: str | None) -> dict[str, float] | None:
    """Read ``name=share,name=share``, or None for None.

    Raises:
        ConfigError: A part is not ``name=share``, a name stands twice, a share is negative, or all are 0.
    """
    if text is None:
        return None
    result: dict[str, float] = {}
    try:
        for part in text.split(","):
            name, share = part.split("=")
            name = name.strip()
            if not name or name in result:
                raise ValueError
            result[name] = float(share)
    except ValueError as error:
        raise ConfigError(f"--splits {text}: write name=share, for example train=8,val=1,test=1") from error
    if min(result.values()) < 0 or not 0 < sum(result.values()) < float("inf"):
        raise ConfigError(f"--splits {text}: shares must be at least 0, and not all 0")
    return result


def require_speed(tokens_per_s: float | None, plan: bool) -> None:
    """Check ``--tokens-per-s``.

    Raises:
        ConfigError: It is given without ``--plan``, or is not a positive number.
    """
    if tokens_per_s is not None and not plan:
        raise ConfigError("--tokens-per-s: is for --plan, which computes hours from it; give both")
    if tokens_per_s is not None and not 1e-6 <= tokens_per_s <= 1e12:  # false for NaN too
        raise ConfigError(f"--tokens-per-s {tokens_per_s:g}: must be a number above 0; covray train prints it")
