"""The command line: parse and call. Importing it loads neither torch nor numpy."""

from hvdtrain.cli.commands import main

__all__ = ["main"]
