"""Linear classifiers that are trained on the features of the frozen image tower."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.model.linear_head import LinearHead
from dcp_zoo.model.names import check_classnames
from dcp_zoo.model.text_probe import Linear, class_means
from dcp_zoo.training.fit_probe import FOLDS
from dcp_zoo.training.methods.base import Task, train_epochs
from dcp_zoo.training.recipes import CROSS_VALIDATION, batch_sizes

# where there is nothing to choose by: the CLIP paper's on ImageNet, 0.316, for features whose norm of about 10 is now 1
DEFAULT_C = 31.6


def fit_linear(task: Task) -> LinearHead:
    """Logistic regression, as in the CLIP paper (Radford et al., 2021)."""
    x, y, max_iter = task.train_features.cpu(), task.train_labels, task.recipe.max_iter
    c, chosen = task.recipe.C or DEFAULT_C, {}
    if task.recipe.C is None and task.val is not None:
        val, labels = task.features(task.val).cpu(), task.val.labels
        c = search(lambda value: regression(x, y, value, max_iter).score(val.numpy(), labels.numpy()))
    elif task.recipe.C is None and (folds := min(FOLDS, int(torch.bincount(y).max()))) > 1:
        c = search(lambda value: cross_validated(x, y, value, max_iter, folds))
        chosen = {"selection": CROSS_VALIDATION}
    fitted = regression(x, y, c, max_iter)
    weight, bias = (torch.from_numpy(part).float() for part in (fitted.coef_, fitted.intercept_))
    if len(bias) == 1:  # of two classes, scikit-learn has only the second's logit
        weight, bias = torch.cat([0 * weight, weight]), torch.cat([0 * bias, bias])
    head = task.linear_head(weight.to(task.clip.device), bias.to(task.clip.device))
    head.info = {"C": c, **chosen}
    return head


def regression(x: Tensor, y: Tensor, c: float, max_iter: int) -> Any:
    """Multinomial logistic regression on features x (n, E) and labels y (n,)."""
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():  # about no convergence with the weakest penalties, and few images at 1 shot
        warnings.simplefilter("ignore", UserWarning)
        return LogisticRegression(C=c, max_iter=max_iter).fit(x.numpy(), y.numpy())


def cross_validated(x: Tensor, y: Tensor, c: float, max_iter: int, folds: int) -> float:
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


ALPHA_EVERY = 10  # epochs


class LPPlusPlus:
    """LP++: a linear probe blended with the text features by learned class-wise weights, whose step sizes and initial
    values follow from the data.

    With image features f (B, E) and the zero-shot classifier W (C, E):

        logits_c = f v_c + b_c + alpha_c f W_c^T                             (B,)

    Given n training features F (n, E), v_c starts at their sum over class c, b at 0, and every alpha_c at 250 times the
    mean over classes of the mean of f W_c^T over class c. Full-batch gradient descent on the cross-entropy, block by
    block:

        v, b     step size 4 n / lambda_max(F^T F), momentum 0.9, every epoch
        alpha    step size n / (4 max over c of the sum of (f W_c^T)^2), every tenth epoch

    The epoch of highest accuracy on the few-shot validation images is used, the latest on a tie; without validation
    images, the last epoch. `weight` (C, E) holds v, `bias` (C,) b, and `alpha` is (C,).
    """

    def __init__(self, task: Task) -> None:
        classes, device, labels = len(task.classnames), task.clip.device, task.train_labels
        x, self.labels, self.text = task.train_features, labels.to(device), task.text
        counts, self.x = torch.bincount(labels, minlength=classes)[:, None], x
        self.weight = (class_means(x.cpu(), labels, classes) * counts).to(x)
        self.bias = torch.zeros(classes, device=device)
        own = class_means((x @ self.text.T).cpu(), labels, classes).diagonal()
        self.alpha = torch.full_like(self.bias, task.recipe.alpha * own.mean().item())
        self.rates = step_sizes(x, self.text)

    def linear(self) -> Linear:
        return self.weight + self.alpha[:, None] * self.text, self.bias

    def classify(self, features: Tensor) -> Tensor:
        return F.linear(features, *self.linear())

    def fit(self, task: Task) -> dict[str, int]:
        """Train, and restore the best epoch; returns which that is, if there are validation images."""
        trained = [self.weight, self.bias, self.alpha]
        velocity, best, kept, found = [torch.zeros_like(p) for p in trained[:2]], -1, 0, trained
        val = None if task.val is None else task.features(task.val)
        for epoch in task.progress(range(task.recipe.epochs), "epochs", task.recipe.epochs):
            self.step(epoch, velocity, task.recipe.momentum)
            if val is None or task.val is None:
                continue
            hits = int((self.classify(val).argmax(-1).cpu() == task.val.labels).sum())
            if hits >= best:
                best, kept, found = hits, epoch, [p.clone() for p in trained]
        self.weight, self.bias, self.alpha = found
        return {} if val is None else {"epoch": kept + 1}

    @torch.no_grad()
    def step(self, epoch: int, velocity: list[Tensor], momentum: float) -> None:
        """Update v and b, and alpha in every tenth epoch, by gradients at the same point."""
        error = (self.classify(self.x).softmax(-1) - F.one_hot(self.labels, len(self.bias))) / len(self.x)  # (n, C)
        for p, v, gradient in zip((self.weight, self.bias), velocity, (error.T @ self.x, error.sum(0)), strict=True):
            v.mul_(momentum).add_(gradient)
            p.sub_(self.rates[0] * v)
        if (epoch + 1) % ALPHA_EVERY == 0:
            self.alpha.sub_(self.rates[1] * (error * (self.x @ self.text.T)).sum(0))


def step_sizes(x: Tensor, text: Tensor) -> tuple[float, float]:
    """Step sizes of v and b, and of alpha, from Lipschitz constants of the loss: x (n, E), text (C, E)."""
    x, text = x.cpu().double(), text.cpu().double()
    largest = torch.linalg.eigvalsh(x.T @ x)[-1].item()
    return 4 * len(x) / largest, len(x) / (4 * (x @ text.T).square().sum(0).max().item())


def fit_lp_plus_plus(task: Task) -> LinearHead:
    model = LPPlusPlus(task)
    chosen = model.fit(task)
    head = task.linear_head(*model.linear())
    head.info = dict(chosen)
    return head


class CLAP:
    """CLAP: a linear probe initialised with the text features and penalised, class by class, for leaving them.

    With image features f (B, E), s = exp(logit_scale), the text features t_c (E,) of the classes, and prototypes w (C,
    E) initialised to t:

        logits_c = s f w_c^T / |w_c|                                         (B,)
        loss     = cross-entropy + mean over c of a_c |w_c - t_c|^2

    a_c is the mean zero-shot probability of class c over its own training images: the better zero-shot CLIP is, the
    stronger the penalty. t is normalised, as in the paper; the authors' code takes the text tower's output as it is
    (`unit=False`). Rows are twenty random crops of each training image, or for the miniature, which only flips, both
    views; an epoch draws as many batches of rows as there are batches of images. No model selection: the last epoch is
    used. `start` and `prototypes` are (C, E), `strength` (C,) holds the a_c.
    """

    def __init__(self, task: Task) -> None:
        self.clip, names = task.clip, check_classnames(task.classnames)
        features = task.augmented_features(task.recipe.augment_epochs)  # (V, n, E)
        self.rows, self.labels = features.flatten(0, 1), task.train_labels.repeat(len(features))
        with torch.no_grad():
            text = self.clip.encode_sentences(names, task.template)
            self.start = F.normalize(text, dim=-1) if task.recipe.unit else text
            self.prototypes = nn.Parameter(self.start.clone(), requires_grad=False)
            chunks = self.rows.split(1000)
            probabilities = torch.cat([self.classify(chunk.to(self.start)).softmax(-1).cpu() for chunk in chunks])
        own = probabilities.gather(1, self.labels[:, None])  # (V n, 1) of each row's own class
        self.strength = class_means(own, self.labels, len(names))[:, 0].to(self.start)

    @property
    def text(self) -> Tensor:
        """The normalised prototypes (C, E)."""
        return F.normalize(self.prototypes, dim=-1)

    def classify(self, features: Tensor) -> Tensor:
        return self.clip.logits(features, self.text)

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        distance = (self.prototypes - self.start).square().sum(-1)  # (C,)
        return F.cross_entropy(self.classify(features), labels) + (self.strength * distance).mean()

    def fit(self, task: Task) -> None:
        recipe = task.recipe
        per_epoch = len(batch_sizes(len(task.train_images.items), recipe.batch_size, recipe.drop_last))
        batches = self.batches(recipe.batch_size, per_epoch, task.seed)
        train_epochs(task, [self.prototypes.requires_grad_()], self.loss, batches, per_epoch)
        self.prototypes.requires_grad_(False)

    def batches(self, size: int, per_epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """An endless stream of random rows and their labels, no row twice in an epoch."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.rows), generator=generator)
            for batch in order[: size * per_epoch].split(size):
                yield self.rows[batch], self.labels[batch]


def fit_clap(task: Task) -> LinearHead:
    model = CLAP(task)
    model.fit(task)
    return task.text_head(model.text)
