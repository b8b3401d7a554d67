"""The answers of a head on test images, as tables."""

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from dcp_zoo.cli.console import log, output

if TYPE_CHECKING:
    from dcp_zoo.training.accuracy import Accuracy
    from dcp_zoo.training.evaluation import Evaluation

MOST = 10  # rows of each table


def show_evaluation(evaluation: "Evaluation", report: Path | None = None, title: str = "") -> None:
    """Print the accuracy with its interval, the worst classes, the pairs of classes confused most often and the
    worst mistakes, and write the page of --report, if that is given."""
    if report:
        write_page(evaluation, report, title)
    output.print(f"[bold]test top-1: {evaluation.accuracy}[/]", highlight=False)
    if not evaluation.mistakes:
        return
    tables = Table.grid(padding=(0, 4))
    tables.add_row(per_class(evaluation.per_class), confused_pairs(evaluation))
    output.print(tables)
    rows = evaluation.mistakes[:MOST]
    table = Table("surest mistakes", "is", "named", "probability", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, (row.path, row.name, row.predicted)), f"{100 * row.probability:.0f} %")
    output.print(table)


def write_page(evaluation: "Evaluation", path: Path, title: str) -> None:
    """Write the page of --report."""
    from dcp_zoo.benchmark.report.mistakes import write_mistakes

    write_mistakes(evaluation, path, title)
    log(f"Wrote {path}")


def per_class(classes: "list[Accuracy]") -> Table:
    """One row per class, worst first, with the 95 % interval."""
    title = "class" if len(classes) <= MOST else f"{MOST} worst classes of {len(classes)}"
    table = Table(title, "correct", "of", "95 % interval", box=None, pad_edge=False)
    for row in sorted(classes, key=lambda row: row.percent)[:MOST]:
        low, high = row.interval
        table.add_row(escape(row.name), str(row.correct), str(row.images), f"{low:.0f} to {high:.0f} %")
    return table


def confused_pairs(evaluation: "Evaluation") -> Table:
    """The pairs of classes that are confused most often."""
    table = Table("images of", "named", "times", box=None, pad_edge=False)
    for pair in evaluation.confused_pairs[:MOST]:
        table.add_row(escape(pair.name), escape(pair.predicted), f"{pair.times} of {pair.images}")
    return table
