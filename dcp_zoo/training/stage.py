"""Fit the classifier stage of a head, see `dcp_zoo.model.classifier`, on its own features of the few-shot images.

The Gaussians come from the training images and their mirror images. Two positive numbers remain, the weights u of the
text logits z and v of the Gaussian scores g (C,), which are scaled to unit variance:

    logits = u z + v g / std(g),  so T = 1 / u and alpha = v / (u std(g))

They are the maximum a posteriori estimate of a logistic regression, with a normal prior on log u and log v. Its centre
for K images per class, u = 0.5 / sqrt(K) and v = 1.4 + 0.55 log2(K), is close to the miniature's estimates on
Caltech-101's validation images at 1 to 16 shots. The regression is on the few-shot validation images; without them, on
the training images as if they had not been seen: with zero-shot CLIP in place of the prompts, which were trained on
these images and answer them too well, and with Gaussians of frozen features that were fitted without them, in four
folds. No test image is used.

An image belongs to none of the classes if its `in_distribution_score` is below the threshold that 95 % of the same
images exceed, with the head's own features. It takes 20 images, and of training images two per class.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model.classifier import GaussianClassifier, in_distribution_score
from dcp_zoo.model.names import TEMPLATE
from dcp_zoo.training.cache import by_item, tower_setting
from dcp_zoo.training.recipes import CROSS_VALIDATION, NEEDS_VALIDATION, VALIDATION
from dcp_zoo.training.sources import ImageSource, Progress, by_image, no_progress

BATCH = 64
ACCEPTED = 0.95  # of the images of known classes
FEWEST = 20  # images for a threshold, which rejects one in twenty
FOLDS = 4
ROUNDING = 1e-5  # a spread of the scores below this fraction of them is float32 rounding
Unseen = tuple[Tensor, Tensor, Tensor]  # text logits and scaled Gaussian scores (n, C) of new images, their labels (n,)


@torch.no_grad()
def fit_stage(train: ImageSource, val: ImageSource | None = None, progress: Progress = no_progress) -> dict[str, Any]:
    """Give the model of `train`, with stored statistics if it is a DCP, a classifier stage.

    Args:
        train: the few-shot training images, unaugmented or with stored views.
        val: the few-shot validation images, for another model on the same CLIP or for this one.
        progress: wraps the loops over images.

    Returns:
        How it was fitted, for the checkpoint: "selection" and the number of validation images.

    Raises:
        ZooError: no stored statistics, a class without images, classes with the same images, or no validation images
            for a head that zero-shot CLIP cannot stand for, such as a linear probe.
    """
    model = train.model
    _check_can_be_fitted(model, val)
    views, labels = image_features(train, progress), train.labels  # (V, n, E), (n,)
    stage = GaussianClassifier(model.classnames, views.shape[-1])
    stage.fit(views.flatten(0, 1), labels.repeat(len(views)))
    scale = stage.scores(views[0]).std().item()
    if not scale > ROUNDING * stage.mean_bias.abs().item():  # or NaN
        raise ZooError("All classes have the same image features: check that each class has images of its own.")
    model.classifier = None
    if val is not None:
        features = image_features(val.for_model(model), progress)[0]
        unseen = _logits(features, model.text_linear()), stage.scores(features) / scale, val.labels
    elif train.targets is None and model.image_prompts():
        unseen = _as_if_unseen(model, image_features(train, progress, model.encode_prompted), labels)
    else:
        unseen = _as_if_unseen(model, views if train.targets is None else train.targets, labels)
    u, v = fit_weights(*unseen, prior(len(labels) / model.num_classes))
    stage.alpha.fill_(v / (u * scale))
    stage.temperature.fill_(1 / u)
    used = 0 if val is None else len(val.items)
    text, gaussian, _ = unseen if used >= FEWEST else _as_if_unseen(model, views, labels)
    if used >= FEWEST or (len(labels) >= FEWEST and torch.bincount(labels).min() > 1):
        stage.threshold.copy_(in_distribution_score(u * text + v * gaussian).quantile(1 - ACCEPTED))
    model.classifier = stage.to(model.device)
    return {"selection": VALIDATION if used else CROSS_VALIDATION, "val_images": used}


def _check_can_be_fitted(model: Any, val: ImageSource | None) -> None:
    if val is None and not getattr(model, "like_zero_shot", True):
        raise ZooError(NEEDS_VALIDATION.format(model.method))
    if model.stats != "stored":
        raise ZooError("The classifier stage needs stored statistics: call model.store_stats(images) first.")


def _as_if_unseen(model: Any, views: Tensor, labels: Tensor) -> Unseen:
    """Training images as if they were new ones: zero-shot CLIP's text logits, and scores of Gaussians that were fitted
    without them. views (V, n, E) of a frozen image tower, labels (n,)."""
    text = _logits(views[0], model.scaled(zero_shot_text(model)))
    return text, out_of_fold(views, labels, model.num_classes), labels


def zero_shot_text(model: Any) -> Tensor:
    """Zero-shot CLIP's normalised text features (C, E) of a model's classes: of its own descriptions or template, if it
    has any."""
    texts = getattr(model, "descriptions", None) or getattr(model, "template", "") or TEMPLATE
    return model.zero_shot_classifier(model.classnames, texts)


def _logits(features: Tensor, linear: tuple[Tensor, Tensor]) -> Tensor:
    """features (n, E) on the CPU, weight (C, E) and bias (C,) -> logits (n, C)."""
    weight, bias = (t.cpu() for t in linear)
    return features @ weight.T + bias


def estimate_weights(text: Tensor, views: Tensor, labels: Tensor) -> tuple[float, float]:
    """u and v by cross-validation: text logits (n, C) that were not trained on the training images, features (V, n, E),
    labels (n,)."""
    classes = text.shape[1]
    return fit_weights(text, out_of_fold(views, labels, classes), labels, prior(len(labels) / classes))


def out_of_fold(views: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Scaled Gaussian scores (n, C) of training images from fits without them: views (V, n, E), labels (n,). Zeros if a
    class has only one image."""
    scores, position = torch.zeros(len(labels), classes), within_class(labels)
    folds = min(FOLDS, int(torch.bincount(labels).min()))
    for fold in range(folds if folds > 1 else 0):
        kept = position % folds != fold
        stage = GaussianClassifier([""] * classes, views.shape[-1])
        stage.fit(views[:, kept].flatten(0, 1), labels[kept].repeat(len(views)))
        scores[~kept] = stage.scores(views[0, ~kept]) / stage.scores(views[0, kept]).std()
    return scores


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
    """Normalised features (V, n, E) of all images in order, in float32 on the CPU: of all stored views, or of
    the images and their mirror images. `encoder`: the model's `encode_image`, the default, or `encode_prompted`."""
    model = source.model

    def encode(inputs: Tensor) -> Tensor:
        return (encoder or model.encode_image)(inputs.to(model.device), patches=source.patches).float().cpu()

    def features(rows: Sequence[int]) -> Tensor:
        part, n = source.of(rows), len(rows)
        if part.views is None:
            batches = by_image(progress, part.batches(BATCH), "image features", n)
            return torch.cat([torch.stack([encode(x), encode(x.flip(-1))]) for x, _ in batches], 1)
        chunks = ((x, x) for view in part.views for x in view.split(BATCH))
        batches = by_image(progress, chunks, "image features", len(part.views) * n)
        return torch.cat([encode(x) for x, _ in batches]).unflatten(0, (len(part.views), n))

    if encoder is None and not model.image_prompts():  # the frozen tower alone
        views = 2 if source.views is None else len(source.views)
        return by_item(source.items, lambda: tower_setting(model, "features"), views, features)
    return features(range(len(source.items)))


def prior(shots: float) -> tuple[float, float]:
    """u and v for this number of images per class, see the module."""
    return 0.5 / math.sqrt(shots), 1.4 + 0.55 * math.log2(shots)


def fit_weights(text: Tensor, gaussian: Tensor, labels: Tensor, centre: tuple[float, float]) -> tuple[float, float]:
    """u and v: text logits and scaled Gaussian scores (n, C), labels (n,), and the centre of the prior."""
    text, gaussian = text.double(), gaussian.double()
    start = text.new_tensor(centre).log()

    def loss(logs: Tensor) -> Tensor:
        u, v = logs.exp()
        return F.cross_entropy(u * text + v * gaussian, labels, reduction="sum") + (logs - start).square().sum() / 2

    u, v = minimum(loss, start, max_iter=100).exp().tolist()
    return u, v


def minimum(loss: Callable[[Tensor], Tensor], start: Tensor, **options: Any) -> Tensor:
    """Where a convex loss is lowest, by L-BFGS with a line search from `start`; `options` are those of
    `torch.optim.LBFGS`."""
    found = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([found], line_search_fn="strong_wolfe", **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(found)
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    return found.detach()
