"""The version of the installed package; `setup.cfg` is where it is set."""

from importlib.metadata import version

__version__ = version("dcp_zoo")
