"""The command line `dcp-zoo`."""

from dcp_zoo.cli.app import main

__all__ = ["main"]
