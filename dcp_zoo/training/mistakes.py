"""The page on the predictions of a head, with its mistakes: `eval --report`, `train --report`."""

from pathlib import Path

from dcp_zoo.data.images import thumbnails
from dcp_zoo.files import write_file
from dcp_zoo.pages import templates
from dcp_zoo.training.evaluation import (
    Evaluation,
    expected_calibration_error,
    negative_log_likelihood,
    reliability,
)

ENOUGH = 200  # images for a statement on probabilities: bins of fewer say nothing
PICTURES = 60  # mistakes that are shown
SIDE = 240  # pixels of the longer side of their pictures


def write_mistakes(evaluation: Evaluation, path: Path, title: str) -> None:
    """Write the page on the predictions of a head, with this heading."""
    logits = evaluation.logits
    labels = evaluation.labels
    mistakes = evaluation.mistakes[:PICTURES]
    pictures = thumbnails([mistake.item.path for mistake in mistakes], SIDE)
    page = templates(__package__).get_template("mistakes.html.jinja")
    text = page.render(
        title=title,
        answers=evaluation,
        bins=reliability(logits, labels),
        fewest=ENOUGH,
        ece=expected_calibration_error(logits, labels),
        nll=negative_log_likelihood(logits, labels),
        pictures=list(zip(pictures, mistakes, strict=True)),
    )
    write_file(path, text, "choose another --report")
