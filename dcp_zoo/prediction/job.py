"""What a run on many images computes: images in; class names and probabilities out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NamedTuple

import numpy as np

from dcp_zoo.answers import Answering, Outputs, Row, label, labelled, top_classes
from dcp_zoo.data.find import Found
from dcp_zoo.data.images import Progress, no_progress
from dcp_zoo.errors import ZooError, nearest_hint, shorten
from dcp_zoo.fields import Values
from dcp_zoo.prediction.predictor import Predictor, decoded
from dcp_zoo.prediction.together import refined
from dcp_zoo.tables import NONE

NAMED = 10  # of the images that cannot be read


class Rows(NamedTuple):
    """The rows of one batch, and their features (n, E) if they are kept, with `Job.together` also logits (n, E + C)."""

    rows: list[Row]
    features: np.ndarray | None


@dataclass(frozen=True)
class Job:
    """What a run computes."""

    load: Callable[[], Predictor]  # called only if an image is left to classify
    plan: Values  # plain JSON, such as the head's hash: only a run with the same plan continues this one
    top_k: int = 5  # classes per image
    batch_size: int = 32  # does not affect the predictions
    reject: bool = False  # say of each image whether it belongs to none of the classes
    together: bool = False  # refine the answers by each other, see `Job.refined`, with a predictor that keeps features
    labels: Mapping[str, str] = field(default_factory=dict)  # what a person said of images, by name: a class or `NONE`

    def classify(self, images: Sequence[Found], predictor: Predictor) -> Iterator[Rows]:
        """Classify images in order, batch by batch. ZooError for `reject`, and a head without a threshold, or a label
        that is none of its classes."""
        if self.reject and predictor.threshold is None:
            raise ZooError(predictor.cannot_reject)
        for name in {*self.labels.values()} - {NONE, *predictor.classnames}:
            known = f"the head's classes ({shorten(predictor.classnames)}).{nearest_hint(name, predictor.classnames)}"
            raise ZooError(f"The label {name!r} is none of {known} Train a head with these labels first, or change it.")
        answer = Answering(self.top_k, predictor.threshold if self.reject else None)
        paths = [image.path for image in images]
        start = 0
        for pixels, problems in decoded(paths, predictor.preprocessing, self.batch_size):
            errors = ["" if problem is None else str(problem) for problem in problems]
            batch, start = images[start : start + len(errors)], start + len(errors)
            found = predictor.compute(pixels)  # of damaged images too, for they are few
            answers, features = answer(found.logits, predictor.classnames, found.distances), found.features
            if features is not None:
                features = np.concatenate([features, found.logits], 1) if self.together else features
                features[[bool(error) for error in errors]] = np.nan
            rows = [{"error": error} if error else row for error, row in zip(errors, answers, strict=True)]
            if self.labels:
                rows = [labelled(row, self.labels.get(image.name)) for image, row in zip(batch, rows, strict=True)]
            yield Rows([{"image": image.name} | row for image, row in zip(batch, rows, strict=True)], features)

    def collect(self, batches: Iterable[Rows], classnames: Sequence[str]) -> list[Row]:
        """The rows of all batches of `classify`, refined if they are to be."""
        found = list(batches)
        rows = [row for batch in found for row in batch.rows]
        kept = [batch.features for batch in found if batch.features is not None]
        return self.refined(rows, np.concatenate(kept), classnames) if self.together else rows

    def refined(
        self, rows: list[Row], kept: np.ndarray, classnames: Sequence[str], progress: Progress = no_progress
    ) -> list[Row]:
        """The rows with the answers that `together` gives, from what `classify` kept of them; "alone" is the class that
        each image had without the others. Those of no class, or that cannot be read, stay so and lend nothing; those
        that a person labelled stay so and lend their class."""
        rows = [row if "error" in row else row | {"alone": label(row)} for row in rows]
        own = np.array(["error" not in row and label(row) != NONE for row in rows], bool)
        features, logits = kept[:, : -len(classnames)], np.array(kept[:, -len(classnames) :])
        for i, row in enumerate(rows):
            if own[i] and row.get("labelled"):
                logits[i] = [0 if name == label(row) else -np.inf for name in classnames]
        probabilities = refined(Outputs(logits, features=features), own, progress)
        for i, classes in enumerate(top_classes(probabilities, classnames, self.top_k)):
            rows[i] |= {"predictions": classes} if own[i] and not rows[i].get("labelled") else {}
        return rows

    def plan_of(self, images: Iterable[str], **more: object) -> Values:
        """All that determines the results for these images."""
        digest = sha256("\n".join(images).encode("utf-8", "surrogateescape")).hexdigest()
        own = {"top_k": self.top_k, "reject": self.reject, "together": self.together, "labels": dict(self.labels)}
        return self.plan | own | {**more, "images": digest}


@dataclass(frozen=True)
class Summary:
    """What became of the images of a run."""

    images: int
    resumed: int  # that an earlier run had done
    failed: int  # that cannot be read
    changed: Sequence[Row] = ()  # that other images changed, of answers together
    labelled: int = 0  # by a person
    errors: Sequence[str] = field(default=(), compare=False)  # of the first `NAMED` of those
