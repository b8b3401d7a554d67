"""Compare methods and models on labelled images, by cross-validation on features that are computed once."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from statistics import mean
from typing import NamedTuple

import torch
from sklearn.model_selection import StratifiedKFold

from dcp_zoo.api.functions import OWN_IMAGES, plain_features, plan_own
from dcp_zoo.api.inputs import ClassNames, Images, Labelled, Labels, check_features, hashed, labelled
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Split, check_images
from dcp_zoo.data.images import Progress, bar, no_progress
from dcp_zoo.data.unreadable import LEAVE_OUT, all_named
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.threads import fair_threads
from dcp_zoo.training.cache import features_folder, kept_features
from dcp_zoo.training.evaluation import EVAL_BATCH, Evaluation, negative_log_likelihood, predict
from dcp_zoo.training.methods.table import METHODS
from dcp_zoo.training.recipes import AUTO
from dcp_zoo.training.run import Run, RunOptions, plan, train_head
from dcp_zoo.training.sources import image_source
from dcp_zoo.zoo.build import check_encoders, plain_clip

Fold = tuple[Sequence[int], Sequence[int]]  # positions of the images for training, and for the test
HEADER = ["model", "method", "accuracy", "95 % interval", "log loss", "seconds"]
LINE = "{0.model}\t{0.method}\t{0.accuracy:.1f} %\t{0.low:.0f} to {0.high:.0f}\t{0.log_loss:.3f}\t{0.seconds}"


class Compared(NamedTuple):
    """How good a method is on images that it was not trained on."""

    model: str  # whose features it reads
    method: str
    accuracy: float  # in percent, over the test images of all folds
    low: float  # its 95 % interval
    high: float
    log_loss: float  # the mean of -log of the label's probability, in nats
    seconds: float  # of one fit, without the features, which all share


class Comparison(list[Compared]):
    """The most accurate first; `pandas.DataFrame(comparison)` is a table, too."""

    def __repr__(self) -> str:
        rows = [HEADER, *(LINE.format(row).split("\t") for row in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


@fair_threads()
def compare(
    images: Images,
    labels: Labels = None,
    *,
    methods: Sequence[str] | None = None,
    models: Sequence[str] = ("dcp_mini",),
    cv: int | Iterable[Fold] = 5,
    classnames: ClassNames = None,
    seed: int = 1,
    device: str = "auto",
    precision: str = AUTO,
    progress: Progress = bar,
) -> Comparison:
    """Which method, on the features of which model, is best for these images: each is trained on all folds but one and
    tested on that one, with what `dcp-zoo benchmark` measures. Features are kept in the user's cache, so that a call
    after a stop reads no image again. ZooError for bad input, an unknown method or model, or a fold without a class.

    Args:
        images, labels, classnames, device, precision, progress: see `dcp_zoo.train`; without images of `none of these`.
        methods: names in `dcp_zoo.training.METHODS`. Default: those that need only features, and take seconds.
        models: of the zoo, see `dcp_zoo.list_models`, also with image models of timm that methods with a text
            probe read beside them: "dcp_vitb16+vit_small_patch14_dinov2.lvd142m".
        cv: the number of folds; or, as in scikit-learn, pairs of positions for training and for the test.
        seed: of the folds and of the methods.
    """
    data = labelled(images, labels, classnames)
    check_images(data.items, progress, LEAVE_OUT)
    data = data._replace(items=hashed(data.items), none=[])
    chosen = [name for name in METHODS if METHODS[name].features] if methods is None else list(methods)
    options: Values = {"seed": seed, "device": device, "precision": precision}
    folds, plans = _folds(data, cv, seed), dict[tuple[str, str], Run]()
    for name, method in product(models, chosen):
        model, *beside = name.split("+")
        check_features(images, plain_features(model))
        run = plan_own(data, None, model, method, progress=no_progress, **options)  # raises before any work
        check_encoders(beside)
        if not beside or run.recipe.classifier != "none":
            plans[name, method] = replace(run, encoders=tuple(beside))
    clips: dict[str, FrozenCLIP] = {}
    rows = Comparison()
    with kept_features(features_folder()), all_named(data.items, LEAVE_OUT):
        for (name, method), run in progress(plans.items(), "methods", len(plans)):
            if run.model not in clips:
                clips = {run.model: plain_clip(run.model).to(run.device)}
                image_source(clips[run.model], data.items, "flip", precision=run.precision).features()
            tested, seconds = zip(*(_tested(data, fold, clips[run.model], run) for fold in folds), strict=True)
            items = [item for answers in tested for item in answers.items]
            answers = Evaluation(data.names, items, torch.cat([answers.logits for answers in tested]))
            loss = negative_log_likelihood(answers.logits, answers.labels)
            measured = answers.accuracy.percent, *answers.accuracy.interval, loss, round(mean(seconds), 2)
            rows.append(Compared(name, method, *measured))
    rows.sort(key=lambda row: (-row.accuracy, row.log_loss))
    return rows


def _tested(data: Labelled, fold: Fold, clip: FrozenCLIP, whole: Run) -> tuple[Evaluation, float]:
    """The predictions on a fold's test images, and the seconds of the fit."""
    train, test = ([data.items[i] for i in rows] for rows in fold)
    options: Values = {"seed": whole.seed, "device": str(whole.device), "precision": whole.precision}
    split = Split(OWN_IMAGES, data.names, train)
    run = plan(split, whole.model, whole.method, test_share=0.0, encoder=whole.encoders, **options)
    started = time.perf_counter()
    head, _ = train_head(run, None, RunOptions(progress=no_progress), clip=clip)
    seconds = time.perf_counter() - started
    source = image_source(clip, test, once=True, precision=run.precision)
    return Evaluation(data.names, test, predict(head, source, EVAL_BATCH)), seconds


def _folds(data: Labelled, cv: int | Iterable[Fold], seed: int) -> list[Fold]:
    """Positions of the images for training and for the test; ZooError if a class is never trained on."""
    labels = [item.label for item in data.items]
    if isinstance(cv, int):
        rarest = min(labels, key=labels.count)
        if not 2 <= cv <= labels.count(rarest):
            problem = f"cv={cv}: of {data.names[rarest]} there are {labels.count(rarest)} images"
            raise ZooError(f"{problem}, and every fold needs one of each class: pass 2 to {labels.count(rarest)}.")
        folds: list[Fold] = list(StratifiedKFold(cv, shuffle=True, random_state=seed).split(labels, labels))
    else:
        folds = list(cv)
    for train, _ in folds:
        if missing := set(labels) - {labels[i] for i in train}:
            raise ZooError(f"A fold has no image of {data.names[min(missing)]} for training: pass other folds.")
    return folds
