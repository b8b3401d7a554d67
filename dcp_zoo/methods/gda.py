"""GDA (Wang et al., A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, ICLR 2024): a closed-form
classifier of Gaussian classes with a shared covariance, added to zero-shot CLIP.

With image features f (B, E), the zero-shot classifier W (C, E), s = exp(logit_scale), and n training features with
class means m_c (E,) and covariance S (E, E) around these means:

    P = E pinv((n - 1) S + tr(S) I)                                      (E, E)
    logits_c = s f W_c^T + alpha (f P m_c - m_c P m_c / 2)               (B,)

As in the authors' code, each augmented view of an image is a separate row: ten random crops, or for the miniature,
which only flips, both views. alpha is chosen from 1e-4, 1e-3, .., 100 by accuracy on the few-shot validation images,
the smallest on a tie. Without validation images it is 1, which adds the Gaussian log-likelihood unscaled.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dcp_zoo.errors import ZooError
from dcp_zoo.insight.zero_shot import zero_shot_classifier
from dcp_zoo.methods.base import FeatureClassifier, Task, augmented_features, budget_overrides
from dcp_zoo.methods.tuning import check_positive
from dcp_zoo.model.config import option
from dcp_zoo.model.names import check_classnames
from dcp_zoo.training.loop import seed_everything
from dcp_zoo.training.recipes import AUGMENT_HELP, AUGMENTS, BaseRecipe
from dcp_zoo.training.sources import ImageSource

ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
DEFAULT_ALPHA = 1.0
ROUNDING = 1e-10  # a scatter below this fraction of the rows' squared length is float32 rounding, not spread
CHUNK = 8192  # rows converted to float64 at a time


@dataclass(frozen=True)
class GDARecipe(BaseRecipe):
    """The paper's."""

    augment: str = option("crop-flip", AUGMENT_HELP, AUGMENTS)
    augment_epochs: int = option(10, "random crops of each training image; unused by the miniature")
    alpha: float | None = option(None, "weight of the Gaussian part; by default chosen on the validation images")
    text: bool = option(True, "add zero-shot CLIP; false: the Gaussian part alone, with nothing to choose")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "augment_epochs")


class GDA(FeatureClassifier):
    """See the module. `weight` (C, E) and `bias` (C,) are the Gaussian part."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        names, device = check_classnames(task.classnames), task.clip.device
        self.text = zero_shot_classifier(task.clip, names, task.template)
        self.uses_text = task.recipe.text
        features = augmented_features(task, task.recipe.augment_epochs)  # (V, n, E)
        labels = task.train_images.labels.repeat(len(features))
        weight, bias = gaussian_discriminant(features.flatten(0, 1), labels, len(names))
        self.weight, self.bias = weight.to(device), bias.to(device)
        self.alpha = DEFAULT_ALPHA if task.recipe.alpha is None else task.recipe.alpha
        if task.recipe.alpha is None and self.uses_text and task.val is not None:
            self.alpha = self.search(task.val)
        self.info = {"alpha": self.alpha}

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        gaussian = self.alpha * (features @ self.weight.T + self.bias)
        return self.clip.logits(features, self.text) + gaussian if self.uses_text else gaussian

    @torch.no_grad()
    def search(self, val: ImageSource) -> float:
        """The alpha of highest accuracy on the validation images, the smallest on a tie."""
        features = self.features(val).to(self.clip.device)
        zero_shot, gaussian = self.clip.logits(features, self.text), features @ self.weight.T + self.bias
        answers = {alpha: (zero_shot + alpha * gaussian).argmax(-1).cpu() for alpha in ALPHAS}
        return max(ALPHAS, key=lambda alpha: int((answers[alpha] == val.labels).sum()))


# ------------------------------------------------------------------------------------------------------ the closed form


def gaussian_discriminant(
    features: torch.Tensor, labels: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear classifier f weight^T + bias of equally likely Gaussian classes with a shared covariance.

    Computed in float64 on the CPU; returned in the dtype and on the device of the features.

    Args:
        features: (n, E), at least one per class; n may be smaller than E.
        labels: (n,)
        classes: C.

    Returns:
        weight (C, E), whose rows are m_c P, and bias (C,), -m_c P m_c / 2.

    Raises:
        ZooError: a class without features.
    """
    rows, labels = features.detach().cpu(), labels.cpu()
    means = class_means(rows, labels, classes)
    weight = means @ shared_precision(rows, labels, means)
    bias = -(weight * means).sum(-1) / 2
    return weight.to(features), bias.to(features)


def class_means(features: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """features (n, E), labels (n,) -> class means (C, E) in float64; ZooError if a class has no features."""
    counts = torch.bincount(labels, minlength=classes)
    if (counts == 0).any():
        missing = ", ".join(map(str, (counts == 0).nonzero().flatten().tolist()[:5]))
        raise ZooError(f"No training image has label {missing}: every class needs at least one. Add images or drop it.")
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    for rows, of in _chunks(features, labels):
        sums.index_add_(0, of, rows)
    return sums / counts[:, None]


def shared_precision(features: torch.Tensor, labels: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """P = E pinv((n - 1) S + tr(S) I) in float64: features (n, E), labels (n,), means (C, E) -> (E, E).

    The shrinkage bounds the condition number by n, for any n and E. With S = 0, as with one row per class, the formula
    gives P = 0, no classifier at all. Then an isotropic covariance with the variance of the class means takes the place
    of S, which yields the nearest-mean classifier.
    """
    n, width = features.shape
    scatter, length = torch.zeros(width, width, dtype=torch.float64), 0.0  # (n - 1) S
    for rows, of in _chunks(features, labels):
        centred = rows - means[of]
        scatter += centred.T @ centred
        length += rows.square().sum().item()
    if scatter.trace() <= ROUNDING * length:
        variance = (means - means.mean(0)).square().sum() / max(len(means) - 1, 1)
        scatter = (n - 1) * variance / width * torch.eye(width, dtype=torch.float64)
    shrinkage = scatter.trace() / max(n - 1, 1) * torch.eye(width, dtype=torch.float64)
    return width * torch.linalg.pinv(scatter + shrinkage, hermitian=True)


def _chunks(features: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for rows, of in zip(features.split(CHUNK), labels.split(CHUNK), strict=True):
        yield rows.double(), of


def recipe(model: str, dataset: str, shots: int, protocol: str) -> GDARecipe:
    return GDARecipe(augment=budget_overrides(model, dataset).get("augment", "crop-flip"))


def fit(task: Task) -> GDA:
    seed_everything(task.seed)
    return GDA(task)
