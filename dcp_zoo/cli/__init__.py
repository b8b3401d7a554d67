"""The command line `dcp-zoo`."""

from .app import main

__all__ = ["main"]
