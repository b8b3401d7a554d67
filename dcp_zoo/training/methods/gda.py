"""GDA (Wang et al., ICLR 2024): a closed-form classifier of Gaussian classes with a shared covariance, added
to zero-shot CLIP.

With image features f (B, E), the zero-shot classifier W (C, E), s = exp(logit_scale), and n training
features with class means m_c (E,) and covariance S (E, E) around these means:

    P = E pinv((n - 1) S + tr(S) I)                                          (E, E)
    logits_c = s f W_c^T + alpha (f P m_c - m_c P m_c / 2)                   (B,)

As in the authors' code, each augmented view of an image is a separate row: ten random crops, or for the
miniature, which only flips, both views. alpha is chosen from 1e-4, 1e-3, .., 100 by accuracy on the few-shot
validation images, the smallest on a tie; without these on training images, in folds; with one per class,
where none can be held out, so that both terms have the same standard deviation over the training images, and
CLIP's twice the weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dcp_zoo.backbone.clip import Linear
from dcp_zoo.features import PLAIN, Views
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.probe.estimates import class_means, in_float64
from dcp_zoo.probe.folds import left_out
from dcp_zoo.training.methods.base import FITTED, CropsRecipe, Method, augmented, most_accurate
from dcp_zoo.training.recipes import CROSS_VALIDATION, option
from dcp_zoo.training.task import Task

ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)
NO_SCATTER = 1e-10  # a scatter below this fraction of the rows' squared length is rounding of float32


@dataclass(frozen=True)
class GDARecipe(CropsRecipe):
    alpha: float | None = option(None, "weight of the Gaussian part; null: chosen on the validation images")
    text: bool = option(True, "add zero-shot CLIP; false: the Gaussian part alone, with nothing to choose")


@torch.no_grad()
def fit(task: Task) -> LinearHead:
    recipe: GDARecipe = task.recipe
    features = task.train.rows(*augmented(task))  # (V, n, E)
    weight, bias = gaussian_of_views(features, task.train.labels, len(task.classnames))
    weight = weight.to(task.clip.device)
    bias = bias.to(task.clip.device)
    text = task.text
    alpha = recipe.alpha
    info = dict[str, str]()
    if alpha is None:
        alpha = 1.0
        if recipe.text:
            alpha, info = chosen_alpha(task, text, features, weight, bias)
    weight = alpha * weight
    bias = alpha * bias
    if recipe.text:
        text_weight, text_bias = task.clip.scaled(text)
        weight = text_weight + weight
        bias = text_bias + bias
    head = task.linear_head(weight, bias)
    head.info = {"alpha": alpha, **info}
    return head


def chosen_alpha(
    task: Task, text: Tensor, features: Tensor, weight: Tensor, bias: Tensor
) -> tuple[float, dict[str, str]]:
    """alpha, and what it was chosen on if not on validation images: text features (C, E), and the `weight`
    (C, E) and `bias` (C,) that were fitted to `features` of training images (V, n, E)."""
    labels = task.train.labels
    plain = task.train.rows(PLAIN)[0]  # images are held out as they are, not as random crops

    def best(rows: Tensor, gaussian: Tensor, truth: Tensor) -> float:
        """The alpha of highest accuracy, the smallest on a tie: features (n, E), Gaussian scores (n, C),
        labels."""
        zero_shot = task.clip.logits(rows.to(text.device), text).cpu()
        return most_accurate(((alpha, zero_shot + alpha * gaussian) for alpha in ALPHAS), truth)

    if task.val is not None:
        val = task.embeddings(task.val).cpu()
        return best(val, val @ weight.cpu().T + bias.cpu(), task.val.labels), {}

    def fit_without_plain(views: Tensor, labels: Tensor) -> Linear:
        return gaussian_of_views(views[1:], labels, len(text))

    held_out = left_out(torch.cat([plain[None], features]), labels, task.train.groups, fit_without_plain)
    if held_out:
        positions, scores = held_out
        return best(plain[positions], scores, labels[positions]), {"selection": CROSS_VALIDATION}
    plain = plain.to(weight)
    spread = (plain @ weight.T + bias).std()
    return (task.clip.logits(plain, text).std() / 2 / spread.clamp(min=1e-6)).item(), {}


def gaussian_of_views(views: Tensor, labels: Tensor, classes: int) -> Linear:
    """`gaussian_discriminant` of features (V, n, E), each view of an image being a row of its own."""
    return gaussian_discriminant(views.flatten(0, 1), labels.repeat(len(views)), classes)


def gaussian_discriminant(features: Tensor, labels: Tensor, classes: int) -> Linear:
    """The linear classifier of equally likely Gaussian classes with a shared covariance, from features (n,
    E), where n may be smaller than E, and labels (n,): weight (C, E), whose rows are m_c P, and bias (C,),
    -m_c P m_c / 2. Computed in float64 on the CPU. ZooError for a class without features."""
    rows = features.detach().cpu()
    labels = labels.cpu()
    means = class_means(rows, labels, classes)
    weight = means @ shared_precision(rows, labels, means)
    return weight.to(features), -(weight * means).sum(-1).to(features) / 2


def shared_precision(features: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """P = E pinv((n - 1) S + tr(S) I) in float64, with the covariance S (E, E) of features (n, E) around the
    class means, as in GDA (Wang et al., ICLR 2024). The shrinkage bounds the condition number by n. With S =
    0, as with one row per class, P would be 0: an isotropic covariance with the variance of the class means
    takes the place of S."""
    n, width = features.shape
    scatter = torch.zeros(width, width, dtype=torch.float64)  # (n - 1) S
    squares = 0.0
    for rows, row_labels in in_float64(features, labels):
        centred = rows - means[row_labels]
        scatter += centred.T @ centred
        squares += rows.square().sum().item()
    if scatter.trace() <= NO_SCATTER * squares:
        variance = (means - means.mean(0)).square().sum() / max(len(means) - 1, 1)
        scatter = (n - 1) * variance / width * torch.eye(width, dtype=torch.float64)
    shrinkage = scatter.trace() / max(n - 1, 1) * torch.eye(width, dtype=torch.float64)
    precision = width * torch.linalg.pinv(scatter + shrinkage, hermitian=True)
    return (precision + precision.T) / 2


def views(task: Task) -> Views:
    """The views that it is fitted to, and the plain one, on which alpha is chosen."""
    fitted = augmented(task)
    return fitted if PLAIN in fitted else (*fitted, PLAIN)


PAPER = "Wang et al., A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, ICLR 2024"
GDA = Method("gda", "GDA", PAPER, fit, GDARecipe, FITTED, chooses=True, features=views)
