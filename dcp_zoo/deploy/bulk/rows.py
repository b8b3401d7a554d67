"""Rows of results: images in, class names and probabilities out."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dcp_zoo.data.find import Found
from dcp_zoo.deploy.bulk.decode import decode_batches
from dcp_zoo.deploy.bulk.predictor import Predictor
from dcp_zoo.deploy.ranking import top_classes
from dcp_zoo.errors import ZooError

# "image", and "predictions" (a list of {"class", "probability"}, best first) or "error"; "rejected" if asked for
Row = dict[str, Any]
NONE = "none of these"


class Rows(NamedTuple):
    """The rows of one batch, and their image features (n, E) if they are kept: NaN where an image cannot be read."""

    rows: list[Row]
    features: np.ndarray | None


def classify(
    images: Sequence[Found],
    predictor: Predictor,
    top_k: int = 5,
    batch_size: int = 32,
    workers: int = 0,
    reject: bool = False,
) -> Iterator[Rows]:
    """Classify images in order, batch by batch. One that cannot be read gets a row with the error.

    Args:
        images: see `find_images`.
        predictor: the loaded head.
        top_k: classes per image.
        batch_size: images per batch; it does not affect the predictions.
        workers: see `decode_batches`.
        reject: say of each image whether it belongs to none of the classes.

    Raises:
        ZooError: `reject`, and a head without a threshold for its classes.
    """
    threshold = predictor.threshold if reject else None
    if reject and threshold is None:
        raise ZooError(predictor.cannot_reject)
    paths = [image.path for image in images]
    start = 0
    for pixels, errors in decode_batches(paths, predictor.preprocessing, batch_size, workers):
        batch = images[start : start + len(errors)]
        start += len(errors)
        logits, features = predictor.compute(pixels)  # of damaged images too, for they are few
        log_probabilities = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
        predictions = top_classes(np.exp(log_probabilities), predictor.classnames, top_k)
        answers: list[Row] = [{"predictions": row} for row in predictions]
        if threshold is not None:
            unknown = -log_probabilities.mean(1) < threshold  # see `dcp_zoo.model.classifier.in_distribution_score`
            answers = [a | {"rejected": bool(no)} for a, no in zip(answers, unknown, strict=True)]
        if features is not None:
            features[[bool(error) for error in errors]] = np.nan
        yield Rows(
            [
                {"image": image.name} | ({"error": error} if error else answer)
                for image, error, answer in zip(batch, errors, answers, strict=True)
            ],
            features,
        )


def label(row: Row) -> str:
    """The class of a row without an error."""
    return NONE if row.get("rejected") else row["predictions"][0]["class"]
