"""Computes what the page shows for photographs and class names. The models come from `heads.acquire`."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch
from PIL import Image

from dcp_zoo.data import DATASETS
from dcp_zoo.demo.photos import Photo
from dcp_zoo.model.names import TEMPLATE
from dcp_zoo.zoo.factory import create_transform

TOP = 5


class Answer(NamedTuple):
    """One class for one image."""

    name: str
    logit: float
    probability: float


class Change(NamedTuple):
    """One class before and after an edit of the class names; None where it is not in the list."""

    before: Answer | None
    after: Answer | None


class BatchEffect(NamedTuple):
    """The logits of one image for selected classes, in one stats and next to these images, and its top class."""

    stats: str
    others: str
    logits: list[float]
    top: str


def to_batch(model: Any, images: Sequence[Image.Image]) -> torch.Tensor:
    """Images (B, 3, H, W) on the model's device."""
    transform = create_transform(model)
    return torch.stack([transform(image) for image in images]).to(model.device)


def of_photos(model: Any, photos: Sequence[Photo]) -> torch.Tensor:
    """`to_batch` of photographs."""
    return to_batch(model, [photo.image for photo in photos])


def all_answers(logits: torch.Tensor, names: Sequence[str]) -> list[Answer]:
    """logits (C,) -> one answer per class, in order."""
    return [Answer(*row) for row in zip(names, logits.tolist(), logits.softmax(-1).tolist(), strict=True)]


def best(answers: Sequence[Answer], n: int = TOP) -> list[Answer]:
    return sorted(answers, key=lambda answer: -answer.logit)[:n]


@torch.inference_mode()
def classify(model: Any, photos: Sequence[Photo]) -> list[list[Answer]]:
    """All classes for each photograph, in class order, with the model's default stats."""
    return [all_answers(row, model.classnames) for row in model(of_photos(model, photos))]


def can_compare(model: Any) -> bool:
    """Whether the model has CLIP's own image tower, so that CLIP without training can be shown next to it."""
    return not getattr(model, "changed", None)


def zero_shot(model: Any, images: Sequence[Image.Image]) -> list[list[Answer]]:
    """All classes for each image with CLIP without training, and the zero-shot template of the head's dataset."""
    spec = DATASETS.get(str(model.info.get("dataset")))
    classifier = model.zero_shot_classifier(model.classnames, spec.template if spec else TEMPLATE)
    logits = model.zero_shot_logits(to_batch(model, images), classifier)
    return [all_answers(row, model.classnames) for row in logits]


def can_reject(model: Any) -> bool:
    """Whether the model can answer "none of these", among its present classes."""
    return not model.cannot_reject


def rejected(model: Any, photos: Sequence[Photo]) -> list[bool]:
    """Whether each photograph belongs to none of the model's classes."""
    return [name is None for name in model.predict(of_photos(model, photos), reject=True)]


def changes(before: Sequence[Answer], after: Sequence[Answer], n: int = 8) -> list[Change]:
    """Answers in class order before and after an edit of the class names -> the `n` most probable classes, paired.

    Names in both lists are paired, and so are runs of new names that replace equally many old ones.
    """
    matcher = SequenceMatcher(None, [a.name for a in before], [a.name for a in after], autojunk=False)
    pairs = []
    for _, i, i_end, j, j_end in matcher.get_opcodes():
        if i_end - i == j_end - j:
            pairs += [Change(*pair) for pair in zip(before[i:i_end], after[j:j_end], strict=True)]
        else:
            pairs += [Change(answer, None) for answer in before[i:i_end]]
            pairs += [Change(None, answer) for answer in after[j:j_end]]
    return sorted(pairs, key=lambda pair: -max(a.probability for a in pair if a))[:n]


@torch.inference_mode()
def batch_effects(
    model: Any, photos: Sequence[Photo], index: int, others: int = 3
) -> tuple[list[str], list[BatchEffect]]:
    """How the logits of photograph `index` depend on the images next to it.

    Returns:
        The names of the selected classes, which are the top ones of the photograph alone in the batch statistics; and
        the photograph's logits, in two decimals: in the batch statistics alone, with each of up to `others` others, and
        with all; in the stored statistics, if the head has one, alone and with all.
    """
    images = of_photos(model, photos)
    rest = [i for i in range(len(photos)) if i != index]
    alone, together = ("none", [index]), [("all", [index, *rest])] if len(rest) > 1 else []
    single = [(photos[i].name, [index, i]) for i in rest[:others]]
    groups = [("batch", *group) for group in (alone, *single, *together)]
    if model.stored_stats is not None:
        groups += [("stored", *group) for group in (alone, *(together or single))]
    logits = []
    for stats, _, group in groups:
        model.stats = stats
        logits.append(model(images[group])[0])
    selected = logits[0].topk(min(TOP, model.num_classes)).indices
    return [model.classnames[i] for i in selected], [
        BatchEffect(stats, name, [round(x, 2) for x in row[selected].tolist()], model.classnames[int(row.argmax())])
        for (stats, name, _), row in zip(groups, logits, strict=True)
    ]
