"""What a run on many images computes: images in; class names and probabilities out. Images are decoded in parallel
processes without torch, whose import takes longer than decoding some hundred images."""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, NamedTuple

import numpy as np

from dcp_zoo.answers import Answering, Predictor, Row, label, labelled, log_softmax, top_classes
from dcp_zoo.data.find import Found
from dcp_zoo.data.images import load_image
from dcp_zoo.data.pixels import crop
from dcp_zoo.data.progress import Progress, no_progress
from dcp_zoo.deploy.together import together
from dcp_zoo.errors import ZooError, check_range, nearest_hint, shorten
from dcp_zoo.fields import Values
from dcp_zoo.texts import NONE
from dcp_zoo.threads import available_cores

Decoded = tuple[np.ndarray, list[str]]  # pixels, uint8 (n, 3, H, W); and for each image "" or why it cannot be read
NAMED = 10  # of the images that cannot be read
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # fork breaks threads


def decode_batches(paths: Sequence[str], preprocessing: Values, batch_size: int, workers: int) -> Iterator[Decoded]:
    """Batches of the images at these paths, in order, cropped by timm's input_size and crop_pct. `workers` are
    processes; with 0, threads decode each batch when it is asked for. ZooError if a worker died."""
    check_range("batch_size", batch_size, 1)
    batches = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    if workers == 0:
        with ThreadPoolExecutor(available_cores()) as pool:
            for batch in batches:
                yield _decode_batch(preprocessing, batch, pool.map)
        return
    workers, context = min(workers, len(batches)), multiprocessing.get_context(METHOD)
    context.set_forkserver_preload([__name__])
    processes = ProcessPoolExecutor(workers, context, _start_worker)
    running: deque[Future[Decoded]] = deque()
    try:
        for batch in batches:
            if len(running) > 2 * workers:  # one in each worker, one waiting for it, one for the consumer
                yield running.popleft().result()
            running.append(processes.submit(_decode_batch, preprocessing, batch))
        while running:
            yield running.popleft().result()
    except BrokenProcessPool as error:
        problem = "A process that decodes images was killed, perhaps for lack of memory."
        raise ZooError(f"{problem} Close other programs, and run the same command again: it goes on.") from error
    finally:
        processes.shutdown(cancel_futures=True)


def _decode(preprocessing: Values, path: str) -> tuple[np.ndarray, str]:
    """The pixels (3, H, W) of an image and ""; or zeros, and why it cannot be read."""
    try:
        return crop(load_image(path), preprocessing), ""
    except ZooError as error:
        reason = str(error)
    except MemoryError:
        reason = f"{path} is too large for the memory that is left."
    return np.zeros(preprocessing["input_size"], np.uint8), reason


def _decode_batch(preprocessing: Values, paths: Sequence[str], map: Callable[..., Any] = map) -> Decoded:
    pixels, reasons = zip(*map(partial(_decode, preprocessing), paths), strict=True)
    return np.stack(pixels), list(reasons)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process
    parent = multiprocessing.parent_process()
    assert parent
    # a worker waits for tasks for ever, even where its parent was killed
    Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


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
    workers: int = 0  # see `decode_batches`
    reject: bool = False  # say of each image whether it belongs to none of the classes
    together: bool = False  # refine the answers by each other, see `refined`, with a predictor that keeps features
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
        for pixels, errors in decode_batches(paths, predictor.preprocessing, self.batch_size, self.workers):
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
        own = [i for i, row in enumerate(rows) if "error" not in row and label(row) != NONE]
        features, logits = kept[own, : -len(classnames)], kept[own, -len(classnames) :]
        for z, i in zip(logits, own, strict=True):
            if rows[i].get("labelled"):
                z[:] = [0 if name == label(rows[i]) else -np.inf for name in classnames]
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        probabilities = together(np.exp(log_softmax(logits)), features, progress)
        for i, classes in zip(own, top_classes(probabilities, classnames, self.top_k), strict=True):
            rows[i] |= {} if rows[i].get("labelled") else {"predictions": classes}
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
