"""The command line."""

from covray.cli.app import main

__all__ = ["main"]
