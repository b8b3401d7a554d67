"""Tip-Adapter and Tip-Adapter-F (Zhang et al., ECCV 2022): zero-shot CLIP plus a cache of the training images."""

import torch
from torch.nn import functional as F

from dcp_zoo.model.names import check_classnames
from dcp_zoo.training.device import seed_everything
from dcp_zoo.training.loop import cosine, descend
from dcp_zoo.training.methods.base import (
    FeatureClassifier,
    Task,
    augmented_features,
    feature_view,
    frozen_features,
)
from dcp_zoo.training.methods.tuning import as_features, shuffled
from dcp_zoo.training.recipes import batch_sizes
from dcp_zoo.training.state import TrainingState


class TipAdapter(FeatureClassifier):
    """exp(logit_scale) f W^T + alpha exp(-beta (1 - f K^T)) L, with image features f (n, E), the zero-shot classifier
    W (C, E), keys K (NK, E) and one-hot labels L (NK, C) of the training images."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        names = check_classnames(task.classnames)
        self.text = task.clip.zero_shot_classifier(names, task.template)
        self.keys, labels = cache_keys(task)
        self.values = F.one_hot(labels, len(names)).to(self.keys)
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
            features = frozen_features(self.clip, task.val, self.progress)[0].to(self.clip.device)
            labels, zero_shot = task.val.labels.to(features.device), self.clip.logits(features, self.text)
            alphas, betas = (grid(task.recipe.search_max, steps) for steps in (20, 40))
            best = -1.0
            for beta in self.progress(betas, "alpha and beta", len(betas)):
                cached = self.cached(features, beta)
                for alpha in alphas:
                    hits = ((zero_shot + alpha * cached).argmax(-1) == labels).float().mean().item()
                    if hits > best:
                        best, self.alpha, self.beta = hits, alpha, beta
        self.info = {"alpha": round(self.alpha, 4), "beta": round(self.beta, 4)}
        return self


def cache_keys(task: Task) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised mean features (NK, E) of the augmented training images, and their labels (NK,)."""
    features = augmented_features(task, task.recipe.augment_epochs).mean(0)
    return F.normalize(features, dim=-1).to(task.clip.device), task.train_images.labels.to(task.clip.device)


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
    seed_everything(task.seed)
    return TipAdapter(task).search(task)


def fit_f(task: Task) -> TipAdapter:
    seed_everything(task.seed)
    model = TipAdapter(task)
    train_keys(model, task)
    return model.search(task)
