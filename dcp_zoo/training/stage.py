"""Fit the classifier stage of a head, the text probe of `dcp_zoo.model.classifier`, on its features of the few-shot
images.

a, the scale of the text logits, minimises their cross-entropy (sum) + (log a)^2 / 2 on images that they were not
trained on: the few-shot validation images or, without them, the training images as zero-shot CLIP sees them.

Each penalty counts by its evidence, exp(-sum of cross-entropies) of images that were left out (pseudo Bayesian model
averaging; Yao et al., Using Stacking to Average Bayesian Predictive Distributions, Bayesian Analysis 2018): of the
validation images, whose logits then get one more scale t that minimises their cross-entropy + 50 (log t)^2; without
them, of the training images in four folds (of many images in one), with zero-shot CLIP in place of what was trained on
them. With one image per class nothing can be left out. Then all count the same, unless text explains the training
images badly: for the i-th penalty, exp(10 i max(0, r - 1/4)) with r the loss of zero-shot CLIP in units of that of a
random guess.

An image belongs to none of the classes if its `in_distribution_score` is below the threshold that 95 % of the images
that were left out exceed. It takes 20 of them. `others_accepted` says how many would pass if their class was unknown,
at this and at other shares of refused images, `REJECT_RATES`, as far as one image or more is refused.
Compared with other rules on the real CLIP's features and on validation images of the miniature, see
`benchmarks/notes.md`.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model.classifier import ENOUGH, PENALTIES, Linear, Problem, TextProbe, in_distribution_score, minimum
from dcp_zoo.model.config import REFUSED
from dcp_zoo.model.names import TEMPLATE
from dcp_zoo.training.recipes import CROSS_VALIDATION, MANY, NEEDS_VAL, VALIDATION
from dcp_zoo.training.sources import ImageSource, Progress, encode_views, no_progress

REJECT_RATES = (0.01, 0.02, REFUSED, 0.1, 0.2, 0.3)  # shares of the images of known classes
FEWEST = 20  # images for a threshold, which rejects one in twenty
FOLDS = 4  # of more than ENOUGH training images one says as much as four
TRUST = 100.0  # in t = 1: weight of (log t)^2 / 2
Labelled = tuple[Tensor, Tensor]  # features (n, E) or (V, n, E), labels (n,)
LeftOut = tuple[Problem, Tensor, Tensor]  # with features (m, E) and labels (m,) that are not part of it


@torch.no_grad()
def fit_stage(train: ImageSource, val: ImageSource | None = None, progress: Progress = no_progress) -> dict[str, Any]:
    """Give the model of `train`, with stored statistics if it is a DCP, a classifier stage; returns how it was fitted.
    Validation images, for any model on the same CLIP, are needed where zero-shot CLIP cannot stand for the head."""
    model = train.model
    if val is None and not getattr(model, "like_zero_shot", True):
        raise ZooError(NEEDS_VAL.format(model.method))
    if model.stats != "stored":
        raise ZooError("The classifier stage needs stored statistics: call model.store_stats(images) first.")
    model.classifier = None
    views, text = image_features(train, progress), on_cpu(model.text_linear())
    held = None if val is None else (image_features(val.for_model(model), progress)[0], val.labels)
    frozen = None
    if getattr(model, "like_zero_shot", True):
        unprompted = views if train.targets is None else train.targets
        if train.targets is None and model.image_prompts():
            unprompted = image_features(train, progress, model.encode_prompted)
        frozen = unprompted, on_cpu(model.scaled(zero_shot_text(model)))
    stage, info = text_probe(model.classnames, views, train.labels, text, held, frozen)
    model.classifier = stage.to(model.device)
    return info


def text_probe(
    names: Sequence[str],
    views: Tensor,
    labels: Tensor,
    text: Linear,
    val: Labelled | None = None,
    zero_shot: tuple[Tensor, Linear] | None = None,
) -> tuple[TextProbe, dict[str, Any]]:
    """The stage for these C classes, and how it was fitted, on features (V, n, E) of the training images and their
    mirror images, in float32 on the CPU; a class may have no image. `text` is the linear function of the text logits,
    and `val` features (m, E) and labels of validation images. `zero_shot`, features (V, n, E) of the frozen image tower
    and zero-shot CLIP's linear function, are what training images are left out with: by default `views` and `text`,
    which were not trained on them then."""
    if len(names) > 1 and (views[0] - views[0, :1]).abs().max() < 1e-6:
        raise ZooError("All classes have the same image features: check that each class has its own images.")
    unseen, unseen_text = zero_shot or (views, text)
    zero_shot_logits = F.linear(unseen[0], *unseen_text)
    scale = text_scale(zero_shot_logits, labels) if val is None else text_scale(F.linear(val[0], *text), val[1])
    problem = Problem(views, labels, (scale * text[0], scale * text[1]))
    in_folds = scale * unseen_text[0], scale * unseen_text[1]
    if left_out := folds(unseen, labels, in_folds) if val is None else [(problem, *val)]:
        logits, truth = left_out_logits(left_out)
        weights = (-torch.stack([F.cross_entropy(z, truth, reduction="sum") for z in logits])).softmax(0)
        mixed = mean(weights, logits)
    else:
        weights = without_evidence(F.cross_entropy(scale * zero_shot_logits, labels), len(names))
    t = 1.0 if val is None else text_scale(mixed, truth, TRUST)
    stage = TextProbe(names, views.shape[-1])
    stage.weight, stage.metric, stage.evidence = t * mean(weights, problem.solutions), problem.metric, weights
    stage.text_scale.fill_(t * scale)
    rows, of = views.flatten(0, 1), labels.repeat(len(views))
    stage.means.index_add_(0, of, rows)
    stage.means /= torch.bincount(of, minlength=len(names)).clamp(min=1)[:, None]
    info = {
        "selection": CROSS_VALIDATION if val is None else VALIDATION,
        "val_images": 0 if val is None else len(val[1]),
        "text_scale": round(t * scale, 4),
        "penalty_weights": [round(w, 3) for w in weights.tolist()],
    }
    if val is not None and len(truth) < FEWEST and (left_out := folds(unseen, labels, in_folds)):
        logits, truth = left_out_logits(left_out)
        mixed = mean(weights, logits)
    return stage, info | (_with_threshold(stage, t * mixed, truth) if left_out else {})


def _with_threshold(stage: TextProbe, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Set the threshold by logits (m, C) and labels (m,) of images that were left out, unless they are too few."""
    if len(logits) < FEWEST:
        return {}
    scores = in_distribution_score(logits)
    thresholds = {f"{rate:g}": scores.quantile(rate) for rate in REJECT_RATES if rate * len(logits) >= 1}
    stage.threshold.copy_(thresholds[f"{REFUSED:g}"])
    return {
        "thresholds": {rate: round(threshold.item(), 6) for rate, threshold in thresholds.items()},
        "others_accepted": {rate: others_accepted(logits, labels, t) for rate, t in thresholds.items()},
    }


def others_accepted(logits: Tensor, labels: Tensor, threshold: Tensor) -> float | None:
    """The share of images of other things that pass the threshold, in percent: logits (m, C) of images that were left
    out, each without the column of its own class. None for fewer than three classes."""
    classes = logits.shape[1]
    if classes < 3:
        return None
    others = logits[~F.one_hot(labels, classes).bool()].view(len(labels), classes - 1)
    return round(100 * (in_distribution_score(others) >= threshold).float().mean().item(), 1)


def left_out_logits(left_out: list[LeftOut]) -> Labelled:
    """The logits (K, m, C) with each penalty of all images that were left out, and their labels (m,)."""
    logits = [F.linear(f, *problem.text) + f @ problem.solutions.mT for problem, f, _ in left_out]
    return torch.cat(logits, 1), torch.cat([labels for *_, labels in left_out])


def mean(weights: Tensor, values: Tensor) -> Tensor:
    """The mean over the first dimension, by weights (K,)."""
    return (weights[:, None, None] * values).sum(0)


def on_cpu(linear: Linear) -> Linear:
    """A linear function in float32 on the CPU."""
    return linear[0].float().cpu(), linear[1].float().cpu()


def zero_shot_text(model: Any) -> Tensor:
    """Zero-shot CLIP's normalised features (C, E) of a model's classes, by its own descriptions or template if any."""
    texts = getattr(model, "descriptions", None) or getattr(model, "template", "") or TEMPLATE
    return model.zero_shot_classifier(model.classnames, texts)


def text_scale(logits: Tensor, labels: Tensor, trust: float = 1.0) -> float:
    """a: minimises the cross-entropy (sum) of a times logits (n, C) of unseen images + trust (log a)^2 / 2."""
    logits = logits.double()

    def loss(log: Tensor) -> Tensor:
        return F.cross_entropy(log.exp() * logits, labels, reduction="sum") + trust / 2 * log.square()

    return minimum(loss, logits.new_zeros(()), max_iter=100).exp().item()


def without_evidence(loss: Tensor, classes: int) -> Tensor:
    """Weights of the penalties (K,) if no image can be left out, by zero-shot CLIP's loss on the training images."""
    guess = math.log(max(classes, 2))
    return (10 * torch.arange(len(PENALTIES)) * max(0.0, loss.item() / guess - 0.25)).softmax(0)


def folds(views: Tensor, labels: Tensor, text: Linear) -> list[LeftOut]:
    """Problems on three quarters of the training images, or on fewer if no class has four, each with features and
    labels of the others; a class's only image is never left out. Empty if each class has one; of more than `ENOUGH`
    images the first alone."""
    counts, position = torch.bincount(labels), within_class(labels)
    number, found = min(FOLDS, int(counts.max())), []
    for fold in range(0 if number == 1 else 1 if len(labels) > ENOUGH else number):
        out = (position % number == fold) & (counts[labels] > 1)
        found.append((Problem(views[:, ~out], labels[~out], text), views[0, out], labels[out]))
    return found


def within_class(labels: Tensor) -> Tensor:
    """The position (n,) of each image among those of its class."""
    position = torch.empty_like(labels)
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        position[own] = torch.arange(len(own))
    return position


@torch.no_grad()
def image_features(
    source: ImageSource, progress: Progress = no_progress, encoder: Callable[..., Tensor] | None = None
) -> Tensor:
    """Normalised features (V, n, E) of all images in order, in float32 on the CPU, by `encoder` or `encode_image`: of
    all stored views, or of the images and, unless there are `MANY`, their mirror images."""
    model = source.model
    frozen = encoder is None and not getattr(model, "image_prompts", list)()  # depends on the frozen tower alone
    kept = "features" * frozen
    return encode_views(source, encoder or model.encode_image, len(source.items) <= MANY, progress, kept=kept).float()
