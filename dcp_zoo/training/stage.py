"""Fit the classifier stage of a head, see `dcp_zoo.model.classifier`, on its own features of the few-shot images.

The Gaussians come from the training images and their mirror images. Two positive numbers remain, the weights u of the
text logits z and v of the Gaussian scores g (C,), which are scaled to unit variance:

    logits = u z + v g / std(g),  so T = 1 / u and alpha = v / (u std(g))

They are the maximum a posteriori estimate of a logistic regression on the few-shot validation images, with a normal
prior on log u and log v. Its centre for K images per class, u = 0.5 / sqrt(K) and v = 1.4 + 0.55 log2(K), is close to
the miniature's estimates on Caltech-101's validation images at 1 to 16 shots; without validation images it is used as
it is. No test image is used.

An image belongs to none of the classes if log sum exp(logits) is below a threshold, that which 95 % of the validation
images exceed.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model.classifier import GaussianClassifier
from dcp_zoo.training.sources import ImageSource, Progress, no_progress

BATCH = 64
ACCEPTED = 0.95  # of the validation images
FEWEST = 20  # validation images for a threshold: one in twenty may be rejected


def fit_stage(train: ImageSource, val: ImageSource | None = None, progress: Progress = no_progress) -> dict[str, Any]:
    """Give the calibrated model of `train` a classifier stage.

    Args:
        train: the few-shot training images, unaugmented or with stored views.
        val: the few-shot validation images, for another model on the same CLIP or for this one.
        progress: wraps the loops over images.

    Returns:
        How it was fitted, for the checkpoint: "selection" and the number of validation images.

    Raises:
        ZooError: no calibrated context, or a class without images.
    """
    model = train.model
    if model.context != "calibrated":
        raise ZooError("The classifier stage needs a calibrated context: call model.calibrate(images) first.")
    views = image_features(train, progress)  # (V, n, E)
    stage = GaussianClassifier(model.classnames, views.shape[-1]).to(model.device)
    stage.fit(views.flatten(0, 1), train.labels.repeat(len(views)))
    model.classifier = None  # the text logits alone
    scale = _gaussian(stage, views[0].to(model.device)).std().item()
    u, v = prior(len(train.items) / model.num_classes)
    if val is not None:
        features = image_features(val.for_model(model), progress)[0].to(model.device)
        text, gaussian = model.logits(features, model.encode_text()), _gaussian(stage, features)
        u, v = fit_weights(text, gaussian / scale, val.labels.to(model.device), (u, v))
    stage.alpha.fill_(v / (u * scale))
    stage.temperature.fill_(1 / u)
    model.classifier = stage
    if val is None:
        return {"selection": "none", "val_images": 0}
    if len(val.items) >= FEWEST:
        energy = model.logits(features, model.encode_text()).logsumexp(-1)
        stage.threshold.copy_(energy.quantile(1 - ACCEPTED))
    return {"selection": "few-shot validation images", "val_images": len(val.items)}


def _gaussian(stage: GaussianClassifier, features: Tensor) -> Tensor:
    return features @ stage.weight.T + stage.bias


@torch.no_grad()
def image_features(source: ImageSource, progress: Progress = no_progress) -> Tensor:
    """The model's normalised features (V, n, E) of all images in order, in float32: of the images and their mirror
    images, or of all stored views."""
    model, found = source.model, []
    for inputs, _ in progress(source.batches(BATCH), "image features", -(-len(source.items) // BATCH)):
        views = [inputs] if source.views is not None else [inputs, inputs.flip(-1)]
        found.append(torch.stack([model.encode_image(x.to(model.device), source.patches).float() for x in views]))
    features = [torch.cat(found, 1)]
    if source.views is not None:
        features += [
            torch.cat([model.encode_image(x.to(model.device), source.patches).float() for x in view.split(BATCH)])[None]
            for view in source.views[1:]
        ]
    return torch.cat(features)


def prior(shots: float) -> tuple[float, float]:
    """u and v for this number of images per class, see the module."""
    return 0.5 / math.sqrt(shots), 1.4 + 0.55 * math.log2(shots)


def fit_weights(text: Tensor, gaussian: Tensor, labels: Tensor, centre: tuple[float, float]) -> tuple[float, float]:
    """u and v: text logits and scaled Gaussian scores (n, C), labels (n,), and the centre of the prior."""
    text, gaussian = text.double(), gaussian.double()
    start = text.new_tensor(centre).log()
    logs = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logs], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        u, v = logs.exp()
        value = F.cross_entropy(u * text + v * gaussian, labels, reduction="sum") + (logs - start).square().sum() / 2
        optimizer.zero_grad()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    u, v = logs.detach().exp().tolist()
    return u, v
