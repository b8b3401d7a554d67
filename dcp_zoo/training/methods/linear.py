"""Linear classifiers on the features of the frozen image tower. By text: zero-shot CLIP, with one prompt or
eight. By images: a linear probe. By both: SS-Text, LP++, and GDA."""

import warnings
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone.classes import Texts
from dcp_zoo.backbone.clip import WeightAndBias
from dcp_zoo.features import PLAIN, Views
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.probe.estimates import class_means, in_float64, text_scale
from dcp_zoo.probe.folds import left_out
from dcp_zoo.training.methods.base import FITTED, CropsRecipe, Method, augmented, mirrored, most_accurate, plain
from dcp_zoo.training.recipes import CROSS_VALIDATION, BaseRecipe, count, option
from dcp_zoo.training.task import Task

ONE_SHOT_SCALE = 4.0  # of a linear probe's logits, with one image per class
ALPHA_EVERY = 10  # epochs of LP++
ALPHAS = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0)  # of GDA
NO_SCATTER = 1e-10  # a scatter below this fraction of the rows' squared length is rounding of float32

ENSEMBLE = (  # templates beside the dataset's
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)

# ------------------------------------------------------------------------------------------- Zero-shot CLIP, SS-Text


def fit_zero_shot(task: Task) -> LinearHead:
    """The cosine between an image and the name of each class. With image features f (B, E), text features
    t_c (E,) of the class names in a template, and s = exp(logit_scale):

        logits_c = s f t_c^T                                                 (B,)
    """
    return task.text_head(task.text, texts=task.texts)


def fit_ensemble(task: Task) -> LinearHead:
    """t_c is the normalised mean over the dataset's template and the seven that CLIP's authors selected on
    ImageNet, as used by Tip-Adapter. Sentences of the classes take the place of all templates."""
    texts: Texts = (task.texts, *ENSEMBLE) if isinstance(task.texts, str) else task.texts
    return task.text_head(task.clip.zero_shot_classifier(task.classnames, texts), texts=texts)


@torch.no_grad()
def fit_ss_text(task: Task) -> LinearHead:
    """SS-Text: text features plus training features. With image features f (B, E), text features t_c (E,) of
    the classes, s = exp(logit_scale), and n training images, of which n_c are of class c and have features
    that sum to m_c:

        w_c      = t_c + s n_c / n m_c                                       (E,)
        logits_c = s f w_c^T / |w_c|                                         (B,)

    w minimises the linear part of the cross-entropy, -s f w_y^T in the mean over the training images, plus
    the sum over the classes of |w_c - t_c|^2 / (2 n_c): the fewer images a class has, the closer it stays to
    its text.
    """
    features = task.embeddings(task.train)
    one_hot = F.one_hot(task.train.labels, len(task.classnames)).to(features)  # (n, C)
    strength = task.clip.clip.logit_scale.exp() * one_hot.mean(0)  # (C,), s n_c / n
    weight = task.text + strength[:, None] * (one_hot.T @ features)
    return task.text_head(F.normalize(weight, dim=-1))


# ------------------------------------------------------------------------------------------------------- Linear probe


@dataclass(frozen=True)
class LinearProbeRecipe(BaseRecipe):
    C: float = option(10.0, "inverse strength of the L2 penalty", min=1e-9)


def fit_linear_probe(task: Task) -> LinearHead:
    """Logistic regression on the features of the training images and their mirror images.

    A penalty strong enough for few images makes its probabilities too even: its logits are scaled to the
    lowest log loss on held-out training images, in folds; with one image per class, where none can be held
    out, by `ONE_SHOT_SCALE`. The default C and that scale were chosen on the sets for choosing of `benchmarks/sets.py`,
    see `benchmarks/notes.md`: a fixed C is more accurate than one that is chosen on few images, and needs no
    validation images.
    """
    views = task.train.rows(*mirrored(task))
    labels = task.train.labels
    fit = partial(regression, recipe=task.recipe)
    held_out = left_out(views, labels, task.train.groups, fit)
    scale = ONE_SHOT_SCALE
    if held_out:
        positions, logits = held_out
        scale = text_scale(logits, labels[positions])
    weight, bias = fit(views, labels)
    device = task.clip.device
    head = task.linear_head(scale * weight.to(device), scale * bias.to(device))
    head.info = {"scale": round(scale, 4)}
    return head


def regression(views: Tensor, labels: Tensor, recipe: LinearProbeRecipe) -> WeightAndBias:
    """Weight (C, E) and bias (C,) of logistic regression on features (V, n, E), whose views count as one
    image."""
    from sklearn.linear_model import LogisticRegression

    x = views.flatten(0, 1).numpy()
    y = labels.repeat(len(views)).numpy()
    model = LogisticRegression(C=recipe.C / len(views), max_iter=1000)
    with warnings.catch_warnings():  # about no convergence with weak penalties, and few images at 1 shot
        warnings.simplefilter("ignore", UserWarning)
        model.fit(x, y)
    weight = torch.from_numpy(model.coef_).float()
    bias = torch.from_numpy(model.intercept_).float()
    if len(bias) == 1:  # of two classes, scikit-learn has only the second's logit
        weight = torch.cat([0 * weight, weight])
        bias = torch.cat([0 * bias, bias])
    return weight, bias


# --------------------------------------------------------------------------------------------------------------- LP++


@dataclass(frozen=True)
class LPPlusPlusRecipe(BaseRecipe):
    epochs: int = count(300, "steps of v and b, each on all training images; alpha takes a tenth of them")
    momentum: float = option(0.9, "momentum of v and b")
    alpha: float = option(250.0, "alpha at first, in multiples of the mean cosine of images and their class names")


@torch.no_grad()
def fit_lp_plus_plus(task: Task) -> LinearHead:
    """A linear probe blended with text features by learned weights per class.

    With image features f (B, E) and the zero-shot classifier W (C, E):

        logits_c = f v_c + b_c + alpha_c f W_c^T                             (B,)

    Given n training features F (n, E), v_c starts at their sum over class c, b at 0, and every alpha_c at
    250 times the mean over classes of the mean of f W_c^T over class c. Full-batch gradient descent on the
    cross-entropy, block by block, with the gradients at the same point:

        v, b     step size 4 n / lambda_max(F^T F), momentum 0.9, every epoch
        alpha    step size n / (4 max over c of the sum of (f W_c^T)^2), every tenth epoch

    The epoch of highest accuracy on the few-shot validation images is used, the latest on a tie; without
    any, the last.
    """
    recipe: LPPlusPlusRecipe = task.recipe
    classes = len(task.classnames)
    labels = task.train.labels
    x = task.embeddings(task.train)
    text = task.text
    cosines = x @ text.T  # (n, C)
    one_hot = F.one_hot(labels, classes).to(x.device)
    rate, alpha_rate = step_sizes(x, text)
    v = (class_means(x.cpu(), labels, classes) * torch.bincount(labels, minlength=classes)[:, None]).to(x)
    b = torch.zeros_like(v[:, 0])
    alpha = torch.full_like(b, recipe.alpha * class_means(cosines.cpu(), labels, classes).diagonal().mean().item())
    optimizer = torch.optim.SGD([v, b], rate, recipe.momentum)

    def linear() -> WeightAndBias:
        return v + alpha[:, None] * text, b.clone()

    best = linear()
    best_hits = -1
    info = {}
    for epoch in task.progress(range(recipe.epochs), "epochs", recipe.epochs):
        error = (F.linear(x, *linear()).softmax(-1) - one_hot) / len(x)  # (n, C)
        v.grad = error.T @ x
        b.grad = error.sum(0)
        optimizer.step()
        if (epoch + 1) % ALPHA_EVERY == 0:
            alpha.sub_(alpha_rate * (error * cosines).sum(0))
        if task.val is not None:
            logits = F.linear(task.embeddings(task.val), *linear())
            hits = int((logits.argmax(-1).cpu() == task.val.labels).sum())
            if hits >= best_hits:
                best_hits = hits
                best = linear()
                info = {"epoch": epoch + 1}
    weight, bias = linear() if task.val is None else best
    head = task.linear_head(weight, bias)
    head.info = info
    return head


def step_sizes(x: Tensor, text: Tensor) -> tuple[float, float]:
    """Step sizes of v and b, and of alpha, from Lipschitz constants of the loss: x (n, E), text (C, E)."""
    x = x.cpu().double()
    largest = torch.linalg.eigvalsh(x.T @ x)[-1].item()
    largest_cosines = (x @ text.cpu().double().T).square().sum(0).max().item()
    return 4 * len(x) / largest, len(x) / (4 * largest_cosines)


# ---------------------------------------------------------------------------------------------------------------- GDA


@dataclass(frozen=True)
class GDARecipe(CropsRecipe):
    alpha: float | None = option(None, "weight of the Gaussian part; null: chosen on the validation images")
    text: bool = option(True, "add zero-shot CLIP; false: the Gaussian part alone, with nothing to choose")


@torch.no_grad()
def fit_gda(task: Task) -> LinearHead:
    """GDA: a closed-form classifier of Gaussian classes with a shared covariance, added to zero-shot CLIP.

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
    recipe: GDARecipe = task.recipe
    device = task.clip.device
    views = task.train.rows(*augmented(task))  # (V, n, E)
    weight, bias = gaussian_discriminant(views, task.train.labels, len(task.classnames))
    alpha = recipe.alpha
    info = dict[str, str]()
    if alpha is None:
        alpha = 1.0
        if recipe.text:
            alpha, info = chosen_alpha(task, views, weight, bias)
    weight = alpha * weight.to(device)
    bias = alpha * bias.to(device)
    if recipe.text:
        text_weight, text_bias = task.clip.scaled(task.text)
        weight = text_weight + weight
        bias = text_bias + bias
    head = task.linear_head(weight, bias)
    head.info = {"alpha": alpha, **info}
    return head


def chosen_alpha(task: Task, views: Tensor, weight: Tensor, bias: Tensor) -> tuple[float, dict[str, str]]:
    """alpha, and what it was chosen on if not on validation images: of the `weight` (C, E) and `bias` (C,) that
    were fitted to the `views` of training images (V, n, E)."""
    labels = task.train.labels
    unaugmented = task.train.rows(PLAIN)[0]  # images are held out as they are, not as random crops

    def zero_shot(rows: Tensor) -> Tensor:
        return task.clip.logits(rows.to(task.clip.device), task.text).cpu()

    def best(rows: Tensor, gaussian: Tensor, truth: Tensor) -> float:
        """The alpha of highest accuracy, the smallest on a tie: features (n, E), Gaussian scores (n, C),
        labels."""
        logits = zero_shot(rows)
        return most_accurate(((alpha, logits + alpha * gaussian) for alpha in ALPHAS), truth)

    if task.val is not None:
        val = task.embeddings(task.val).cpu()
        return best(val, val @ weight.T + bias, task.val.labels), {}

    def fit_without_plain(views: Tensor, labels: Tensor) -> WeightAndBias:
        return gaussian_discriminant(views[1:], labels, len(task.classnames))

    # the first view is the one that is scored, the others are fitted to
    held_out = left_out(torch.cat([unaugmented[None], views]), labels, task.train.groups, fit_without_plain)
    if held_out:
        positions, scores = held_out
        return best(unaugmented[positions], scores, labels[positions]), {"selection": CROSS_VALIDATION}
    spread = (unaugmented @ weight.T + bias).std()
    return (zero_shot(unaugmented).std() / 2 / spread.clamp(min=1e-6)).item(), {}


def gaussian_discriminant(views: Tensor, labels: Tensor, classes: int) -> WeightAndBias:
    """The linear classifier of equally likely Gaussian classes with a shared covariance, from features (V, n, E),
    each view of an image being a row of its own, and labels (n,); rows may be fewer than E: weight (C, E), whose
    rows are m_c P, and bias (C,), -m_c P m_c / 2. Computed in float64 on the CPU. ZooError for a class without
    features."""
    rows = views.flatten(0, 1)
    labels = labels.repeat(len(views))
    means = class_means(rows, labels, classes)
    weight = means @ shared_precision(rows, labels, means)
    return weight.to(rows), -(weight * means).sum(-1).to(rows) / 2


def shared_precision(features: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """P = E pinv((n - 1) S + tr(S) I) in float64, with the covariance S (E, E) of features (n, E) around the
    class means, as in GDA (Wang et al., ICLR 2024). The shrinkage bounds the condition number by n. With S =
    0, as with one row per class, P would be 0: an isotropic covariance with the variance of the class means
    takes the place of S."""
    n, width = features.shape
    identity = torch.eye(width, dtype=torch.float64)
    scatter = torch.zeros_like(identity)  # (n - 1) S
    squares = 0.0
    for rows, row_labels in in_float64(features, labels):
        centred = rows - means[row_labels]
        scatter += centred.T @ centred
        squares += rows.square().sum().item()
    if scatter.trace() <= NO_SCATTER * squares:
        variance = (means - means.mean(0)).square().sum() / max(len(means) - 1, 1)
        scatter = (n - 1) * variance / width * identity
    shrinkage = scatter.trace() / max(n - 1, 1) * identity
    precision = width * torch.linalg.pinv(scatter + shrinkage, hermitian=True)
    return (precision + precision.T) / 2


def gda_views(task: Task) -> Views:
    """The views that it is fitted to, and the plain one, on which alpha is chosen."""
    fitted = augmented(task)
    return fitted if PLAIN in fitted else (*fitted, PLAIN)


PAPER = "Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021"
ZERO_SHOT = Method("zero-shot", "Zero-shot", PAPER, fit_zero_shot, trains=False, features=plain)
ZERO_SHOT_ENSEMBLE = Method("zero-shot-ensemble", "Zero-shot, 8 prompts", PAPER, fit_ensemble, trains=False)
SS_TEXT = Method(
    "ss-text",
    "SS-Text",
    "Silva-Rodriguez et al., Few-Shot, Now for Real: Medical VLMs Adaptation without Balanced Sets or Validation, "
    "MICCAI 2025",
    fit_ss_text,
    abilities=FITTED,
    features=plain,
)
LINEAR_PROBE = Method(
    "linear-probe",
    "Linear probe",
    PAPER,
    fit_linear_probe,
    LinearProbeRecipe,
    FITTED,
    features=mirrored,
)
LP_PLUS_PLUS = Method(
    "lp-plus-plus",
    "LP++",
    "Huang et al., LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP, CVPR 2024",
    fit_lp_plus_plus,
    LPPlusPlusRecipe,
    FITTED,
    chooses=True,
    features=plain,
)
GDA = Method(
    "gda",
    "GDA",
    "Wang et al., A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, ICLR 2024",
    fit_gda,
    GDARecipe,
    FITTED,
    chooses=True,
    features=gda_views,
)
