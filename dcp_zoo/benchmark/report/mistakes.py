"""A self-contained page on a head's answers: accuracy by class, confused_pairs, and the mistakes as pictures."""

from functools import partial
from pathlib import Path

from dcp_zoo.benchmark.report.page import render, write_text
from dcp_zoo.data.images import jpeg_base64, load_image
from dcp_zoo.errors import cannot_write
from dcp_zoo.files import write_atomically
from dcp_zoo.training.evaluation import Evaluation
from dcp_zoo.training.metrics import expected_calibration_error, negative_log_likelihood, reliability

PICTURES = 60  # mistakes shown
SIDE = 240  # pixels of the longer side


def write_mistakes(evaluation: Evaluation, path: str | Path, title: str) -> None:
    """Write the page.

    Args:
        evaluation: the answers.
        path: the file; its folder is created if needed.
        title: the page's heading.

    Raises:
        ZooError: a file that is not writable, or an image that is no longer readable.
    """
    text = render(
        "mistakes.html",
        title=title,
        accuracy=evaluation.accuracy,
        ece=expected_calibration_error(evaluation.logits, evaluation.labels),
        nll=negative_log_likelihood(evaluation.logits, evaluation.labels),
        total=len(evaluation.items),
        bins=reliability(evaluation.logits, evaluation.labels),
        classes=sorted(evaluation.per_class, key=lambda row: row.percent),
        confused_pairs=evaluation.confused_pairs[:20],
        pictures=[(jpeg_base64(load_image(row.item.path), SIDE), row) for row in evaluation.mistakes[:PICTURES]],
    )
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), partial(write_text, text))
    except OSError as error:
        raise cannot_write(path, error, "choose another --report") from error
