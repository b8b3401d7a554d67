"""Linear classifiers that are trained on the features of the frozen image tower."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.model.classes import check_classnames
from dcp_zoo.model.clip import Linear
from dcp_zoo.model.head import LinearHead
from dcp_zoo.model.text_probe.estimates import class_means
from dcp_zoo.model.text_probe.fit import FOLDS
from dcp_zoo.training.loop import build_optimizer
from dcp_zoo.training.methods.base import Task, minimise
from dcp_zoo.training.recipes import CROSS_VALIDATION, batch_sizes

# where there is nothing to choose by: the CLIP paper's on ImageNet, 0.316, for features whose norm of about 10 is now 1
DEFAULT_C = 31.6


def fit_linear(task: Task) -> LinearHead:
    """Logistic regression, as in the CLIP paper (Radford et al., 2021)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_score

    x, y, c, chosen = task.train_features.cpu().numpy(), task.train_labels, task.recipe.C or DEFAULT_C, {}
    val = task.val if task.recipe.C is None else None
    known = None if val is None else (task.features(val).cpu().numpy(), val.labels)
    regression = partial(LogisticRegression, max_iter=task.recipe.max_iter)
    with warnings.catch_warnings():  # about no convergence with the weakest penalties, and few images at 1 shot
        warnings.simplefilter("ignore", UserWarning)
        if known:
            c = search(lambda value: regression(C=value).fit(x, y).score(*known))
        elif task.recipe.C is None and (folds := min(FOLDS, int(torch.bincount(y).max()))) > 1:
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


ALPHA_EVERY = 10  # epochs


@torch.no_grad()
def fit_lp_plus_plus(task: Task) -> LinearHead:
    """LP++: a linear probe blended with text features by learned weights per class; step sizes follow from the data.

    With image features f (B, E) and the zero-shot classifier W (C, E):

        logits_c = f v_c + b_c + alpha_c f W_c^T                             (B,)

    Given n training features F (n, E), v_c starts at their sum over class c, b at 0, and every alpha_c at 250 times the
    mean over classes of the mean of f W_c^T over class c. Full-batch gradient descent on the cross-entropy, block by
    block, with the gradients at the same point:

        v, b     step size 4 n / lambda_max(F^T F), momentum 0.9, every epoch
        alpha    step size n / (4 max over c of the sum of (f W_c^T)^2), every tenth epoch

    The epoch of highest accuracy on the few-shot validation images is used, the latest on a tie; without any, the last.
    """
    recipe, classes, labels = task.recipe, len(task.classnames), task.train_labels
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


def fit_clap(task: Task) -> LinearHead:
    """CLAP: a linear probe initialised with the text features and penalised, class by class, for leaving them.

    With image features f (B, E), s = exp(logit_scale), text features t_c (E,), and prototypes w (C, E), at first t:

        logits_c = s f w_c^T / |w_c|                                         (B,)
        loss     = cross-entropy + mean over c of a_c |w_c - t_c|^2

    a_c is the mean zero-shot probability of class c over its own training images: the better zero-shot CLIP is, the
    stronger the penalty. t is normalised, as in the paper, unless `unit=False`. Rows are twenty random crops of each
    image, or for the miniature both views, in as many batches as there are of images. The last epoch is used.
    """
    recipe, clip, names = task.recipe, task.clip, check_classnames(task.classnames)
    features = task.augmented_features(recipe.augment_epochs)  # (V, n, E)
    rows, labels = features.flatten(0, 1), task.train_labels.repeat(len(features))
    start = clip.encode_sentences(names, task.texts)
    start = F.normalize(start, dim=-1) if recipe.unit else start
    prototypes = start.clone()

    def classify(features: Tensor) -> Tensor:
        return clip.logits(features, F.normalize(prototypes, dim=-1))

    def loss(features: Tensor, labels: Tensor) -> Tensor:
        distance = (prototypes - start).square().sum(-1)  # (C,)
        return F.cross_entropy(classify(features), labels) + (strength * distance).mean()

    probabilities = torch.cat([classify(chunk.to(start)).softmax(-1).cpu() for chunk in rows.split(1000)])
    own = probabilities.gather(1, labels[:, None])  # (V n, 1) of each row's own class
    strength = class_means(own, labels, len(names))[:, 0].to(start)  # (C,), the a_c
    per_epoch = len(batch_sizes(len(task.train_images.items), recipe.batch_size, recipe.drop_last))
    batches = random_rows(rows, labels, recipe.batch_size, per_epoch, task.seed)
    optimizer, steps = build_optimizer(recipe, [prototypes.requires_grad_()]), recipe.num_epochs * per_epoch
    minimise(task, loss, optimizer, batches, lambda step: recipe.lr_at(step // per_epoch), steps)
    return task.text_head(F.normalize(prototypes.detach(), dim=-1))


def random_rows(rows: Tensor, labels: Tensor, size: int, per_epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless stream of batches of rows and their labels, no row twice in an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for batch in order[: size * per_epoch].split(size):
            yield rows[batch], labels[batch]
