"""Zero-shot CLIP, and two methods that add to its logits what they know of the training images."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.model.classifier import Linear, class_means, shared_precision
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import Texts, check_classnames
from dcp_zoo.training.loop import cosine, descend
from dcp_zoo.training.methods import base
from dcp_zoo.training.methods.base import CosineClassifier, FeatureClassifier, Task, most_accurate
from dcp_zoo.training.recipes import CROSS_VALIDATION, batch_sizes
from dcp_zoo.training.stage import FOLDS, within_class
from dcp_zoo.training.state import TrainingState

# the seven templates that CLIP's authors selected on ImageNet, as used by Tip-Adapter
ENSEMBLE = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


class ZeroShot(CosineClassifier):
    """Cosine between image features and the text features of the class names, of a CLIP that a method has trained or
    the task's. With `templates` besides the dataset's, a class is the normalised mean of its normalised features."""

    def __init__(self, task: Task, templates: Sequence[str] = (), clip: FrozenCLIP | None = None) -> None:
        super().__init__(task, clip)
        self.template, self.templates = task.template, templates
        self.set_classnames(task.classnames)

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        self.template = template or self.template
        names = check_classnames(classnames)
        texts = [self.clip.zero_shot_classifier(names, t) for t in (self.template, *self.templates)]
        self.text = F.normalize(torch.stack(texts).mean(0), dim=-1)


fit = ZeroShot
fit_probe = fit  # and the stage that its recipe names


def fit_ensemble(task: Task) -> ZeroShot:
    return ZeroShot(task, ENSEMBLE)


class TipAdapter(FeatureClassifier):
    """Tip-Adapter and Tip-Adapter-F (Zhang et al., ECCV 2022): zero-shot CLIP plus a cache of the training images,
    exp(logit_scale) f W^T + alpha exp(-beta (1 - f K^T)) L, with image features f (n, E), the zero-shot classifier
    W (C, E), keys K (NK, E), the normalised mean features of the views of each training image, and their one-hot labels
    L (NK, C)."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.text = task.text
        keys = F.normalize(base.augmented_features(task, task.recipe.augment_epochs).mean(0), dim=-1)
        self.keys = keys.to(self.clip.device)
        self.values = F.one_hot(task.train_images.labels, len(task.classnames)).to(self.keys)
        self.alpha, self.beta = task.recipe.alpha, task.recipe.beta

    def classify(self, features: Tensor) -> Tensor:
        return self.clip.logits(features, self.text) + self.alpha * self.cached(features, self.beta)

    def cached(self, features: Tensor, beta: float) -> Tensor:
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
    recipe, view = task.recipe, base.feature_view(task)
    model.keys.requires_grad_()
    optimizer = torch.optim.AdamW([model.keys], recipe.lr, eps=recipe.eps)
    steps = recipe.epochs * len(batch_sizes(len(view.items), recipe.batch_size, drop_last=True))

    def loss(inputs: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(model.classify(base.as_features(task.clip, inputs, view.patches)).float(), labels)

    state, batches = TrainingState().begin(optimizer, task.precision), base.shuffled(view, recipe.batch_size, task.seed)
    descend(state, loss, batches, cosine(recipe.lr, steps), steps, task.progress)
    model.keys.requires_grad_(False)


def fit_tip_adapter(task: Task) -> TipAdapter:
    return TipAdapter(task).search(task)


def fit_tip_adapter_f(task: Task) -> TipAdapter:
    model = TipAdapter(task)
    train_keys(model, task)
    return model.search(task)


ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


class GDA(FeatureClassifier):
    """GDA (Wang et al., A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, ICLR 2024): a closed-form
    classifier of Gaussian classes with a shared covariance, added to zero-shot CLIP.

    With image features f (B, E), the zero-shot classifier W (C, E), s = exp(logit_scale), and n training features with
    class means m_c (E,) and covariance S (E, E) around these means:

        P = E pinv((n - 1) S + tr(S) I)                                      (E, E)
        logits_c = s f W_c^T + alpha (f P m_c - m_c P m_c / 2)               (B,)

    As in the authors' code, each augmented view of an image is a separate row: ten random crops, or for the miniature,
    which only flips, both views. alpha is chosen from 1e-4, 1e-3, .., 100 by accuracy on the few-shot validation
    images, the smallest on a tie. The paper needs these; without them the training images take their place, in folds,
    and if a class has only one image, the Gaussian part gets half the spread of the text logits on the training images.
    `weight` (C, E) and `bias` (C,) are the Gaussian part.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.uses_text = task.recipe.text
        if self.uses_text:
            self.text = task.text
        features = base.augmented_features(task, task.recipe.augment_epochs)  # (V, n, E)
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
    def search(self, features: Tensor, gaussian: Tensor, labels: Tensor) -> float:
        """The alpha of highest accuracy, the smallest on a tie: features (n, E), Gaussian scores (n, C), labels."""
        zero_shot = self.clip.logits(features.to(self.clip.device), self.text).cpu()
        return most_accurate(((alpha, zero_shot + alpha * gaussian) for alpha in ALPHAS), labels)


def out_of_fold(views: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Gaussian scores (n, C) of training images, two or more per class, from fits without them: views (V, n, E)."""
    scores, position = torch.zeros(len(labels), classes), within_class(labels)
    folds = min(FOLDS, int(torch.bincount(labels).min()))
    for fold in range(folds):
        kept = position % folds != fold
        weight, bias = gaussian_discriminant(views[:, kept].flatten(0, 1), labels[kept].repeat(len(views)), classes)
        scores[~kept] = views[0, ~kept] @ weight.T + bias
    return scores


def gaussian_discriminant(features: Tensor, labels: Tensor, classes: int) -> Linear:
    """The linear classifier of equally likely Gaussian classes with a shared covariance, from features (n, E), where n
    may be smaller than E, and labels (n,): weight (C, E), whose rows are m_c P, and bias (C,), -m_c P m_c / 2. Computed
    in float64 on the CPU. ZooError for a class without features."""
    rows, labels = features.detach().cpu(), labels.cpu()
    means = class_means(rows, labels, classes)
    weight = means @ shared_precision(rows, labels, means)
    return weight.to(features), -(weight * means).sum(-1).to(features) / 2


fit_gda = GDA
