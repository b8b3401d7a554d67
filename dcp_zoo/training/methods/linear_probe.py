"""Linear probe (Radford et al., ICML 2021): logistic regression on the features of the frozen image tower.

C, the inverse strength of the L2 penalty, is chosen on the few-shot validation images; without these by
cross-validation; with one image per class it is `DEFAULT_C`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from dcp_zoo.fields import count, option
from dcp_zoo.model.head import LinearHead
from dcp_zoo.model.text_probe.fit import FOLDS
from dcp_zoo.training.methods.base import FITTED, Method, Task
from dcp_zoo.training.recipes import CROSS_VALIDATION, BaseRecipe

# where there is nothing to choose by: the CLIP paper's on ImageNet, 0.316, for features whose norm of about 10 is now 1
DEFAULT_C = 31.6


@dataclass(frozen=True)
class LinearProbeRecipe(BaseRecipe):
    C: float | None = option(
        None, "inverse strength of the L2 penalty; null: chosen on validation images, or by cross-validation"
    )
    max_iter: int = count(1000, "steps of L-BFGS, at most")


def fit(task: Task) -> LinearHead:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    recipe: LinearProbeRecipe = task.recipe
    x, y, c, chosen = task.train_features.cpu().numpy(), task.train_labels, recipe.C or DEFAULT_C, {}
    val = task.val if recipe.C is None else None
    known = None if val is None else (task.features(val).cpu().numpy(), val.labels)
    regression = partial(LogisticRegression, max_iter=recipe.max_iter)
    with warnings.catch_warnings():  # about no convergence with the weakest penalties, and few images at 1 shot
        warnings.simplefilter("ignore", UserWarning)
        if known:
            c = search(lambda value: regression(C=value).fit(x, y).score(*known))
        elif recipe.C is None and (folds := min(FOLDS, int(torch.bincount(y).max()))) > 1:
            c = search(lambda value: cross_val_score(regression(C=value), x, y, cv=folds).mean())
            chosen = {"selection": CROSS_VALIDATION}
        fitted = regression(C=c).fit(x, y)
    weight, bias = (torch.from_numpy(part).float() for part in (fitted.coef_, fitted.intercept_))
    if len(bias) == 1:  # of two classes, scikit-learn has only the second's logit
        weight, bias = torch.cat([0 * weight, weight]), torch.cat([0 * bias, bias])
    head = task.linear_head(weight.to(task.clip.device), bias.to(task.clip.device))
    head.info = {"C": c, **chosen}
    return head


def search(score: Callable[[float], float]) -> float:
    """The C between 1e-6 and 1e6 with the highest score; ties go to the largest: a weaker penalty is better calibrated.
    As in the CLIP paper: seven values first, then the interval around the best is halved, to eight steps a decade."""
    scores: dict[float, float] = {exponent: score(10**exponent) for exponent in range(-6, 7, 2)}
    step = 1.0
    while step >= 1 / 8:
        best = max(scores, key=lambda exponent: (scores[exponent], exponent))
        for exponent in (best - step, best + step):
            if -6 <= exponent <= 6 and exponent not in scores:
                scores[exponent] = score(10**exponent)
        step /= 2
    return 10 ** max(scores, key=lambda exponent: (scores[exponent], exponent))


PAPER = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"
flags = {"chooses": True, "features": True, "text": False}
LINEAR_PROBE = Method("linear-probe", "Linear probe", PAPER, fit, LinearProbeRecipe, FITTED, **flags)
