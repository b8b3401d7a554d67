"""Text probe: softmax regression on frozen image features that starts at zero-shot CLIP and leaves it only as far as
the training images ask. This project's own method.

With image features f (B, E), the text features W (C, E) and s = exp(logit_scale):

    logits = a s f W^T + f M D^T                                         (B, C)

a        scale of the text logits: zero-shot CLIP has never seen the training images, so a minimises its cross-entropy
         on them (sum) + (log a)^2 / 2
D (C, E) minimises sum_i w_i cross-entropy_i + penalty / 2 |D|^2 over the training images and their mirror images: one
         convex problem; w_i gives each class the same weight
M (E, E) P^(1/4), with P the precision within classes of `gda`: where images of one class hardly differ, moving costs
         less. Scaled so that features about their mean keep their length.

No penalty is chosen: the head is the mean of the solutions for seven of them, from an infinite one, which leaves the
text alone, to 0.001. Each counts by its evidence, exp(-sum of cross-entropies) of images that were left out (pseudo
Bayesian model averaging; Yao et al., Using Stacking to Average Bayesian Predictive Distributions, Bayesian Analysis
2018): of the few-shot validation images or, without them, of the training images in four folds. With one image per
class nothing can be left out, and all count the same. Compared with other rules on the real CLIP's features and on
validation images of the miniature, see `benchmarks/notes.md`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.model.classifier import gaussians
from dcp_zoo.training.methods.base import FeatureClassifier, Task, augmented_features
from dcp_zoo.training.recipes import CROSS_VALIDATION
from dcp_zoo.training.stage import FOLDS, fit_weights, minimum, within_class

PENALTIES = (math.inf, 1.0, 0.1, 0.03, 0.01, 0.003, 0.001)
STEPS = 20  # of L-BFGS for each penalty, from the solution for the one before
LeftOut = tuple["Problem", Tensor, Tensor]  # with features (m, E) and labels (m,) that are not part of it


class TextProbe(FeatureClassifier):
    """See the module. `weight` (C, E) holds a s W + D M^T."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        views, labels = augmented_features(task, 1).cpu(), task.train_images.labels  # (V, n, E)
        text = self.clip.scaled(task.text)[0].float().cpu()  # a bias that all classes share changes nothing
        scale = text_scale(views[0] @ text.T, labels)
        problem = Problem(views, labels, scale * text)
        if task.val is not None:
            left_out, selection = [(problem, self.features(task.val).cpu(), task.val.labels)], {}
        else:
            left_out, selection = folds(views, labels, scale * text), {"selection": CROSS_VALIDATION}
        weights = evidence(left_out)
        found = zip(weights, solutions(problem), strict=True)
        self.weight = torch.stack([w * rows for w, rows in found]).sum(0).to(self.clip.device)
        self.info = {"text_scale": scale, "penalty_weights": [round(w, 3) for w in weights], **selection}

    def linear(self) -> tuple[Tensor, Tensor]:
        return self.weight, self.weight.new_zeros(len(self.weight))


def evidence(left_out: list[LeftOut]) -> list[float]:
    """How much each penalty counts, by what was left out; all the same if nothing was."""
    losses = torch.zeros(len(PENALTIES))
    for problem, features, labels in left_out:
        rows = solutions(problem)
        losses += torch.stack([F.cross_entropy(features @ w.T, labels, reduction="sum") for w in rows])
    weights: list[float] = (-losses).softmax(0).tolist()
    return weights


def solutions(problem: "Problem") -> Iterator[Tensor]:
    """a s W + D M^T (C, E) for each penalty."""
    d = torch.zeros_like(problem.text)
    for penalty in PENALTIES:
        d = problem.solve(penalty, d)
        yield problem.text + d @ problem.map.T


class Problem:
    """The convex problem for D, on some training images.

    Args:
        views: their features (V, n, E), on the CPU.
        labels: (n,)
        text: the rows a s W (C, E).
    """

    def __init__(self, views: Tensor, labels: Tensor, text: Tensor) -> None:
        rows, self.text = views.flatten(0, 1), text
        self.labels = labels.repeat(len(views))
        self.map = half_whitening(rows, self.labels)
        self.x, self.start = rows @ self.map, rows @ text.T
        counts = torch.bincount(labels, minlength=len(text)).clamp(min=1)
        self.weights = (len(labels) / (len(labels.unique()) * len(views) * counts))[self.labels]

    def loss(self, d: Tensor, penalty: float) -> Tensor:
        """What D (C, E) minimises."""
        losses = F.cross_entropy(self.start + self.x @ d.T, self.labels, reduction="none")
        return (self.weights * losses).sum() + penalty / 2 * d.square().sum()

    def solve(self, penalty: float, start: Tensor, steps: int = STEPS) -> Tensor:
        """D (C, E) for this penalty, by L-BFGS from another D."""
        if math.isinf(penalty):
            return torch.zeros_like(start)
        return minimum(lambda d: self.loss(d, penalty), start, max_iter=steps, tolerance_grad=1e-3)


def text_scale(logits: Tensor, labels: Tensor) -> float:
    """a: zero-shot CLIP's logits (n, C) of the training images, their labels (n,)."""
    return fit_weights(logits, torch.zeros_like(logits), labels, (1.0, 1.0))[0]


def half_whitening(rows: Tensor, labels: Tensor) -> Tensor:
    """M (E, E): features (n, E), labels (n,)."""
    present, index = labels.unique(return_inverse=True)
    values, vectors = torch.linalg.eigh(gaussians(rows, index, len(present))[1])
    m = ((vectors * values.clamp(min=0) ** 0.25) @ vectors.T).float()
    centred = rows - rows.mean(0)
    length = (centred @ m).norm()
    return m * (centred.norm() / length) if length > 0 else torch.eye(rows.shape[1])


def folds(views: Tensor, labels: Tensor, text: Tensor) -> list[LeftOut]:
    """Problems on three quarters of the training images, or on fewer if no class has four, each with features and
    labels of the others; a class's only image is never left out. Empty if each class has one."""
    counts, position = torch.bincount(labels), within_class(labels)
    number, found = min(FOLDS, int(counts.max())), []
    for fold in range(number if number > 1 else 0):
        out = (position % number == fold) & (counts[labels] > 1)
        found.append((Problem(views[:, ~out], labels[~out], text), views[0, out], labels[out]))
    return found


fit = TextProbe
