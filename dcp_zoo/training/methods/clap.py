"""CLAP (Silva-Rodriguez et al., A Closer Look at the Few-Shot Adaptation of Large Vision-Language Models, CVPR 2024):
a linear probe initialised with the text features and penalised, class by class, for leaving them.

With image features f (B, E), s = exp(logit_scale), the text features t_c (E,) of the classes, and prototypes w (C, E)
initialised to t:

    logits_c = s f w_c^T / |w_c|                                         (B,)
    loss     = cross-entropy + mean over c of a_c |w_c - t_c|^2

a_c is the mean zero-shot probability of class c over its own training images: the better zero-shot CLIP is, the
stronger the penalty. t is normalised, as in the paper; the authors' code takes the text tower's output as it is
(`unit=False`). Rows are twenty random crops of each training image, or for the miniature, which only flips, both views;
an epoch draws as many batches of rows as there are batches of images. No model selection: the last epoch is used.
"""

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn import functional as F

from dcp_zoo.model.classifier import class_means
from dcp_zoo.model.names import check_classnames
from dcp_zoo.training.methods.base import CosineClassifier, Task, augmented_features
from dcp_zoo.training.methods.tuning import train_epochs
from dcp_zoo.training.recipes import batch_sizes


class CLAP(CosineClassifier):
    """See the module. `start` and `prototypes` are (C, E), `strength` (C,) holds the a_c."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        names = check_classnames(task.classnames)
        features = augmented_features(task, task.recipe.augment_epochs)  # (V, n, E)
        self.rows, self.labels = features.flatten(0, 1), task.train_images.labels.repeat(len(features))
        with torch.no_grad():
            text = self.clip.encode_sentences(names, task.template)
            self.start = F.normalize(text, dim=-1) if task.recipe.unit else text
            self.prototypes = nn.Parameter(self.start.clone(), requires_grad=False)
            chunks = self.rows.split(1000)
            probabilities = torch.cat([self.classify(chunk.to(self.start)).softmax(-1).cpu() for chunk in chunks])
        own = probabilities.gather(1, self.labels[:, None])  # (V n, 1) of each row's own class
        self.strength = class_means(own, self.labels, len(names))[:, 0].to(self.start)

    @property
    def text(self) -> torch.Tensor:  # type: ignore[override]
        return F.normalize(self.prototypes, dim=-1)

    def loss(self, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        distance = (self.prototypes - self.start).square().sum(-1)  # (C,)
        return F.cross_entropy(self.classify(features), labels) + (self.strength * distance).mean()

    def fit(self, task: Task) -> "CLAP":
        recipe = task.recipe
        per_epoch = len(batch_sizes(len(task.train_images.items), recipe.batch_size, recipe.drop_last))
        batches = self.batches(recipe.batch_size, per_epoch, task.seed)
        train_epochs(task, [self.prototypes.requires_grad_()], self.loss, batches, per_epoch)
        self.prototypes.requires_grad_(False)
        return self

    def batches(self, size: int, per_epoch: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """An endless stream of random rows and their labels, no row twice in an epoch."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.rows), generator=generator)
            for batch in order[: size * per_epoch].split(size):
                yield self.rows[batch], self.labels[batch]


def fit(task: Task) -> CLAP:
    return CLAP(task).fit(task)
