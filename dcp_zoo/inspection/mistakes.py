"""A page on the predictions of a head: accuracy per class, confused pairs, and the mistakes as pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

from dcp_zoo.data.images import thumbnails
from dcp_zoo.files import templates, write_file

if TYPE_CHECKING:
    from dcp_zoo.training.evaluation import Evaluation

ENOUGH = 200  # images for a statement on probabilities: bins of fewer say nothing
PICTURES, SIDE = 60, 240  # mistakes shown, and the pixels of their longer side


def write_mistakes(evaluation: "Evaluation", path: str | Path, title: str) -> None:
    """Write the page with this heading."""
    from dcp_zoo.training.evaluation import expected_calibration_error, negative_log_likelihood, reliability

    answers = evaluation.logits, evaluation.labels
    content = {"title": title, "answers": evaluation, "bins": reliability(*answers), "fewest": ENOUGH}
    content |= {"ece": expected_calibration_error(*answers), "nll": negative_log_likelihood(*answers)}
    mistakes = evaluation.mistakes[:PICTURES]
    pictures = list(zip(thumbnails((row.item.path for row in mistakes), SIDE), mistakes, strict=True))
    text = templates(__package__).get_template("mistakes.html.jinja").render(content, pictures=pictures)
    write_file(Path(path), text, "choose another --report")
