"""Zero-shot CLIP, and methods that add to its logits what they know of the training images, by a short loop or none."""

from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.model.cache_head import CacheHead
from dcp_zoo.model.classes import Texts
from dcp_zoo.model.clip import Linear
from dcp_zoo.model.head import LinearHead
from dcp_zoo.model.inputs import Inputs
from dcp_zoo.model.text_probe.estimates import class_means, shared_precision
from dcp_zoo.model.text_probe.fit import FOLDS, within_class
from dcp_zoo.training.loop import cosine
from dcp_zoo.training.methods.base import Task, minimise, most_accurate, shuffled
from dcp_zoo.training.recipes import CROSS_VALIDATION, batch_sizes

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


def fit(task: Task) -> LinearHead:
    """Cosine between image features and the text features of the class names in the dataset's template."""
    return task.text_head(task.text, texts=task.texts)


fit_probe = fit  # and the text probe that its recipe names


def fit_ensemble(task: Task) -> LinearHead:
    """The same with `ENSEMBLE` besides the dataset's template: a class is the normalised mean of its features."""
    own = task.texts
    texts: Texts = (own, *ENSEMBLE) if isinstance(own, str) else own
    found = [task.clip.zero_shot_classifier(task.classnames, template) for template in (own, *ENSEMBLE)]
    return task.text_head(F.normalize(torch.stack(found).mean(0), dim=-1), texts=texts)


def cache_head(task: Task, alpha: float) -> CacheHead:
    """Tip-Adapter and Tip-Adapter-F, see `CacheHead`, before anything is chosen or trained: the keys are the normalised
    mean features of the views of each training image."""
    recipe, text = task.recipe, task.text
    keys = F.normalize(task.augmented_features(recipe.augment_epochs).mean(0), dim=-1).to(text.device)
    tensors = {
        "weight": text,
        "keys": keys,
        "values": F.one_hot(task.train_labels, len(task.classnames)).to(keys),
        "alpha": keys.new_tensor(alpha),
        "beta": keys.new_tensor(recipe.beta),
    }
    return CacheHead(task.clip, task.classnames, tensors)


@torch.no_grad()
def choose_strength(head: CacheHead, task: Task) -> CacheHead:
    """Choose alpha and beta on the validation images, if there are any; ties go to the smallest values."""
    alpha, beta = task.recipe.alpha, task.recipe.beta
    if task.val is not None:
        features = task.features(task.val)
        zero_shot = task.clip.logits(features, head.weight)
        alphas, betas = (grid(task.recipe.search_max, steps) for steps in (20, 40))
        candidates = (
            ((alpha, beta), zero_shot + alpha * cached)
            for beta in task.progress(betas, "alpha and beta", len(betas))
            for cached in [head.cached(features, beta)]
            for alpha in alphas
        )
        alpha, beta = most_accurate(candidates, task.val.labels)
        head.alpha.fill_(alpha)
        head.beta.fill_(beta)
    head.info = {"alpha": round(alpha, 4), "beta": round(beta, 4)}
    return head


def grid(largest: float, steps: int) -> list[float]:
    """`steps` values from 0.1 to `largest`, spaced geometrically."""
    return [0.1 * (largest / 0.1) ** (i / (steps - 1)) for i in range(steps)]


def train_keys(head: CacheHead, task: Task) -> None:
    """Train the keys on the training images; text features and labels stay fixed."""
    recipe, source = task.recipe, task.feature_source
    head.keys.requires_grad_()
    optimizer = torch.optim.AdamW([head.keys], recipe.lr, eps=recipe.eps)
    steps = recipe.epochs * len(batch_sizes(len(source.items), recipe.batch_size, drop_last=True))

    def loss(inputs: Inputs, labels: Tensor) -> Tensor:
        with torch.no_grad():
            features = task.clip.encode_image(inputs)
        return F.cross_entropy(head.classify(features).float(), labels)

    minimise(task, loss, optimizer, shuffled(source, recipe.batch_size, task.seed), cosine(recipe.lr, steps), steps)
    head.keys.requires_grad_(False)


def fit_tip_adapter(task: Task) -> CacheHead:
    return choose_strength(cache_head(task, task.recipe.alpha), task)


def fit_tip_adapter_f(task: Task) -> CacheHead:
    head = cache_head(task, task.recipe.alpha)
    train_keys(head, task)
    return choose_strength(head, task)


BETAS, PENALTIES = (0.5, 1.0, 2.0, 4.0, 8.0), (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


@torch.no_grad()
def fit_proker(task: Task) -> CacheHead:
    """ProKeR: kernel ridge regression of what zero-shot CLIP leaves over of the labels.

    With image features f (B, E), the zero-shot classifier W (C, E), s = exp(logit_scale), n keys K (n, E) and one-hot
    labels L (n, C) as in `CacheHead`, and the kernel k(x, y) = exp(-beta (1 - x y^T)):

        A      = (k(K, K) / lambda + I)^-1 (L - K W^T)                       (n, C)
        logits = s (f W^T + k(f, K) A)                                       (B, C)

    This is the authors' code, in which lambda scales what the ridge regression adds, besides penalising it. beta and
    lambda are chosen on the few-shot validation images, the smallest on a tie; else they are the authors' for ImageNet.
    """
    head = cache_head(task, task.clip.clip.logit_scale.exp().item())
    keys, text = head.keys.cpu().double(), head.weight.cpu().double()
    similar, left = keys @ keys.T, head.values.cpu() - keys @ text.T

    def with_strength(beta: float, penalty: float) -> CacheHead:
        system = (-beta * (1 - similar)).exp() / penalty + torch.eye(len(keys))
        head.values = torch.cholesky_solve(left, torch.linalg.cholesky(system)).to(head.values)
        head.beta.fill_(beta)
        return head

    beta, penalty = task.recipe.beta, task.recipe.penalty
    if task.val is not None:
        features, pairs = task.features(task.val), list(product(BETAS, PENALTIES))
        shown = task.progress(pairs, "beta and lambda", len(pairs))
        candidates = ((pair, with_strength(*pair).classify(features)) for pair in shown)
        beta, penalty = most_accurate(candidates, task.val.labels)
    head.info = {"beta": beta, "lambda": penalty}
    return with_strength(beta, penalty)


@torch.no_grad()
def fit_ss_text(task: Task) -> LinearHead:
    """SS-Text: text features plus training features, with nothing to choose.

    With image features f (B, E), text features t_c (E,) of the classes, s = exp(logit_scale), and n training images, of
    which n_c are of class c and have features that sum to m_c (E,):

        w_c      = t_c + s n_c / n m_c                                       (E,)
        logits_c = s f w_c^T / |w_c|                                         (B,)

    w minimises the linear part of the cross-entropy, -s f w_y^T in the mean over the training images, plus the sum over
    the classes of |w_c - t_c|^2 / (2 n_c): the fewer images a class has, the closer it stays to its text.
    """
    features, classes = task.train_features, len(task.classnames)
    one_hot = F.one_hot(task.train_labels, classes).to(features)  # (n, C)
    strength = task.clip.clip.logit_scale.exp() * one_hot.mean(0)  # (C,)
    return task.text_head(F.normalize(task.text + strength[:, None] * (one_hot.T @ features), dim=-1))


ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)


@torch.no_grad()
def fit_gda(task: Task) -> LinearHead:
    """GDA: a closed-form classifier of Gaussian classes with a shared covariance, added to zero-shot CLIP.

    With image features f (B, E), the zero-shot classifier W (C, E), s = exp(logit_scale), and n training features with
    class means m_c (E,) and covariance S (E, E) around these means:

        P = E pinv((n - 1) S + tr(S) I)                                      (E, E)
        logits_c = s f W_c^T + alpha (f P m_c - m_c P m_c / 2)               (B,)

    As in the authors' code, each augmented view of an image is a separate row: ten random crops, or for the miniature,
    which only flips, both views. alpha is chosen from 1e-4, 1e-3, .., 100 by accuracy on the few-shot validation
    images, the smallest on a tie; without these on training images, in folds; with one per class see `gda_weight`.
    """
    features = task.augmented_features(task.recipe.augment_epochs)  # (V, n, E)
    labels, classes, device = task.train_labels, len(task.classnames), task.clip.device
    gaussian = gaussian_discriminant(features.flatten(0, 1), labels.repeat(len(features)), classes)
    weight, bias = (part.to(device) for part in gaussian)
    text = task.text if task.recipe.text else None
    alpha, chosen = task.recipe.alpha, dict[str, str]()
    if alpha is None:
        alpha, chosen = (1.0, chosen) if text is None else gda_weight(task, text, features, weight, bias)
    weight, bias = alpha * weight, alpha * bias
    if text is not None:
        text_weight, text_bias = task.clip.scaled(text)
        weight, bias = text_weight + weight, text_bias + bias
    head = task.linear_head(weight, bias)
    head.info = {"alpha": alpha, **chosen}
    return head


def gda_weight(
    task: Task, text: Tensor, features: Tensor, weight: Tensor, bias: Tensor
) -> tuple[float, dict[str, str]]:
    """alpha, and what it was chosen on if not on validation images: text features (C, E), those of images (V, n, E)."""
    labels = task.train_labels

    def best(found: Tensor, gaussian: Tensor, truth: Tensor) -> float:
        """The alpha of highest accuracy, the smallest on a tie: features (n, E), Gaussian scores (n, C), labels."""
        zero_shot = task.clip.logits(found.to(text.device), text).cpu()
        return most_accurate(((alpha, zero_shot + alpha * gaussian) for alpha in ALPHAS), truth)

    if task.val is not None:
        val = task.features(task.val).cpu()
        return best(val, val @ weight.cpu().T + bias.cpu(), task.val.labels), {}
    if torch.bincount(labels).min() > 1:
        scores = out_of_fold(features.cpu(), labels, len(text))
        return best(features[0].cpu(), scores, labels), {"selection": CROSS_VALIDATION}
    plain = features[0].to(weight)
    spread = (plain @ weight.T + bias).std()
    return (task.clip.logits(plain, text).std() / 2 / spread.clamp(min=1e-6)).item(), {}


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
