"""Reports on result files: tables, learning curves, and a page that compares runs."""

from dcp_zoo.benchmark.report.write import write_report

__all__ = ["write_report"]
