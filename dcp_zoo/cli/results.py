"""The answers of a head on test images, as tables."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from dcp_zoo.cli.console import log, output
from dcp_zoo.files import printable

if TYPE_CHECKING:
    from dcp_zoo.training.evaluation import Evaluation

MOST = 10  # rows of each table


def show_evaluation(evaluation: "Evaluation", report: Path | None = None, title: str = "") -> None:
    """Print the accuracy with its interval, the worst classes, the pairs of classes confused most often and the
    worst mistakes, and write the page of --report, if that is given."""
    if report:
        write_page(evaluation, report, title)
    output.print(f"[bold]test top-1: {evaluation.accuracy}[/]", highlight=False)
    if evaluation.balanced is not None:
        output.print(f"balanced: {evaluation.balanced:.1f} %, the mean of the classes' accuracies", highlight=False)
    if not evaluation.mistakes:
        return
    classes = sorted(evaluation.per_class, key=lambda row: row.percent)
    worst = "class" if len(classes) <= MOST else f"{MOST} worst classes of {len(classes)}"
    accuracies = [
        (row.name, f"{row.correct}", f"{row.images}", "{:.0f} to {:.0f} %".format(*row.interval)) for row in classes
    ]
    confused = [(pair.name, pair.predicted, f"{pair.times} of {pair.images}") for pair in evaluation.confused_pairs]
    mistakes = [(row.path, row.name, row.predicted, f"{100 * row.probability:.0f} %") for row in evaluation.mistakes]
    both = Table.grid(padding=(0, 4))
    both.add_row(
        first_rows((worst, "correct", "of", "95 % interval"), accuracies),
        first_rows(("images of", "named", "times"), confused),
    )
    output.print(both, first_rows(("surest mistakes", "is", "named", "probability"), mistakes))


def first_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of the first rows."""
    table = Table(*header, box=None, pad_edge=False)
    for row in islice(rows, MOST):
        table.add_row(*(escape(printable(text)) for text in row))
    return table


def write_page(evaluation: "Evaluation", path: Path, title: str) -> None:
    """Write the page of --report."""
    from dcp_zoo.benchmark.report.mistakes import write_mistakes

    write_mistakes(evaluation, path, title)
    log(f"Wrote {path}")
