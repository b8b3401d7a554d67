"""The methods that adapt CLIP to a task, DCP among them: one table, a module per method, the same images and seeds."""

from dcp_zoo.methods.table import METHODS, Method

__all__ = ["METHODS", "Method"]
