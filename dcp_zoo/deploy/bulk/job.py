"""What a run on many images computes, on this machine or on a cluster: images in, class names and probabilities out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dcp_zoo.data.find import Found
from dcp_zoo.deploy.bulk.decode import decode_batches
from dcp_zoo.deploy.bulk.predictor import Predictor
from dcp_zoo.deploy.ranking import top_classes
from dcp_zoo.errors import ZooError

# "image", and "predictions" (a list of {"class", "probability"}, best first) or "error"; "rejected" if asked for
Row = dict[str, Any]
Ranks = Callable[[np.ndarray, Sequence[str], int], list[list[Row]]]
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
    rank: Ranks = top_classes,
) -> Iterator[Rows]:
    """Classify images in order, batch by batch. One that cannot be read gets a row with the error.

    Args:
        images: see `find_images`.
        predictor: the loaded head.
        top_k: classes per image.
        batch_size: images per batch; it does not affect the predictions.
        workers: see `decode_batches`.
        reject: say of each image whether it belongs to none of the classes.
        rank: what makes the predictions of probabilities, see `top_classes`.

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
        predictions = rank(np.exp(log_probabilities), predictor.classnames, top_k)
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


Shows = Callable[..., Iterator[Any]]  # shows results: (results, unit, total, done=, size=) -> results


def unshown(results: Iterator[Any], unit: str, total: int, **counts: Any) -> Iterator[Any]:
    return results


@dataclass(frozen=True)
class Job:
    """What a run computes, on this machine or on a cluster.

    Attributes:
        load: returns the predictor; called where it computes, and only if an image is left to classify.
        plan: what determines the results besides the images and these options, as plain JSON, such as the head's hash.
            A run with another plan does not continue this one.
        top_k, batch_size, workers, reject, rank: see `classify`; `rank` is part of the plan.
    """

    load: Callable[[], Predictor]
    plan: dict[str, Any]
    top_k: int = 5
    batch_size: int = 32
    workers: int = 0
    reject: bool = False
    rank: Ranks = top_classes

    def classify(self, images: Sequence[Found], predictor: Predictor) -> Iterator[Rows]:
        return classify(images, predictor, self.top_k, self.batch_size, self.workers, self.reject, self.rank)

    def plan_of(self, images: Iterable[str], **more: Any) -> dict[str, Any]:
        """All that determines the results for these images."""
        digest = sha256("\n".join(images).encode("utf-8", "surrogateescape")).hexdigest()
        return self.plan | {"top_k": self.top_k, "reject": self.reject, **more, "images": digest}


def check_same_plan(place: Path | str, found: dict[str, Any], plan: dict[str, Any]) -> None:
    """Raise ZooError if the rows at a place are of another plan than this one."""
    if differ := [name.replace("_", " ") for name in plan if found.get(name) != plan[name]]:
        raise ZooError(
            f"{place} holds the first rows of another run, which differs in {', '.join(differ)}. Repeat that run's "
            f"command, choose another --output, or delete {place}."
        )


@dataclass(frozen=True)
class Summary:
    """Counts of a finished run: all images, those that an earlier run had done, and those that cannot be read."""

    images: int
    resumed: int
    failed: int
