"""LP++ (Huang et al., A Surprisingly Strong Linear Probe for Few-Shot CLIP, CVPR 2024): a linear probe blended with
the text features by learned class-wise weights, with data-driven step sizes and initialisation.

With image features f (B, E) and the zero-shot classifier W (C, E):

    logits_c = f v_c + b_c + alpha_c f W_c^T                             (B,)

Given n training features F (n, E), v_c starts at their sum over class c, b at 0, and every alpha_c at 250 times the
mean over classes of the mean of f W_c^T over class c. Full-batch gradient descent on the cross-entropy, block by
block:

    v, b     step size 4 n / lambda_max(F^T F), momentum 0.9, every epoch
    alpha    step size n / (4 max over c of the sum of (f W_c^T)^2), every tenth epoch

The epoch of highest accuracy on the few-shot validation images is used, the latest on a tie; without validation
images, the last epoch.
"""

import torch
from torch.nn import functional as F

from dcp_zoo.model.classifier import class_means
from dcp_zoo.training.methods.base import FeatureClassifier, Task

ALPHA_EVERY = 10  # epochs


class LPPlusPlus(FeatureClassifier):
    """See the module. `weight` (C, E) holds v, `bias` (C,) b, and `alpha` is (C,)."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        source, classes, device = task.plain_train, len(task.classnames), task.clip.device
        x, self.labels = self.features(source), source.labels.to(device)
        self.x, self.text = x.to(device), task.text
        counts = torch.bincount(source.labels, minlength=classes)[:, None]
        self.weight = (class_means(x, source.labels, classes) * counts).to(self.x)
        self.bias = torch.zeros(classes, device=device)
        own = class_means((self.x @ self.text.T).cpu(), source.labels, classes).diagonal()
        self.alpha = torch.full_like(self.bias, task.recipe.alpha * own.mean().item())
        self.rates = step_sizes(self.x, self.text)

    def linear(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight + self.alpha[:, None] * self.text, self.bias

    def fit(self, task: Task) -> "LPPlusPlus":
        """Train, and restore the best epoch."""
        trained = [self.weight, self.bias, self.alpha]
        velocity, best, kept = [torch.zeros_like(p) for p in trained[:2]], -1, 0
        val = None if task.val is None else self.features(task.val).to(self.x)
        for epoch in self.progress(range(task.recipe.epochs), "epochs", task.recipe.epochs):
            self.step(epoch, velocity, task.recipe.momentum)
            if val is None or task.val is None:
                continue
            hits = int((self.classify(val).argmax(-1).cpu() == task.val.labels).sum())
            if hits >= best:
                best, kept, found = hits, epoch, [p.clone() for p in trained]
        if val is not None:
            self.weight, self.bias, self.alpha = found
            self.info = {"epoch": kept + 1}
        return self

    @torch.no_grad()
    def step(self, epoch: int, velocity: list[torch.Tensor], momentum: float) -> None:
        """Update v and b, and alpha in every tenth epoch, by gradients at the same point."""
        error = (self.classify(self.x).softmax(-1) - F.one_hot(self.labels, len(self.bias))) / len(self.x)  # (n, C)
        for p, v, gradient in zip((self.weight, self.bias), velocity, (error.T @ self.x, error.sum(0)), strict=True):
            v.mul_(momentum).add_(gradient)
            p.sub_(self.rates[0] * v)
        if (epoch + 1) % ALPHA_EVERY == 0:
            self.alpha.sub_(self.rates[1] * (error * (self.x @ self.text.T)).sum(0))


def step_sizes(x: torch.Tensor, text: torch.Tensor) -> tuple[float, float]:
    """Step sizes of v and b, and of alpha, from Lipschitz constants of the loss: x (n, E), text (C, E)."""
    x, text = x.cpu().double(), text.cpu().double()
    largest = torch.linalg.eigvalsh(x.T @ x)[-1].item()
    return 4 * len(x) / largest, len(x) / (4 * (x @ text.T).square().sum(0).max().item())


def fit(task: Task) -> LPPlusPlus:
    return LPPlusPlus(task).fit(task)
