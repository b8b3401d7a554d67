"""The text probe of this project, the default method: a convex classifier on frozen features, which starts
at zero-shot CLIP's logits and blends what images and texts say.

`dcp_zoo.probe` has its equations, and fits it to features. It can also follow another method whose heads are
not fitted to features of the training images themselves, and then starts at the logits of that one:
`fit_head` calls `fit_probe` after any method whose recipe names it, the default method's being zero-shot
CLIP until then.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from safetensors import safe_open

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.backbone.clip import FrozenCLIP, WeightAndBias
from dcp_zoo.data import Item
from dcp_zoo.data.packaged import everyday_file, everyday_pictures
from dcp_zoo.errors import warn
from dcp_zoo.features import PLAIN, FeatureExtractor, FeatureTable, ImageLoader, Photos, is_plain_reading
from dcp_zoo.heads.config import PROMISES
from dcp_zoo.heads.head import Head
from dcp_zoo.probe.fit import ReadingFeatures, fit_on_features
from dcp_zoo.probe.folds import shares
from dcp_zoo.probe.threshold import THRESHOLD_IMAGES, promises_of, share_above, thresholds_of
from dcp_zoo.rejection import REFUSED
from dcp_zoo.training.methods.linear import ZERO_SHOT
from dcp_zoo.training.recipes import EXAMPLES_UNUSED, BaseRecipe
from dcp_zoo.training.task import IMAGES_ALONE, ProbeInputs

TOO_FEW = "without a threshold nothing is rejected. It needs 20 images of the classes, at least two of one class"


@dataclass(frozen=True)
class TextProbeRecipe(BaseRecipe, classifier="text-probe"):
    """Nothing is trained before the text probe."""


@torch.no_grad()
def fit_probe(head: Head, images: ImageLoader, given: ProbeInputs = IMAGES_ALONE) -> dict[str, object]:
    """Give a head, with stored statistics if it is a DCP, a text probe; returns how it was fitted."""
    head.text_probe = None
    head.image_encoders.extend(given.encoders)
    readings = head.available_readings
    table = images.table(readings, images.with_flips)
    features = [
        ReadingFeatures(
            table.reading(i).rows(*table.views),
            on_cpu(reading.linear()) if reading.linear else None,
            reading.only(len(table.widths[i])).parts,
        )
        for i, reading in enumerate(readings)
    ]
    unseen = on_cpu(head.zero_shot_linear())
    typical = torch.tensor([not item.added for item in images.items])
    frozen = readings[head.has_own_features :]
    examples = None if given.none is None else given.none.table(frozen).rows()[0]
    head.text_probe, info = fit_on_features(
        head.classes,
        table.labels,
        features,
        unseen,
        given.weights,
        typical,
        examples,
        table.groups,
        given.describes,
        images.total,
    )
    thresholds = info.get("thresholds")
    held_out = head.text_probe.held_out
    if given.none is not None and not thresholds:
        warn(EXAMPLES_UNUSED.format(len(given.none), TOO_FEW))
    head.to(head.device)
    if thresholds and given.checks and len(given.checks) >= THRESHOLD_IMAGES:
        scores = torch.from_numpy(scores_of(head, given.checks.table(head.readings)))
        thresholds = thresholds_of(scores)
        head.text_probe.threshold.fill_(thresholds[f"{REFUSED:g}"])
        info["thresholds"] = {rate: round(value, 6) for rate, value in thresholds.items()}
        assert held_out is not None
        assert held_out.scores is not None
        held_out = held_out._replace(rejected=held_out.scores < head.text_probe.threshold)
        head.text_probe.held_out = held_out
        info.pop("like_accepted", None)  # by the other thresholds
    start = features[0].start
    has_seen_none = not head.has_own_features and start is not None and torch.equal(start[0], unseen[0])
    if thresholds and held_out is not None and has_seen_none:  # the method, of what was left out
        counts = (shares(table.groups) * typical)[held_out.positions]  # corrections are hard ones
        info[PROMISES] = promises_of(held_out, table.labels[held_out.positions], counts)
    if thresholds and given.describes and images.extract is not None:
        info["others_accepted"] = share_above(thresholds, scores_of(head, everyday(head, images.extract)))
    return info


def everyday(head: Head, extract: FeatureExtractor) -> FeatureTable:
    """The everyday pictures; their features where the package has them, as all that the head reads is plain
    CLIP's."""
    reads = head.readings
    is_plain = all(is_plain_reading(reading, extract.clip) for reading in reads)
    file = everyday_file(extract.clip.architecture)
    if extract.precision == "float32" and is_plain and file.exists():
        with safe_open(file, "pt") as known:
            if known.metadata() == origin(extract.clip):  # not of other weights
                features = known.get_tensor("features").float()
                width = sum(reads[0].widths)
                return FeatureTable([], {PLAIN: features[:, :width]}, [reads[0].widths])
    return extract(Photos([Item(picture, "", 0) for picture in everyday_pictures()]), reads)


def origin(clip: FrozenCLIP) -> dict[str, str]:
    """What features of the everyday pictures depend on, in the file that has them."""
    return {"weights": clip.fingerprint(), "preprocessing": clip.preprocessing}


def scores_of(head: Head, table: FeatureTable) -> np.ndarray:
    """The `in_distribution_score`s (n,) of images, of which the table has what the head reads."""
    features = table.joined.to(head.device)
    logits = head.classify(features).float().cpu().numpy()
    distances = head.distances(features).float().cpu().numpy()
    return in_distribution_score(logits, distances)


def on_cpu(linear: WeightAndBias) -> WeightAndBias:
    """A linear function in float32 on the CPU."""
    return linear[0].float().cpu(), linear[1].float().cpu()


TEXT_PROBE = replace(
    ZERO_SHOT,
    name="text-probe",
    title="Text probe",
    reference="this project, see docs/baselines.md",
    config=TextProbeRecipe,
)
