"""GDA (Wang et al., A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, ICLR 2024): a closed-form
classifier of Gaussian classes with a shared covariance, added to zero-shot CLIP.

With image features f (B, E), the zero-shot classifier W (C, E), s = exp(logit_scale), and n training features with
class means m_c (E,) and covariance S (E, E) around these means:

    P = E pinv((n - 1) S + tr(S) I)                                      (E, E)
    logits_c = s f W_c^T + alpha (f P m_c - m_c P m_c / 2)               (B,)

As in the authors' code, each augmented view of an image is a separate row: ten random crops, or for the miniature,
which only flips, both views. alpha is chosen from 1e-4, 1e-3, .., 100 by accuracy on the few-shot validation images,
the smallest on a tie. The paper needs these; without them the training images take their place, in folds, and if a
class has only one image, the Gaussian part gets half the spread of the text logits on the training images.
"""

import torch

from dcp_zoo.model.classifier import Linear, class_means, shared_precision
from dcp_zoo.training.methods.base import FeatureClassifier, Task, augmented_features, most_accurate
from dcp_zoo.training.recipes import CROSS_VALIDATION
from dcp_zoo.training.stage import FOLDS, within_class

ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


class GDA(FeatureClassifier):
    """See the module. `weight` (C, E) and `bias` (C,) are the Gaussian part."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.uses_text = task.recipe.text
        if self.uses_text:
            self.text = task.text
        features = augmented_features(task, task.recipe.augment_epochs)  # (V, n, E)
        labels, classes = task.train_images.labels, len(task.classnames)
        gaussian = gaussian_discriminant(features.flatten(0, 1), labels.repeat(len(features)), classes)
        self.weight, self.bias = (t.to(self.clip.device) for t in gaussian)
        self.alpha, chosen = 1.0 if task.recipe.alpha is None else task.recipe.alpha, {}
        if task.recipe.alpha is None and self.uses_text:
            if task.val is not None:
                val = self.features(task.val)
                self.alpha = self.search(val, val @ self.weight.cpu().T + self.bias.cpu(), task.val.labels)
            elif torch.bincount(labels).min() > 1:
                scores = out_of_fold(features.cpu(), labels, classes)
                self.alpha, chosen = self.search(features[0].cpu(), scores, labels), {"selection": CROSS_VALIDATION}
            else:
                plain = features[0].to(self.weight)
                spread = (plain @ self.weight.T + self.bias).std()
                self.alpha = (self.clip.logits(plain, self.text).std() / 2 / spread.clamp(min=1e-6)).item()
        self.info = {"alpha": self.alpha, **chosen}

    def linear(self) -> Linear:
        weight, bias = self.alpha * self.weight, self.alpha * self.bias
        if not self.uses_text:
            return weight, bias
        text, offset = self.clip.scaled(self.text)
        return text + weight, offset + bias

    @torch.no_grad()
    def search(self, features: torch.Tensor, gaussian: torch.Tensor, labels: torch.Tensor) -> float:
        """The alpha of highest accuracy, the smallest on a tie: features (n, E), Gaussian scores (n, C), labels."""
        zero_shot = self.clip.logits(features.to(self.clip.device), self.text).cpu()
        return most_accurate(((alpha, zero_shot + alpha * gaussian) for alpha in ALPHAS), labels)


def out_of_fold(views: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Gaussian scores (n, C) of training images from fits without them: views (V, n, E), labels (n,), at least two of
    each class."""
    scores, position = torch.zeros(len(labels), classes), within_class(labels)
    folds = min(FOLDS, int(torch.bincount(labels).min()))
    for fold in range(folds):
        kept = position % folds != fold
        weight, bias = gaussian_discriminant(views[:, kept].flatten(0, 1), labels[kept].repeat(len(views)), classes)
        scores[~kept] = views[0, ~kept] @ weight.T + bias
    return scores


def gaussian_discriminant(features: torch.Tensor, labels: torch.Tensor, classes: int) -> Linear:
    """The linear classifier of equally likely Gaussian classes with a shared covariance, from features (n, E), where n
    may be smaller than E, and labels (n,): weight (C, E), whose rows are m_c P, and bias (C,), -m_c P m_c / 2. Computed
    in float64 on the CPU. ZooError for a class without features."""
    rows, labels = features.detach().cpu(), labels.cpu()
    means = class_means(rows, labels, classes)
    weight = means @ shared_precision(rows, labels, means)
    return weight.to(features), -(weight * means).sum(-1).to(features) / 2


fit = GDA
