"""GDA (Wang et al., A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, ICLR 2024): a closed-form
classifier of Gaussian classes with a shared covariance, added to zero-shot CLIP.

With image features f (B, E), the zero-shot classifier W (C, E), s = exp(logit_scale), and n training features with
class means m_c (E,) and covariance S (E, E) around these means:

    P = E pinv((n - 1) S + tr(S) I)                                      (E, E)
    logits_c = s f W_c^T + alpha (f P m_c - m_c P m_c / 2)               (B,)

As in the authors' code, each augmented view of an image is a separate row: ten random crops, or for the miniature,
which only flips, both views. alpha is chosen from 1e-4, 1e-3, .., 100 by accuracy on the few-shot validation images,
the smallest on a tie. The paper needs these; without them it is estimated on the training images by cross-validation,
see `dcp_zoo.training.stage`.
"""

import torch

from dcp_zoo.model.classifier import gaussian_discriminant
from dcp_zoo.training.methods.base import FeatureClassifier, Task, augmented_features, most_accurate
from dcp_zoo.training.recipes import CROSS_VALIDATION
from dcp_zoo.training.sources import ImageSource
from dcp_zoo.training.stage import estimate_weights

ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


class GDA(FeatureClassifier):
    """See the module. `weight` (C, E) and `bias` (C,) are the Gaussian part."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.uses_text = task.recipe.text
        if self.uses_text:
            self.text = task.text
        features = augmented_features(task, task.recipe.augment_epochs)  # (V, n, E)
        labels = task.train_images.labels.repeat(len(features))
        gaussian = gaussian_discriminant(features.flatten(0, 1), labels, len(task.classnames))
        self.weight, self.bias = (t.to(self.clip.device) for t in gaussian)
        self.alpha = 1.0 if task.recipe.alpha is None else task.recipe.alpha
        chosen = {}
        if task.recipe.alpha is None and self.uses_text and task.val is not None:
            self.alpha = self.search(task.val)
        elif task.recipe.alpha is None and self.uses_text:
            self.alpha, chosen = self.estimate(features, labels), {"selection": CROSS_VALIDATION}
        self.info = {"alpha": self.alpha, **chosen}

    def linear(self) -> tuple[torch.Tensor, torch.Tensor]:
        weight, bias = self.alpha * self.weight, self.alpha * self.bias
        if not self.uses_text:
            return weight, bias
        text, offset = self.clip.scaled(self.text)
        return text + weight, offset + bias

    @torch.no_grad()
    def estimate(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        """alpha from the training features (V, n, E) and their labels (V n,), by cross-validation."""
        plain, labels = features[0].to(self.weight), labels[: features.shape[1]]
        scale = (plain @ self.weight.T + self.bias).std().item()
        text = self.clip.logits(plain, self.text).cpu()
        u, v = estimate_weights(text, features, labels)
        return v / (u * scale)

    @torch.no_grad()
    def search(self, val: ImageSource) -> float:
        """The alpha of highest accuracy on the validation images, the smallest on a tie."""
        features = self.features(val).to(self.clip.device)
        zero_shot, gaussian = self.clip.logits(features, self.text), features @ self.weight.T + self.bias
        return most_accurate(((alpha, zero_shot + alpha * gaussian) for alpha in ALPHAS), val.labels)


fit = GDA
