"""Train a head on a visitor's photographs, watched and stopped from another thread."""

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from torch import nn

from dcp_zoo.api.estimator import FewShotClassifier
from dcp_zoo.api.functions import evaluate
from dcp_zoo.data import Item
from dcp_zoo.data.splits import divide
from dcp_zoo.demo.answers import clip_answers
from dcp_zoo.demo.photos import Photo
from dcp_zoo.errors import ZooError
from dcp_zoo.model.names import repeated_names
from dcp_zoo.training.accuracy import Accuracy
from dcp_zoo.training.callbacks import Epoch, History
from dcp_zoo.training.evaluation import Evaluation

MEASURED_SHARE = 0.25  # of each class


def named_classes(classes: Sequence[tuple[str | None, list[Photo]]]) -> dict[str, list[Photo]]:
    """(name, photographs) of each class in the form, without empty ones; ZooError names what is missing."""
    stripped = [((name or "").strip(), photos) for name, photos in classes]  # an untouched field is None
    used = [(number, name, photos) for number, (name, photos) in enumerate(stripped, 1) if name or photos]
    for number, name, photos in used:
        if not name:
            raise ZooError(f"Class {number} has photographs but no name: give it one.")
        if not photos:
            raise ZooError(f"The class {name!r} has no photographs: add at least one, or remove its name.")
    if len(used) < 2:
        raise ZooError("Training needs at least two classes: give each a name and at least one photograph.")
    if problem := repeated_names([name for _, name, _ in used]):
        raise ZooError(problem)
    return {name: photos for _, name, photos in used}


class Watch(History):
    """How far a training is, for other threads; `stop` ends it after the current epoch."""

    def __init__(self) -> None:
        self.epochs: list[Epoch] = []
        self._stopped = threading.Event()

    def on_start(self, model: nn.Module, recipe: dict[str, Any]) -> None:
        self._total, self._started = recipe["epochs"], time.monotonic()

    def on_epoch(self, model: nn.Module, epoch: Epoch) -> bool:  # type: ignore[override]
        super().on_epoch(model, epoch)
        return self._stopped.is_set()

    def stop(self) -> None:
        self._stopped.set()

    def __str__(self) -> str:
        """Such as "Epoch 3 of 20, loss 0.412, about 12 s left"."""
        if not self.epochs:
            return "Reading the photographs ..."
        done = self.epochs[-1]
        left = (time.monotonic() - self._started) / done.epoch * (self._total - done.epoch)
        time_left = f"{left:.0f} s" if left < 100 else f"{left / 60:.0f} min"
        return f"Epoch {done.epoch} of {self._total}, loss {done.loss:.3f}, about {time_left} left"

    def curve(self) -> pd.DataFrame:
        """The mean loss of every epoch so far."""
        return pd.DataFrame({"epoch": [e.epoch for e in self.epochs], "loss": [e.loss for e in self.epochs]})


@dataclass(frozen=True)
class TrainedHead:
    """A trained head, and how it does on the held-out photographs: None if nothing was held out."""

    classifier: FewShotClassifier  # with the head as `model_`
    images: int  # that it was trained on
    seconds: float  # that the training took
    test: list[Photo]  # held out
    evaluation: Evaluation | None = None
    zero_shot: Accuracy | None = None  # of CLIP without training


def train_on(model: str, method: str, classes: Mapping[str, list[Photo]], watch: Watch) -> TrainedHead:
    """Train a head on three quarters of each class's photographs, and measure it on the others.

    Args:
        model: a model of the zoo.
        method: one in `dcp_zoo.training.METHODS`; only "dcp" can be watched.
        classes: photographs by class name.
        watch: told after each epoch.

    Raises:
        ZooError: training failed.
    """
    names = list(classes)
    items = [Item(p.image, p.name, label) for label, photos in enumerate(classes.values()) for p in photos]
    train, _, test = divide(items, MEASURED_SHARE)
    classifier = FewShotClassifier(model, method, callbacks=[watch] if method == "dcp" else None)
    started = time.perf_counter()
    classifier.fit([item.path for item in train], [names[item.label] for item in train])
    seconds = time.perf_counter() - started
    held_out = [Photo(item.key, item.path, names[item.label]) for item in test]
    if not held_out:
        return TrainedHead(classifier, len(train), seconds, [])
    head = classifier.model_
    evaluation = evaluate(head, [photo.image for photo in held_out], [photo.truth for photo in held_out])
    head.info |= {"metrics": {"top1_stored": round(evaluation.accuracy.percent, 2)}, "test_images": len(test)}
    clip = clip_answers(head, held_out) or []
    hits = sum(next(iter(answers)) == photo.truth for answers, photo in zip(clip, held_out, strict=True))
    return TrainedHead(classifier, len(train), seconds, held_out, evaluation, Accuracy("", hits, len(test)))
