"""Methods that adapt CLIP to a task, including DCP: one table, one module per method, the same images and
seeds."""

from dcp_zoo.training.methods.table import METHODS, fit_head

__all__ = ["METHODS", "fit_head"]
