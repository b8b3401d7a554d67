"""Linear probe (Radford et al., ICML 2021): logistic regression on the features of the frozen image tower, of the
training images and their mirror images.

Its logits are scaled by what the log loss on training images says that were left out, in folds, since a penalty strong
enough for few images makes it too unsure; with one image per class, where none can be left out, by `ALONE`. The default
C and `ALONE` were chosen on the sets for choosing of `benchmarks/sets.py`, see `benchmarks/notes.md`: a fixed C is more
accurate than one that is chosen on few images, and needs no validation images.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.clip import Linear
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.probe.estimates import text_scale
from dcp_zoo.probe.folds import folds
from dcp_zoo.training.methods.base import FITTED, Method, Task
from dcp_zoo.training.methods.text_probe import probe_views
from dcp_zoo.training.recipes import BaseRecipe, count, option

ALONE = 4.0


@dataclass(frozen=True)
class LinearProbeRecipe(BaseRecipe):
    C: float = option(10.0, "inverse strength of the L2 penalty", min=1e-9)
    max_iter: int = count(1000, "steps of L-BFGS, at most")


def fit(task: Task) -> LinearHead:
    recipe: LinearProbeRecipe = task.recipe
    views, labels = task.plain_train.features(probe_views(task.plain_train), task.progress), task.train_labels
    scale = scale_of(views, labels, recipe)
    head = task.linear_head(*(scale * part.to(task.clip.device) for part in regression(views, labels, recipe)))
    head.info = {"scale": round(scale, 4)}
    return head


def scale_of(views: Tensor, labels: Tensor, recipe: LinearProbeRecipe) -> float:
    """The scale of the logits with the least loss on images that were left out, or `ALONE`: features (V, n, E), labels
    (n,)."""
    held_out = left_out(views, labels, recipe)
    return text_scale(*held_out) if held_out else ALONE


def left_out(views: Tensor, labels: Tensor, recipe: LinearProbeRecipe) -> tuple[Tensor, Tensor] | None:
    """Logits (n, C) and labels (n,) of images that were left out of training, in folds; None where no class has several
    images."""
    logits, truth = list[Tensor](), list[Tensor]()
    for out in folds(labels):
        kept = torch.isin(torch.arange(len(labels)), out, invert=True)
        logits.append(F.linear(views[0, out], *regression(views[:, kept], labels[kept], recipe)))
        truth.append(labels[out])
    return (torch.cat(logits), torch.cat(truth)) if logits else None


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


PAPER = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"
LINEAR_PROBE = Method("linear-probe", "Linear probe", PAPER, fit, LinearProbeRecipe, FITTED, features=True)
