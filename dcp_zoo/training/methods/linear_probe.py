"""Linear classifiers on the features of the frozen image tower: a linear probe, and LP++, which blends it
with text."""

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
from dcp_zoo.training.methods.base import FITTED, Method, mirrored, plain
from dcp_zoo.training.recipes import BaseRecipe, count, option
from dcp_zoo.training.task import Task

ALONE = 4.0  # scale of a linear probe's logits, with one image per class
ALPHA_EVERY = 10  # epochs of LP++

# ------------------------------------------------------------------------------------------------------- Linear probe


@dataclass(frozen=True)
class LinearProbeRecipe(BaseRecipe):
    C: float = option(10.0, "inverse strength of the L2 penalty", min=1e-9)
    max_iter: int = count(1000, "steps of L-BFGS, at most")


def fit_linear_probe(task: Task) -> LinearHead:
    """Logistic regression on the features of the training images and their mirror images.

    A penalty strong enough for few images makes its probabilities too even: its logits are scaled to the
    lowest log loss on held-out training images, in folds; with one image per class, where none can be held
    out, by `ALONE`. The default C and `ALONE` were chosen on the sets for choosing of `benchmarks/sets.py`,
    see `benchmarks/notes.md`: a fixed C is more accurate than one that is chosen on few images, and needs no
    validation images.
    """
    views = task.train.rows(*mirrored(task))
    labels = task.train.labels
    fit = partial(regression, recipe=task.recipe)
    held_out = left_out(views, labels, task.train.groups, fit)
    scale = ALONE
    if held_out:
        positions, logits = held_out
        scale = text_scale(logits, labels[positions])
    weight, bias = fit(views, labels)
    device = task.clip.device
    head = task.linear_head(scale * weight.to(device), scale * bias.to(device))
    head.info = {"scale": round(scale, 4)}
    return head


def regression(views: Tensor, labels: Tensor, recipe: LinearProbeRecipe) -> Linear:
    """Weight (C, E) and bias (C,) of logistic regression on features (V, n, E), whose views count as one
    image."""
    from sklearn.linear_model import LogisticRegression

    x = views.flatten(0, 1).numpy()
    y = labels.repeat(len(views)).numpy()
    model = LogisticRegression(C=recipe.C / len(views), max_iter=recipe.max_iter)
    with warnings.catch_warnings():  # about no convergence with weak penalties, and few images at 1 shot
        warnings.simplefilter("ignore", UserWarning)
        model.fit(x, y)
    weight = torch.from_numpy(model.coef_).float()
    bias = torch.from_numpy(model.intercept_).float()
    if len(bias) == 1:  # of two classes, scikit-learn has only the second's logit
        weight = torch.cat([0 * weight, weight])
        bias = torch.cat([0 * bias, bias])
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

    Given n training features F (n, E), v_c starts at their sum over class c, b at 0, and every alpha_c at
    250 times the mean over classes of the mean of f W_c^T over class c. Full-batch gradient descent on the
    cross-entropy, block by block, with the gradients at the same point:

        v, b     step size 4 n / lambda_max(F^T F), momentum 0.9, every epoch
        alpha    step size n / (4 max over c of the sum of (f W_c^T)^2), every tenth epoch

    The epoch of highest accuracy on the few-shot validation images is used, the latest on a tie; without
    any, the last.
    """
    recipe: LPPlusPlusRecipe = task.recipe
    classes = len(task.classnames)
    labels = task.train.labels
    x = task.embeddings(task.train)
    text = task.text
    cosines = x @ text.T  # (n, C)
    one_hot = F.one_hot(labels, classes).to(x.device)
    rate, alpha_rate = step_sizes(x, text)
    v = (class_means(x.cpu(), labels, classes) * torch.bincount(labels, minlength=classes)[:, None]).to(x)
    b = torch.zeros_like(v[:, 0])
    alpha = torch.full_like(b, recipe.alpha * class_means(cosines.cpu(), labels, classes).diagonal().mean().item())
    v_velocity = torch.zeros_like(v)
    b_velocity = torch.zeros_like(b)

    def linear() -> Linear:
        return v + alpha[:, None] * text, b.clone()

    val = None if task.val is None else task.embeddings(task.val)
    best = linear()
    best_hits = -1
    info = {}
    for epoch in task.progress(range(recipe.epochs), "epochs", recipe.epochs):
        error = (F.linear(x, *linear()).softmax(-1) - one_hot) / len(x)  # (n, C)
        v_velocity.mul_(recipe.momentum).add_(error.T @ x)
        b_velocity.mul_(recipe.momentum).add_(error.sum(0))
        v.sub_(rate * v_velocity)
        b.sub_(rate * b_velocity)
        if (epoch + 1) % ALPHA_EVERY == 0:
            alpha.sub_(alpha_rate * (error * cosines).sum(0))
        if val is not None and task.val is not None:
            hits = int((F.linear(val, *linear()).argmax(-1).cpu() == task.val.labels).sum())
            if hits >= best_hits:
                best_hits = hits
                best = linear()
                info = {"epoch": epoch + 1}
    weight, bias = linear() if val is None else best
    head = task.linear_head(weight, bias)
    head.info = info
    return head


def step_sizes(x: Tensor, text: Tensor) -> tuple[float, float]:
    """Step sizes of v and b, and of alpha, from Lipschitz constants of the loss: x (n, E), text (C, E)."""
    x = x.cpu().double()
    largest = torch.linalg.eigvalsh(x.T @ x)[-1].item()
    largest_cosines = (x @ text.cpu().double().T).square().sum(0).max().item()
    return 4 * len(x) / largest, len(x) / (4 * largest_cosines)


PAPER = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"
LINEAR_PROBE = Method(
    "linear-probe", "Linear probe", PAPER, fit_linear_probe, LinearProbeRecipe, FITTED, features=mirrored
)
PAPER = "Huang et al., LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP, CVPR 2024"
LP_PLUS_PLUS = Method(
    "lp-plus-plus", "LP++", PAPER, fit_lp_plus_plus, LPPlusPlusRecipe, FITTED, chooses=True, features=plain
)
