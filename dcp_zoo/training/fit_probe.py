"""Fit the text probe of a head, see `dcp_zoo.model.text_probe`, on its features of the few-shot images.

a, the scale of the method's own logits, minimises their cross-entropy (sum) + (log a)^2 / 2 on images that they were
not trained on: the few-shot validation images or, without them, the training images as zero-shot CLIP sees them.

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

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.errors import ZooError
from dcp_zoo.model.config import REFUSED
from dcp_zoo.model.head import Head
from dcp_zoo.model.text_probe import ENOUGH, PENALTIES, Linear, Problem, TextProbe, minimum
from dcp_zoo.training.recipes import CROSS_VALIDATION, MANY, NEEDS_VAL, VALIDATION
from dcp_zoo.training.sources import ImageSource, Progress, encode_views, no_progress

REJECT_RATES = (0.01, 0.02, REFUSED, 0.1, 0.2, 0.3)  # shares of the images of known classes
THRESHOLD_IMAGES = 20  # for a threshold, which rejects one in twenty
FOLDS = 4  # of more than ENOUGH training images one says as much as four
TRUST = 100.0  # in t = 1: weight of (log t)^2 / 2
Labelled = tuple[Tensor, Tensor]  # features (n, E) or (V, n, E), labels (n,)
LeftOut = tuple[Problem, Tensor, Tensor]  # with features (m, E) and labels (m,) that are not part of it


@torch.no_grad()
def fit_probe(
    head: Head,
    train: ImageSource,
    val: ImageSource | None = None,
    progress: Progress = no_progress,
    weights: Tensor | None = None,
) -> dict[str, object]:
    """Give a head, with stored statistics if it is a DCP, a text probe; returns how it was fitted. ZooError for a head
    that is not linear; validation images are needed where zero-shot CLIP cannot stand for the head. `weights` (n,) of
    the training images: see `Problem`."""
    if val is None and not head.is_like_zero_shot:
        raise ZooError(NEEDS_VAL.format(head.method))
    if head.stats != "stored":
        raise ZooError("A text probe needs stored statistics: call model.store_stats(images) first.")
    own, source, count = on_cpu(head.own_linear()), train.for_model(head), probe_views(train)
    views = source.features(count, progress)
    held = None if val is None else (val.for_model(head).features(1, progress)[0], val.labels)
    zero_shot = None
    if head.is_like_zero_shot:
        text = on_cpu(head.scaled(train.model.zero_shot_classifier(head.classnames, head.texts)))
        frozen = views
        if head.is_prompted and train.targets is not None:
            frozen = train.targets[:count]
        elif head.is_prompted:
            frozen = encode_views(source, head.encode_prompted, count, progress).float()
        zero_shot = frozen, text
    head.text_probe, info = fit_on_features(head.classnames, views, train.labels, own, held, zero_shot, weights)
    head.to(head.device)
    return info


def probe_views(train: ImageSource) -> int:
    """How many views of each training image a text probe is fitted to: of many, not also their mirror images."""
    return 2 if len(train.items) <= MANY else 1


def fit_on_features(
    names: list[str],
    views: Tensor,
    labels: Tensor,
    own: Linear,
    val: Labelled | None = None,
    zero_shot: tuple[Tensor, Linear] | None = None,
    weights: Tensor | None = None,
) -> tuple[TextProbe, dict[str, object]]:
    """A text probe for these C classes, and how it was fitted, on features (V, n, E) of the training images and their
    mirror images, in float32 on the CPU; a class may have no image. `own` is the linear function of the method's
    logits, `val` features (m, E) and labels of validation images, and `weights` (n,) those of the losses, see
    `Problem`. `zero_shot`, features (V, n, E) of the frozen image tower and zero-shot CLIP's linear function, are what
    training images are left out with: by default `views` and `own`, which were not trained on them then."""
    if len(names) > 1 and (views[0] - views[0, :1]).abs().max() < 1e-6:
        raise ZooError("All classes have the same image features: check that each class has its own images.")
    unseen, unseen_linear = zero_shot or (views, own)
    unseen_logits = F.linear(unseen[0], *unseen_linear)
    scale = text_scale(unseen_logits, labels) if val is None else text_scale(F.linear(val[0], *own), val[1])
    problem, in_folds = Problem(views, labels, _times(scale, own), weights), list[LeftOut]()
    if val is None or len(val[1]) < THRESHOLD_IMAGES:
        in_folds = folds(unseen, labels, _times(scale, unseen_linear), weights)
    left_out = in_folds if val is None else [(problem, *val)]
    if left_out:
        logits, truth = left_out_logits(left_out)
        evidence = by_evidence(logits, truth)
        judged = mean(evidence, logits), truth
    else:
        evidence = without_evidence(F.cross_entropy(scale * unseen_logits, labels), len(names))
    t = 1.0 if val is None else text_scale(*judged, TRUST)
    probe = TextProbe(names, views.shape[-1])
    probe.weight, probe.metric, probe.evidence = t * mean(evidence, problem.solutions), problem.metric, evidence
    probe.text_scale.fill_(t * scale)
    probe.means.copy_(_class_means(views, labels, len(names)))
    info: dict[str, object] = {
        "selection": CROSS_VALIDATION if val is None else VALIDATION,
        "val_images": 0 if val is None else len(val[1]),
        "text_scale": round(t * scale, 4),
        "penalty_weights": [round(w, 3) for w in evidence.tolist()],
    }
    if val is not None and len(val[1]) < THRESHOLD_IMAGES:  # too few for a threshold
        left_out = in_folds
        if left_out:
            logits, truth = left_out_logits(left_out)
            judged = mean(evidence, logits), truth
    if left_out:
        info |= _set_threshold(probe, t * judged[0], judged[1])
    return probe, info


def _times(scale: float, linear: Linear) -> Linear:
    return scale * linear[0], scale * linear[1]


def _class_means(views: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The mean (C, E) of each class's rows (V, n, E); 0 of a class without any."""
    rows, of = views.flatten(0, 1), labels.repeat(len(views))
    sums = views.new_zeros(classes, views.shape[-1]).index_add_(0, of, rows)
    return sums / torch.bincount(of, minlength=classes).clamp(min=1)[:, None]


def _set_threshold(probe: TextProbe, logits: Tensor, labels: Tensor) -> dict[str, object]:
    """Set the threshold by logits (m, C) and labels (m,) of images that were left out, unless they are too few."""
    if len(logits) < THRESHOLD_IMAGES:
        return {}
    scores = in_distribution_score(logits.numpy())
    rates = [rate for rate in REJECT_RATES if rate * len(logits) >= 1]
    thresholds = {f"{rate:g}": float(np.quantile(scores, rate)) for rate in rates}
    probe.threshold.fill_(thresholds[f"{REFUSED:g}"])
    return {
        "thresholds": {rate: round(threshold, 6) for rate, threshold in thresholds.items()},
        "others_accepted": {rate: others_accepted(logits, labels, t) for rate, t in thresholds.items()},
    }


def others_accepted(logits: Tensor, labels: Tensor, threshold: float) -> float | None:
    """The share of images of other things that pass the threshold, in percent: logits (m, C) of images that were left
    out, each without the column of its own class. None for fewer than three classes."""
    classes = logits.shape[1]
    if classes < 3:
        return None
    others = logits[~F.one_hot(labels, classes).bool()].view(len(labels), classes - 1)
    return round(100 * float((in_distribution_score(others.numpy()) >= threshold).mean()), 1)


def left_out_logits(left_out: list[LeftOut]) -> Labelled:
    """The logits (K, m, C) with each penalty of all images that were left out, and their labels (m,)."""
    logits = [F.linear(f, *problem.text) + f @ problem.solutions.mT for problem, f, _ in left_out]
    return torch.cat(logits, 1), torch.cat([labels for *_, labels in left_out])


def by_evidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Weights of the penalties (K,) by how well each predicts the images that were left out, see `left_out_logits`."""
    return (-torch.stack([F.cross_entropy(z, labels, reduction="sum") for z in logits])).softmax(0)


def mean(weights: Tensor, values: Tensor) -> Tensor:
    """The mean over the first dimension, by weights (K,)."""
    return (weights[:, None, None] * values).sum(0)


def on_cpu(linear: Linear) -> Linear:
    """A linear function in float32 on the CPU."""
    return linear[0].float().cpu(), linear[1].float().cpu()


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


def folds(views: Tensor, labels: Tensor, text: Linear, weights: Tensor | None = None) -> list[LeftOut]:
    """Problems on three quarters of the training images, or on fewer if no class has four, each with features and
    labels of the others; a class's only image is never left out. Empty if each class has one; of more than `ENOUGH`
    images the first alone."""
    counts, position = torch.bincount(labels), within_class(labels)
    number, found = min(FOLDS, int(counts.max())), []
    for fold in range(0 if number == 1 else 1 if len(labels) > ENOUGH else number):
        out = (position % number == fold) & (counts[labels] > 1)
        kept = None if weights is None else weights[~out]
        found.append((Problem(views[:, ~out], labels[~out], text, kept), views[0, out], labels[out]))
    return found


def within_class(labels: Tensor) -> Tensor:
    """The position (n,) of each image among those of its class."""
    position = torch.empty_like(labels)
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()
        position[own] = torch.arange(len(own))
    return position
