"""Linear classifiers on the features of the frozen image tower: a linear probe, and LP++, which blends it with text."""

import warnings
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.clip import Linear
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.probe.estimates import class_means, text_scale
from dcp_zoo.probe.folds import left_out
from dcp_zoo.training.methods.base import FITTED, Method, Task
from dcp_zoo.training.methods.text_probe import probe_views
from dcp_zoo.training.recipes import BaseRecipe, count, option

ALONE = 4.0  # scale of a linear probe's logits, with one image per class
ALPHA_EVERY = 10  # epochs of LP++

# ------------------------------------------------------------------------------------------------------- Linear probe


@dataclass(frozen=True)
class LinearProbeRecipe(BaseRecipe):
    C: float = option(10.0, "inverse strength of the L2 penalty", min=1e-9)
    max_iter: int = count(1000, "steps of L-BFGS, at most")


def fit_linear_probe(task: Task) -> LinearHead:
    """Logistic regression on the features of the training images and their mirror images.

    Its logits are scaled by what the log loss on training images says that were left out, in folds, since a penalty
    strong enough for few images makes it too unsure; with one image per class, where none can be left out, by `ALONE`.
    The default C and `ALONE` were chosen on the sets for choosing of `benchmarks/sets.py`, see `benchmarks/notes.md`: a
    fixed C is more accurate than one that is chosen on few images, and needs no validation images.
    """
    views, labels = task.plain_train.features(probe_views(task.plain_train), task.progress), task.train_labels
    fit = partial(regression, recipe=task.recipe)
    held_out = left_out(views, labels, task.plain_train.groups, fit)
    scale = text_scale(held_out[1], labels[held_out[0]]) if held_out else ALONE
    head = task.linear_head(*(scale * part.to(task.clip.device) for part in fit(views, labels)))
    head.info = {"scale": round(scale, 4)}
    return head


def regression(views: Tensor, labels: Tensor, recipe: LinearProbeRecipe) -> Linear:
    """Weight (C, E) and bias (C,) of logistic regression on features (V, n, E), whose views count as one image."""
    from sklearn.linear_model import LogisticRegression

    x, y = views.flatten(0, 1).numpy(), labels.repeat(len(views)).numpy()
    with warnings.catch_warnings():  # about no convergence with weak penalties, and few images at 1 shot
        warnings.simplefilter("ignore", UserWarning)
        fitted = LogisticRegression(C=recipe.C / len(views), max_iter=recipe.max_iter).fit(x, y)
    weight, bias = (torch.from_numpy(part).float() for part in (fitted.coef_, fitted.intercept_))
    if len(bias) == 1:  # of two classes, scikit-learn has only the second's logit
        weight, bias = torch.cat([0 * weight, weight]), torch.cat([0 * bias, bias])
    return weight, bias


# --------------------------------------------------------------------------------------------------------------- LP++


@dataclass(frozen=True)
class LPPlusPlusRecipe(BaseRecipe):
    epochs: int = count(300, "steps of v and b, each on all training images; alpha takes a tenth of them")
    momentum: float = option(0.9, "momentum of v and b")
    alpha: float = option(250.0, "alpha at first, in multiples of the mean cosine of images and their class names")


@torch.no_grad()
def fit_lp_plus_plus(task: Task) -> LinearHead:
    """A linear probe blended with text features by learned weights per class.

    With image features f (B, E) and the zero-shot classifier W (C, E):

        logits_c = f v_c + b_c + alpha_c f W_c^T                             (B,)

    Given n training features F (n, E), v_c starts at their sum over class c, b at 0, and every alpha_c at 250 times the
    mean over classes of the mean of f W_c^T over class c. Full-batch gradient descent on the cross-entropy, block by
    block, with the gradients at the same point:

        v, b     step size 4 n / lambda_max(F^T F), momentum 0.9, every epoch
        alpha    step size n / (4 max over c of the sum of (f W_c^T)^2), every tenth epoch

    The epoch of highest accuracy on the few-shot validation images is used, the latest on a tie; without any, the last.
    """
    recipe: LPPlusPlusRecipe = task.recipe
    classes, labels = len(task.classnames), task.train_labels
    x, text = task.train_features, task.text
    cosines, truth, rates = x @ text.T, F.one_hot(labels, classes).to(x.device), step_sizes(x, text)
    v = (class_means(x.cpu(), labels, classes) * torch.bincount(labels, minlength=classes)[:, None]).to(x)
    b = torch.zeros_like(v[:, 0])
    alpha = torch.full_like(b, recipe.alpha * class_means(cosines.cpu(), labels, classes).diagonal().mean().item())
    velocities = torch.zeros_like(v), torch.zeros_like(b)

    def linear() -> Linear:
        return v + alpha[:, None] * text, b.clone()

    val, most, info = None if task.val is None else task.features(task.val), -1, {}
    for epoch in task.progress(range(recipe.epochs), "epochs", recipe.epochs):
        error = (F.linear(x, *linear()).softmax(-1) - truth) / len(x)  # (n, C)
        for p, velocity, gradient in zip((v, b), velocities, (error.T @ x, error.sum(0)), strict=True):
            velocity.mul_(recipe.momentum).add_(gradient)
            p.sub_(rates[0] * velocity)
        if (epoch + 1) % ALPHA_EVERY == 0:
            alpha.sub_(rates[1] * (error * cosines).sum(0))
        if val is not None and task.val is not None:
            hits = int((F.linear(val, *linear()).argmax(-1).cpu() == task.val.labels).sum())
            if hits >= most:
                most, info, best = hits, {"epoch": epoch + 1}, linear()
    head = task.linear_head(*(best if info else linear()))
    head.info = dict(info)
    return head


def step_sizes(x: Tensor, text: Tensor) -> tuple[float, float]:
    """Step sizes of v and b, and of alpha, from Lipschitz constants of the loss: x (n, E), text (C, E)."""
    x, text = x.cpu().double(), text.cpu().double()
    largest = torch.linalg.eigvalsh(x.T @ x)[-1].item()
    return 4 * len(x) / largest, len(x) / (4 * (x @ text.T).square().sum(0).max().item())


PAPER = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"
LINEAR_PROBE = Method("linear-probe", "Linear probe", PAPER, fit_linear_probe, LinearProbeRecipe, FITTED, features=True)
PAPER = "Huang et al., LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP, CVPR 2024"
LP_PLUS_PLUS = Method(
    "lp-plus-plus", "LP++", PAPER, fit_lp_plus_plus, LPPlusPlusRecipe, FITTED, chooses=True, features=True
)
