"""Evidence: how much each candidate counts, by its losses on images that were left out.

In proportion to exp(-sum of cross-entropies), which is pseudo Bayesian model averaging (Yao et al., Bayesian Analysis
2018), but of more than `COUNTED` images as if there were so many, or of `OF_FAMILIES` between families: where
thousands of images would choose one candidate, several together are better. Candidates that read the inside of an image
tower must be better by `LEAN`. With one image per class nothing can be left out: see `without_evidence`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.probe import candidates as fitting
from dcp_zoo.probe.candidates import Candidate, Evidence, Family, TrainingSet
from dcp_zoo.probe.estimates import loss_of
from dcp_zoo.probe.folds import without
from dcp_zoo.probe.model import PENALTIES, nearest

COUNTED, OF_FAMILIES = 16, 64  # images
LEAN = 1.5  # nats
HOPELESS = 5.0  # nats behind the best after the first fold
NOTHING = 0.01  # of the evidence: such families are not fitted again


class LeftOut(NamedTuple):
    """Images that were left out, and the candidates that were fitted to the images that were kept."""

    images: TrainingSet
    kept: TrainingSet
    candidates: Mapping[Family, Sequence[Candidate]]

    def losses(self) -> dict[Family, Tensor]:
        """The cross-entropy (weighted sum) of each candidate."""
        x, labels = self.images.views[0], self.images.labels
        z = self.images.text_logits(x)
        return {
            family: torch.stack([loss_of(each.logits(z, x), labels, self.images.weights) for each in candidates])
            for family, candidates in self.candidates.items()
        }

    def logits(self, evidence: Evidence) -> tuple[Tensor, Tensor]:
        """Logits (m, C) by the mean of the candidates, and those that it starts at."""
        x = self.images.views[0]
        mean, text = fitting.mean_of(self.candidates, evidence, x.shape[1]), self.images.text_logits(x)
        return mean.logits(text, x), mean.text * text

    def distances(self, rows: Tensor | None = None) -> Tensor:
        """Distances (m,) to the nearest of these rows (k, W), of joined parts; default: to the means of kept images."""
        rows = self.kept.means[self.kept.counts > 0] if rows is None else rows
        return nearest(self.images.views[0], rows) / math.sqrt(len(self.kept.widths))


def leave_out(images: TrainingSet, positions: Tensor, families: Iterable[Family]) -> LeftOut:
    """Fit these families without the images at these positions."""
    kept = images.of(without(positions, len(images.labels)))
    return LeftOut(images.of(positions), kept, fitting.fit_candidates(kept, families))


def leave_out_each(images: TrainingSet, folds: Sequence[Tensor]) -> tuple[list[LeftOut], Evidence]:
    """Leave out one fold after the other: what was fitted, and its evidence. Families that are `HOPELESS` after the
    first fold are not fitted again. Without folds there is no evidence."""
    if not folds:
        return [], {}
    first = leave_out(images, folds[0], fitting.families_of(images))
    counted = min(1.0, OF_FAMILIES / first.images.count)
    lowest = {family: counted * losses.min() for family, losses in first.losses().items()}
    families = [family for family, loss in lowest.items() if loss < min(lowest.values()) + HOPELESS]
    left_out = [first, *(leave_out(images, positions, families) for positions in folds[1:])]
    losses, none = [each.losses() for each in left_out], torch.zeros(())
    sums = {family: sum((each[family] for each in losses), none) for family in families}
    return left_out, evidence_of(sums, sum(each.images.count for each in left_out), images.inside)


def evidence_of(losses: Mapping[Family, Tensor], images: float = 1, inside: Sequence[int] = ()) -> Evidence:
    """The evidence for candidates by their losses (sum) on so many images that were left out: that of a family by the
    mean loss of its candidates, each by its share.

    A candidate that is worse by log 2 counts half as much:

    >>> evidence_of({Family(0, 1.0): torch.tensor([4.0, 4.0 + math.log(2)]), Family(0, 0.5): torch.tensor([3.0, 9.0])})
    {Family(block=0, text=1.0): tensor([0.1524, 0.0762]), Family(block=0, text=0.5): tensor([0.7695, 0.0019])}
    """
    shares = {family: (-min(1.0, COUNTED / images) * loss).softmax(0) for family, loss in losses.items()}
    means = [min(1.0, OF_FAMILIES / images) * (shares[family] @ loss) for family, loss in losses.items()]
    lean = torch.tensor([LEAN * (family.block in inside) for family in losses])
    weights = dict(zip(losses, (-torch.stack(means) - lean).softmax(0), strict=True))
    total = sum(weight for weight in weights.values() if weight > NOTHING)
    return {family: weight / total * shares[family] for family, weight in weights.items() if weight > NOTHING}


def without_evidence(images: TrainingSet, blocks: int) -> Evidence:
    """What counts if no image can be left out: softmax regressions that start at the text and see one of the first
    blocks. All penalties count the same, unless text explains the training images badly: the i-th one in proportion to
    exp(10 i `surprise`)."""
    weights = (10 * torch.arange(len(PENALTIES)) * surprise(images)).softmax(0)
    families = [family for family in fitting.families_of(images) if family.block < blocks and family.text > 0]
    return dict.fromkeys(families, F.pad(weights, (0, len(fitting.STRENGTHS))) / len(families))


def surprise(images: TrainingSet) -> float:
    """How badly text explains the training images: max(0, r - 1/4), with r zero-shot CLIP's loss in units of a random
    guess's."""
    loss = loss_of(images.text_logits(images.views[0]), images.labels, images.weights).item() / images.count
    return max(0.0, loss / math.log(max(len(images.text[0]), 2)) - 0.25)
