"""What all commands have in common: they say what they do, and take ``--debug``, ``--dashboard`` and old spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from typer.core import TyperCommand

from covray.cli.waiting import show_details
from covray.distributed.dashboard import ask_for_dashboard
from covray.errors import ConfigError
from covray.progress import stage


class Command(TyperCommand):
    """A command of covray."""

    old_spellings: ClassVar[Mapping[str, str]] = {}
    """Option as it was once spelled -> the option's name now. Old spellings work, and no help shows them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse ``args`` after taking ``--debug`` and ``--dashboard`` out and replacing old spellings.

        Raises:
            ConfigError: An argument is not text, such as a file name in another encoding: storage knows UTF-8 only.
        """
        arguments = []
        # Taken out by hand: declared as options, they would stand in the signature of every command.
        for position, argument in enumerate(args):
            if not _is_text(argument):
                raise ConfigError(f"{argument}: is not a name in UTF-8; rename the file")
            if argument == "--":
                arguments += args[position:]
                break
            if argument == "--debug":
                show_details()
                continue
            if argument == "--dashboard":
                ask_for_dashboard()
                continue
            name, separator, value = argument.partition("=")
            arguments.append(self.old_spellings.get(name, name) + separator + value)
        return super().parse_args(ctx, arguments)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; until it says more, its name is what it is doing."""
        with stage(ctx.command_path):
            return super().invoke(ctx)


def _is_text(argument: str) -> bool:
    """Return whether ``argument`` is Unicode: Python hands over other bytes of a name as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in argument)


def once_spelled(**old_spellings: str) -> type[Command]:
    """Return the class of a command some of whose options had other names.

    Args:
        old_spellings: Old name without its dashes -> name now without its dashes; underscores stand for inner dashes.
    """
    names = {f"--{old}".replace("_", "-"): f"--{new}".replace("_", "-") for old, new in old_spellings.items()}
    return type("Command", (Command,), {"old_spellings": names})
