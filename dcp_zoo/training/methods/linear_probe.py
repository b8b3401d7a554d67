"""Linear probe: logistic regression on frozen image features, as in the CLIP paper (Radford et al., 2021)."""

import warnings
from collections.abc import Callable
from typing import Any

import torch

from dcp_zoo.training.methods.base import FeatureClassifier, Task
from dcp_zoo.training.recipes import CROSS_VALIDATION
from dcp_zoo.training.stage import FOLDS

# where there is nothing to choose by: the CLIP paper's on ImageNet, 0.316, for features whose norm of about 10 is now 1
DEFAULT_C = 31.6


class LinearProbe(FeatureClassifier):
    """`weight` (C, E) and `bias` (C,) are those of the regression."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        train, max_iter = task.plain_train, task.recipe.max_iter
        x, y = self.features(train), train.labels
        c, chosen = task.recipe.C or DEFAULT_C, {}
        if task.recipe.C is None and task.val is not None:
            val, labels = self.features(task.val), task.val.labels
            c = search(lambda value: regression(x, y, value, max_iter).score(val.numpy(), labels.numpy()))
        elif task.recipe.C is None and (folds := min(FOLDS, int(torch.bincount(y).max()))) > 1:
            c = search(lambda value: cross_validated(x, y, value, max_iter, folds))
            chosen = {"selection": CROSS_VALIDATION}
        fitted = regression(x, y, c, max_iter)
        weight, bias = (torch.from_numpy(part).float() for part in (fitted.coef_, fitted.intercept_))
        if len(bias) == 1:  # of two classes, scikit-learn has only the second's logit
            weight, bias = torch.cat([0 * weight, weight]), torch.cat([0 * bias, bias])
        self.weight, self.bias = weight.to(self.clip.device), bias.to(self.clip.device)
        self.info = {"C": c, **chosen}

    def linear(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight, self.bias


def regression(x: torch.Tensor, y: torch.Tensor, c: float, max_iter: int) -> Any:
    """Multinomial logistic regression on features x (n, E) and labels y (n,)."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():  # about no convergence with the weakest penalties, and few images at 1 shot
        warnings.simplefilter("ignore", UserWarning)
        return LogisticRegression(C=c, max_iter=max_iter).fit(x.numpy(), y.numpy())


def cross_validated(x: torch.Tensor, y: torch.Tensor, c: float, max_iter: int, folds: int) -> float:
    """Mean accuracy on training images that were left out."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return cross_val_score(LogisticRegression(C=c, max_iter=max_iter), x.numpy(), y.numpy(), cv=folds).mean()


def search(score: Callable[[float], float]) -> float:
    """The C between 1e-6 and 1e6 with the highest score; ties go to the largest: a weaker penalty is better calibrated.
    As in the CLIP paper: seven values first, then the interval around the best is halved until there are eight steps
    per decade."""
    scores: dict[float, float] = {exponent: score(10**exponent) for exponent in range(-6, 7, 2)}
    step = 1.0
    while step >= 1 / 8:
        best = max(scores, key=lambda exponent: (scores[exponent], exponent))
        for exponent in (best - step, best + step):
            if -6 <= exponent <= 6 and exponent not in scores:
                scores[exponent] = score(10**exponent)
        step /= 2
    return 10 ** max(scores, key=lambda exponent: (scores[exponent], exponent))


fit = LinearProbe
