"""LP++ (Huang et al., CVPR 2024): a linear probe blended with text features by learned weights per class.

With image features f (B, E) and the zero-shot classifier W (C, E):

    logits_c = f v_c + b_c + alpha_c f W_c^T                                 (B,)

Given n training features F (n, E), v_c starts at their sum over class c, b at 0, and every alpha_c at 250 times the
mean over classes of the mean of f W_c^T over class c. Full-batch gradient descent on the cross-entropy, block by block,
with the gradients at the same point:

    v, b     step size 4 n / lambda_max(F^T F), momentum 0.9, every epoch
    alpha    step size n / (4 max over c of the sum of (f W_c^T)^2), every tenth epoch

The epoch of highest accuracy on the few-shot validation images is used, the latest on a tie; without any, the last.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.clip import Linear
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.probe.estimates import class_means
from dcp_zoo.training.methods.base import FITTED, Method, Task
from dcp_zoo.training.recipes import BaseRecipe, count, option

ALPHA_EVERY = 10  # epochs


@dataclass(frozen=True)
class LPPlusPlusRecipe(BaseRecipe):
    epochs: int = count(300, "steps of v and b, each on all training images; alpha takes a tenth of them")
    momentum: float = option(0.9, "momentum of v and b")
    alpha: float = option(250.0, "alpha at first, in multiples of the mean cosine of images and their class names")


@torch.no_grad()
def fit(task: Task) -> LinearHead:
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


PAPER = "Huang et al., LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP, CVPR 2024"
LP_PLUS_PLUS = Method("lp-plus-plus", "LP++", PAPER, fit, LPPlusPlusRecipe, FITTED, chooses=True, features=True)
