"""From result files to tables, learning curves and a page that compares runs."""

from .write import write_report

__all__ = ["write_report"]
