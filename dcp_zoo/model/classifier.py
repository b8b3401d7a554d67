"""The classifier stage of a head: Gaussian classes on its image features, in closed form, added to the text logits.

With normalised image features f (B, E), text logits z (B, C), and n training features with class means m_c (E,), their
mean m, and covariance S (E, E) around the class means:

    P        = E pinv((n - 1) S + tr(S) I)                               (E, E)
    g_c      = f P m_c - m_c P m_c / 2                                   (B,)
    logits_c = (z_c + alpha (g_c - mean over classes of g)) / T          (B,)

g is GDA's score (Wang et al., A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation, ICLR 2024); alpha, the
temperature T and the rejection threshold are chosen by `dcp_zoo.training.stage`. Subtracting the mean changes no
probability. Scores compare with each other only: among classes of which one was never seen, text logits decide alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from dcp_zoo.errors import ZooError

PREFIX = "classifier."  # of its tensors in a checkpoint
NEVER = torch.finfo(torch.float32).min  # a threshold that rejects nothing
NO_SPREAD = 1e-10  # a scatter below this fraction of the rows' squared length is float32 rounding, not spread
ROWS_AT_A_TIME = 8192  # rows converted to float64 at a time
NO_THRESHOLD = (
    "This head has no threshold to reject images: it was fitted on too few, or for other classes or texts than it has "
    "now. dcp-zoo fit-classifier sets one, from images of all its classes, at least two of each and 20 in all."
)


class GaussianClassifier(nn.Module):
    """See the module.

    Attributes:
        names: the classes that it was fitted on, in the order of its rows.
        weight, bias: (C, E) and (C,), the scores g_c minus their mean as a linear function of the features.
        mean_weight, mean_bias: (E,) and a scalar, the mean that was subtracted; new classes need it.
        precision: P, (E, E); new classes need it.
        alpha, temperature: scalars.
        threshold: images with a lower `in_distribution_score` belong to none of the classes; by default none do. It
            holds for exactly the classes in `names`, and their texts: with others, or more or fewer, images get other
            scores. So whatever changes the classes or the texts unsets it.
    """

    weight: Tensor
    bias: Tensor
    mean_weight: Tensor
    mean_bias: Tensor
    precision: Tensor
    alpha: Tensor
    temperature: Tensor
    threshold: Tensor

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__()
        self.names = list(names)
        for name, shape in {
            "weight": (len(names), width),
            "bias": (len(names),),
            "mean_weight": (width,),
            "mean_bias": (),
            "precision": (width, width),
        }.items():
            self.register_buffer(name, torch.zeros(shape))
        for name, value in {"alpha": 1.0, "temperature": 1.0, "threshold": NEVER}.items():
            self.register_buffer(name, torch.tensor(value))

    def fit(self, features: Tensor, labels: Tensor) -> "GaussianClassifier":
        """Set the Gaussians from training features (n, E) and labels (n,); ZooError for a class without features."""
        means, precision = gaussians(features, labels, len(self.names))
        weight, bias = discriminant(means, precision)
        mean = weight.mean(0), bias.mean()
        values = (weight - mean[0], bias - mean[1], *mean, precision)
        for name, value in zip(("weight", "bias", "mean_weight", "mean_bias", "precision"), values, strict=True):
            setattr(self, name, value.to(self.alpha))
        return self

    def rows_of(self, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`weight` and `bias` in the order of `classes`, some of its own."""
        if classes == self.names:
            return self.weight, self.bias
        index = {name: i for i, name in enumerate(self.names)}
        rows = [index[name] for name in classes]
        return self.weight[rows], self.bias[rows]

    def forward(self, logits: Tensor, features: Tensor, classes: Sequence[str]) -> Tensor:
        """Text logits (B, C) and features (B, E) of the same images -> logits (B, C) for these C classes."""
        weight, bias = self.linear(classes)
        return (logits + (features @ weight.T).to(logits.dtype) + bias) / self.temperature

    def scores(self, features: Tensor) -> Tensor:
        """features (B, E) -> g_c minus their mean (B, C) for the classes in `names`, without alpha."""
        return features @ self.weight.T + self.bias

    def unset_threshold(self) -> None:
        """From now on images cannot be rejected, until a threshold is fitted again."""
        self.threshold = torch.full_like(self.threshold, NEVER)

    @property
    def rejects(self) -> bool:
        """Whether there is a threshold."""
        return self.threshold.item() > NEVER

    def cannot_reject(self, classes: Sequence[str]) -> str:
        """Why images cannot be rejected among these classes, and what to do; "" if they can."""
        if not self.rejects:
            return NO_THRESHOLD
        if sorted(classes) == sorted(self.names):  # in any order; some datasets have two classes of one name
            return ""
        return (
            f"The threshold to reject images holds for exactly the {len(self.names)} classes it was fitted for, not "
            f"for these {len(classes)}. Load the head with its own class names (omit --classes), or save it with these "
            "(model.save_pretrained) and fit a threshold for them: dcp-zoo fit-classifier, with images of each."
        )

    def linear(self, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
        """The weighted scores as a linear function of the features: (C, E) and (C,)."""
        weight, bias = self.rows_of(classes)
        return self.alpha * weight, self.alpha * bias

    def tensors(self, classes: Sequence[str] | None = None) -> dict[str, Tensor]:
        """What a checkpoint holds, with the rows of `classes`, default its own; no threshold for others than these."""
        classes = self.names if classes is None else classes
        weight, bias = self.rows_of(classes)
        state = self.state_dict() | {"weight": weight, "bias": bias}
        if self.cannot_reject(classes):
            state["threshold"] = torch.full_like(self.threshold, NEVER)
        return {f"{PREFIX}{name}": t for name, t in state.items()}

    def add(self, name: str, features: Tensor) -> None:
        """Add a class, or replace the one of this name: features (n, E) of its images."""
        mean = features.detach().double().mean(0, keepdim=True).cpu()
        weight, bias = (t.to(self.weight) for t in discriminant(mean, self.precision.double().cpu()))
        self.remove(name)
        self.names = [*self.names, name]
        self.weight = torch.cat([self.weight, weight - self.mean_weight])
        self.bias = torch.cat([self.bias, bias - self.mean_bias])
        self.unset_threshold()

    def remove(self, name: str) -> None:
        """Forget a class, if it is known."""
        if name not in self.names:
            return
        self.unset_threshold()
        keep = [i for i, known in enumerate(self.names) if known != name]
        self.names = [self.names[i] for i in keep]
        self.weight, self.bias = self.weight[keep], self.bias[keep]


def in_distribution_score(logits: Tensor) -> Tensor:
    """Logits (B, C) -> minus the mean log-probability of the classes (B,), which is log sum exp(logits) - mean(logits):
    lower for images of none of the classes, as these are similar to no class more than to the others. Chosen on
    validation images, see `benchmarks/rejection.py`."""
    return -logits.log_softmax(-1).mean(-1)


def incoming(
    state: Mapping[str, Tensor], prefix: str, current: GaussianClassifier | None, names: Sequence[str]
) -> GaussianClassifier | None:
    """The stage to load a state dict into: None if the state has none, the current one if it fits, or a new one for
    these class names, which a state dict does not hold."""
    weight = state.get(f"{prefix}weight")
    if weight is None or (current is not None and current.weight.shape == weight.shape):
        return None if weight is None else current
    return GaussianClassifier(names, weight.shape[1]).to(weight.device)


# ------------------------------------------------------------------------------------------------------ the closed form


def gaussian_discriminant(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
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
    means, precision = gaussians(features, labels, classes)
    weight, bias = discriminant(means, precision)
    return weight.to(features), bias.to(features)


def gaussians(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """features (n, E), labels (n,) -> class means (C, E) and P (E, E), in float64 on the CPU."""
    rows, labels = features.detach().cpu(), labels.cpu()
    means = class_means(rows, labels, classes)
    return means, shared_precision(rows, labels, means)


def discriminant(means: Tensor, precision: Tensor) -> tuple[Tensor, Tensor]:
    """Class means (C, E) and P (E, E) -> rows P m_c (C, E) and -m_c P m_c / 2 (C,)."""
    weight = means @ precision
    return weight, -(weight * means).sum(-1) / 2


def class_means(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """features (n, E), labels (n,) -> class means (C, E) in float64; ZooError if a class has no features."""
    counts = torch.bincount(labels, minlength=classes)
    if (counts == 0).any():
        missing = ", ".join(map(str, (counts == 0).nonzero().flatten().tolist()[:5]))
        raise ZooError(f"No training image has label {missing}: every class needs at least one. Add images or drop it.")
    sums = torch.zeros(classes, features.shape[1], dtype=torch.float64)
    for rows, of in _in_float64(features, labels):
        sums.index_add_(0, of, rows)
    return sums / counts[:, None]


def shared_precision(features: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """P = E pinv((n - 1) S + tr(S) I) in float64: features (n, E), labels (n,), means (C, E) -> (E, E).

    The shrinkage bounds the condition number by n, for any n and E. With S = 0, as with one row per class, the formula
    gives P = 0, no classifier at all. Then an isotropic covariance with the variance of the class means takes the place
    of S, which yields the nearest-mean classifier.
    """
    n, width = features.shape
    scatter, length = torch.zeros(width, width, dtype=torch.float64), 0.0  # (n - 1) S
    for rows, of in _in_float64(features, labels):
        centred = rows - means[of]
        scatter += centred.T @ centred
        length += rows.square().sum().item()
    if scatter.trace() <= NO_SPREAD * length:
        variance = (means - means.mean(0)).square().sum() / max(len(means) - 1, 1)
        scatter = (n - 1) * variance / width * torch.eye(width, dtype=torch.float64)
    shrinkage = scatter.trace() / max(n - 1, 1) * torch.eye(width, dtype=torch.float64)
    precision = width * torch.linalg.pinv(scatter + shrinkage, hermitian=True)
    return (precision + precision.T) / 2  # symmetric to the last bit, see `upper_triangle`


def upper_triangle(square: Tensor) -> Tensor:
    """A symmetric matrix (E, E) as a checkpoint holds it, (E (E + 1) / 2,)."""
    return square[tuple(torch.triu_indices(*square.shape))]


def from_upper_triangle(values: Tensor) -> Tensor:
    """The matrix of `upper_triangle`; anything else as it is."""
    width = math.isqrt(8 * values.numel() + 1) // 2
    if values.ndim != 1 or width * (width + 1) != 2 * values.numel():
        return values
    square, (rows, columns) = values.new_empty(width, width), torch.triu_indices(width, width)
    square[rows, columns] = square[columns, rows] = values
    return square


def _in_float64(features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for rows, of in zip(features.split(ROWS_AT_A_TIME), labels.split(ROWS_AT_A_TIME), strict=True):
        yield rows.double(), of
