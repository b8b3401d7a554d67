"""A self-contained page on a head's answers: accuracy per class, confused pairs, and the mistakes as pictures."""

from pathlib import Path

from dcp_zoo.data.images import jpeg_base64, load_image
from dcp_zoo.files import templates, write_file
from dcp_zoo.training.evaluation import Evaluation, expected_calibration_error, negative_log_likelihood, reliability

ENOUGH = 200  # images for a statement on probabilities: bins of fewer say nothing
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
    page = templates(__package__).get_template("mistakes.html.jinja")
    text = page.render(
        title=title,
        accuracy=evaluation.accuracy,
        balanced=evaluation.balanced,
        ece=expected_calibration_error(evaluation.logits, evaluation.labels),
        nll=negative_log_likelihood(evaluation.logits, evaluation.labels),
        total=len(evaluation.items),
        fewest=ENOUGH,
        bins=reliability(evaluation.logits, evaluation.labels),
        classes=sorted(evaluation.per_class, key=lambda row: row.percent),
        confused_pairs=evaluation.confused_pairs[:20],
        pictures=[(jpeg_base64(load_image(row.item.path), SIDE), row) for row in evaluation.mistakes[:PICTURES]],
    )
    write_file(Path(path), text, "choose another --report")
