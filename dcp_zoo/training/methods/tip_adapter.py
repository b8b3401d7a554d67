"""Tip-Adapter and Tip-Adapter-F (Zhang et al., ECCV 2022): zero-shot CLIP plus a cache of the training images."""

import torch
from torch.nn import functional as F

from dcp_zoo.training.loop import cosine, descend
from dcp_zoo.training.methods.base import (
    FeatureClassifier,
    Task,
    augmented_features,
    feature_view,
    most_accurate,
)
from dcp_zoo.training.methods.tuning import as_features, shuffled
from dcp_zoo.training.recipes import batch_sizes
from dcp_zoo.training.state import TrainingState


class TipAdapter(FeatureClassifier):
    """exp(logit_scale) f W^T + alpha exp(-beta (1 - f K^T)) L, with image features f (n, E), the zero-shot classifier
    W (C, E), keys K (NK, E), the normalised mean features of the views of each training image, and their one-hot labels
    L (NK, C)."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.text = task.text
        keys = F.normalize(augmented_features(task, task.recipe.augment_epochs).mean(0), dim=-1)
        self.keys = keys.to(self.clip.device)
        self.values = F.one_hot(task.train_images.labels, len(task.classnames)).to(self.keys)
        self.alpha, self.beta = task.recipe.alpha, task.recipe.beta

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return self.clip.logits(features, self.text) + self.alpha * self.cached(features, self.beta)

    def cached(self, features: torch.Tensor, beta: float) -> torch.Tensor:
        """Logits of the cache: features (n, E) -> (n, C)."""
        return (-beta * (1 - features @ self.keys.T)).exp() @ self.values

    @torch.no_grad()
    def search(self, task: Task) -> "TipAdapter":
        """Choose alpha and beta on the validation images, if there are any; ties go to the smallest values."""
        if task.val is not None:
            features = self.features(task.val).to(self.clip.device)
            zero_shot = self.clip.logits(features, self.text)
            alphas, betas = (grid(task.recipe.search_max, steps) for steps in (20, 40))
            candidates = (
                ((alpha, beta), zero_shot + alpha * cached)
                for beta in self.progress(betas, "alpha and beta", len(betas))
                for cached in [self.cached(features, beta)]
                for alpha in alphas
            )
            self.alpha, self.beta = most_accurate(candidates, task.val.labels)
        self.info = {"alpha": round(self.alpha, 4), "beta": round(self.beta, 4)}
        return self


def grid(largest: float, steps: int) -> list[float]:
    """`steps` values from 0.1 to `largest`, spaced geometrically."""
    return [0.1 * (largest / 0.1) ** (i / (steps - 1)) for i in range(steps)]


def train_keys(model: TipAdapter, task: Task) -> None:
    """Train the keys on the training images; text features and labels stay fixed."""
    recipe, view = task.recipe, feature_view(task)
    model.keys.requires_grad_()
    optimizer = torch.optim.AdamW([model.keys], recipe.lr, eps=recipe.eps)
    steps = recipe.epochs * len(batch_sizes(len(view.items), recipe.batch_size, drop_last=True))

    def loss(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model.classify(as_features(task.clip, inputs, view.patches)).float(), labels)

    state, batches = TrainingState().begin(optimizer, task.precision), shuffled(view, recipe.batch_size, task.seed)
    descend(state, loss, batches, cosine(recipe.lr, steps), steps, task.progress)
    model.keys.requires_grad_(False)


def fit(task: Task) -> TipAdapter:
    return TipAdapter(task).search(task)


def fit_f(task: Task) -> TipAdapter:
    model = TipAdapter(task)
    train_keys(model, task)
    return model.search(task)
