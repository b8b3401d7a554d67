"""Tip-Adapter and Tip-Adapter-F (Zhang et al., ECCV 2022): zero-shot CLIP and a cache of the training images."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from dcp_zoo.insight.zero_shot import zero_shot_classifier
from dcp_zoo.methods.base import FeatureClassifier, Task, encode_images, feature_view, frozen_features, own_budget
from dcp_zoo.model.names import check_classnames
from dcp_zoo.training.loop import seed_everything
from dcp_zoo.training.recipes import BaseRecipe


@dataclass(frozen=True)
class TipAdapterRecipe(BaseRecipe):
    """The paper's; its code searches up to bounds that differ between datasets, here one grid serves for all.

    Attributes:
        augment_epochs: random crops of a training image whose features are averaged into its key. Views that can be
            counted, as with flips alone, are averaged instead.
        alpha, beta: weight of the cache, and sharpness of its similarities, where there are no validation images.
        search_max: with validation images the best of 20 alphas and 40 betas from 0.1 to this is taken.
    """

    augment: str = "crop-flip"
    augment_epochs: int = 10
    alpha: float = 1.0
    beta: float = 1.0
    search_max: float = 50.0


@dataclass(frozen=True)
class TipAdapterFRecipe(TipAdapterRecipe):
    """And for the training of the keys, by AdamW under a cosine over all steps.

    Attributes:
        alpha, beta: while the keys are trained, too.
    """

    lr: float = 1e-3
    eps: float = 1e-4
    batch_size: int = 256
    epochs: int = 20


class TipAdapter(FeatureClassifier):
    """exp(logit_scale) f W^T + alpha exp(-beta (1 - f K^T)) L, with image features f (n, E), the zero-shot classifier
    W (C, E), keys K (NK, E) and one-hot labels L (NK, C) of the training images."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        names = check_classnames(task.classnames)
        self.text = zero_shot_classifier(task.clip, names, task.template)
        self.keys, labels = cache_keys(task)
        self.values = F.one_hot(labels, len(names)).to(self.keys)
        self.alpha, self.beta = task.recipe.alpha, task.recipe.beta

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        return self.clip.logits(features, self.text) + self.alpha * self.cached(features, self.beta)

    def cached(self, features: torch.Tensor, beta: float) -> torch.Tensor:
        """What the cache says: features (n, E) -> (n, C)."""
        return (-beta * (1 - features @ self.keys.T)).exp() @ self.values

    @torch.no_grad()
    def search(self, task: Task) -> "TipAdapter":
        """Choose alpha and beta on the validation images, if there are any; the smallest of equals."""
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
    view = feature_view(task)
    if view.views is not None:
        features = view.views.mean(0)
    else:
        passes = [encode_images(task.clip, view, task.progress) for _ in range(task.recipe.augment_epochs)]
        features = torch.stack(passes).mean(0)
    return F.normalize(features, dim=-1).to(task.clip.device), view.labels.to(task.clip.device)


def grid(largest: float, steps: int) -> list[float]:
    """`steps` values from 0.1 to `largest`, each the same multiple of the one before."""
    return [0.1 * (largest / 0.1) ** (i / (steps - 1)) for i in range(steps)]


def train_keys(model: TipAdapter, task: Task) -> None:
    """Train the keys on the training images; text features and labels stay as they are."""
    recipe, view, generator = task.recipe, feature_view(task), torch.Generator().manual_seed(task.seed)
    model.keys.requires_grad_()
    optimizer = torch.optim.AdamW([model.keys], recipe.lr, eps=recipe.eps)
    steps = recipe.epochs * max(1, len(view.items) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = (batch for _ in range(recipe.epochs) for batch in view.batches(recipe.batch_size, generator))
    for inputs, labels in task.progress(batches, "training", steps):
        features = inputs.to(model.keys.device)
        if features.ndim > 2:
            with torch.no_grad():
                features = task.clip.encode_image(features, patches=view.patches)
        loss = F.cross_entropy(model.classify(features), labels.to(features.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.keys.requires_grad_(False)


def recipe(model: str, dataset: str, shots: int, protocol: str) -> TipAdapterRecipe:
    return TipAdapterRecipe(augment=own_budget(model, dataset).get("augment", "crop-flip"))


def recipe_f(model: str, dataset: str, shots: int, protocol: str) -> TipAdapterFRecipe:
    return TipAdapterFRecipe(augment=own_budget(model, dataset).get("augment", "crop-flip"))


def fit(task: Task) -> TipAdapter:
    seed_everything(task.seed)
    return TipAdapter(task).search(task)


def fit_f(task: Task) -> TipAdapter:
    seed_everything(task.seed)
    model = TipAdapter(task)
    train_keys(model, task)
    return model.search(task)
