"""The text probe of this project, the default method: a convex classifier on frozen features, which starts at zero-shot
CLIP's logits and blends what images and texts say.

`dcp_zoo.probe` has its equations, and fits it to features. It can also follow another method whose heads are not fitted
to features of the training images themselves, and then starts at the logits of that one: `fit_head` calls `fit_probe`
after any method whose recipe names it, the default method's being zero-shot CLIP until then.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.backbone.clip import Linear
from dcp_zoo.data import Item
from dcp_zoo.data.packaged import everyday_pictures
from dcp_zoo.errors import ZooError, warn
from dcp_zoo.heads.head import Head
from dcp_zoo.probe.fit import ReadingFeatures, fit_on_features
from dcp_zoo.probe.threshold import THRESHOLD_IMAGES, share_above, thresholds_of
from dcp_zoo.tables import REFUSED
from dcp_zoo.training.methods.zero_shot import ZERO_SHOT
from dcp_zoo.training.recipes import EXAMPLES_UNUSED, MANY, PROBE_REFUSED, BaseRecipe, changed
from dcp_zoo.training.sources import ImageSource, Progress, features_of, image_source, no_progress

TOO_FEW = "without a threshold nothing is rejected. It needs 20 images of the classes, at least two of one class"


@dataclass(frozen=True)
class TextProbeRecipe(BaseRecipe):
    classifier: str = changed(BaseRecipe, "classifier", "text-probe")


@torch.no_grad()
def fit_probe(
    head: Head,
    train: ImageSource,
    progress: Progress = no_progress,
    weights: Tensor | None = None,
    none: ImageSource | None = None,
    checks: ImageSource | None = None,
) -> dict[str, object]:
    """Give a head, with stored statistics if it is a DCP, a text probe; returns how it was fitted. `weights` (n,) are
    those of the training images' losses, `none` examples of images of no class; `checks`, images of the classes, set
    the threshold if they are enough. ZooError for a head whose logits are no linear function of its features, or were
    fitted to features of the training images."""
    if head.abilities.fitted:
        raise ZooError(PROBE_REFUSED.format(head.method))
    if head.stats != "stored":
        raise ZooError("A text probe needs stored statistics: call model.store_stats(images) first.")
    head.text_probe, count, readings = None, probe_views(train), list[ReadingFeatures]()
    for reading in head.readings:
        features = train.read_by(reading, count, progress)
        given = reading if features.shape[-1] == sum(reading.widths) else reading.only()  # no more is given
        start = on_cpu(reading.start()) if reading.start else None
        readings.append(ReadingFeatures(features, start, given.widths, given.inside))
    unseen = on_cpu(head.zero_shot_linear())
    typical = torch.tensor([not item.added for item in train.items])
    frozen = head.readings[head.has_own_features :]
    examples = None if none is None else torch.cat([none.read_by(each, 1, progress)[0] for each in frozen], -1)
    head.text_probe, info = fit_on_features(
        head.classes, train.labels, readings, unseen, weights, typical, examples, train.groups
    )
    thresholds = info.get("thresholds")
    if none is not None and not thresholds:
        warn(EXAMPLES_UNUSED.format(len(none.items), TOO_FEW))
    head.to(head.device)
    if thresholds and checks and len(checks.items) >= THRESHOLD_IMAGES:
        thresholds = thresholds_of(torch.from_numpy(scores_of(head, checks, progress)))
        head.text_probe.threshold.fill_(thresholds[f"{REFUSED:g}"])
        info["thresholds"] = {rate: round(value, 6) for rate, value in thresholds.items()}
        info.pop("like_accepted", None)  # by the other thresholds
    if thresholds and not train.has_features:
        pictures = [Item(picture, "", 0) for picture in everyday_pictures()]
        shown = image_source(head.frozen, pictures, once=True, precision=train.precision)
        info["others_accepted"] = share_above(thresholds, scores_of(head, shown))
    return info


def scores_of(head: Head, images: ImageSource, progress: Progress = no_progress) -> np.ndarray:
    """The `in_distribution_score`s (n,) of images."""
    features = features_of(head, images, 1, progress)[0].to(head.device)
    logits, distances = (each.float().cpu().numpy() for each in (head.classify(features), head.distances(features)))
    return in_distribution_score(logits, distances)


def probe_views(train: ImageSource) -> int:
    """How many views of each training image a text probe is fitted to: of many, not also their mirror images."""
    return 2 if len(train.items) <= MANY else 1


def on_cpu(linear: Linear) -> Linear:
    """A linear function in float32 on the CPU."""
    return linear[0].float().cpu(), linear[1].float().cpu()


REFERENCE = "this project, see docs/baselines.md"
TEXT_PROBE = replace(ZERO_SHOT, name="text-probe", title="Text probe", reference=REFERENCE, config=TextProbeRecipe)
