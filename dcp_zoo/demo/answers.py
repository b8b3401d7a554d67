"""What the page shows for photographs and class names. The models come from `heads.acquire`."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import torch

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


class BatchEffect(NamedTuple):
    """The logits of one image for selected classes with some statistics and next to these images; its top class."""

    stats: str
    others: str
    logits: list[float]
    top: str


def to_batch(model: Any, photos: Sequence[Photo]) -> torch.Tensor:
    """Photographs as images (B, 3, H, W) on the model's device."""
    transform = create_transform(model)
    return torch.stack([transform(photo.image) for photo in photos]).to(model.device)


def best(answers: Sequence[Answer], n: int = TOP) -> list[Answer]:
    """The `n` answers with the largest logits, best first."""
    return sorted(answers, key=lambda answer: -answer.logit)[:n]


@torch.inference_mode()
def head_answers(model: Any, photos: Sequence[Photo]) -> list[list[Answer]]:
    """All classes for each photograph, in class order, with the model's default statistics."""
    return _per_class(model, model(to_batch(model, photos)))


def clip_answers(model: Any, photos: Sequence[Photo]) -> list[list[Answer]] | None:
    """The same with CLIP without training, and the zero-shot template of the head's dataset; None for a model that has
    changed CLIP's own image tower."""
    if getattr(model, "changed", None):
        return None
    spec = DATASETS.get(str(model.info.get("dataset")))
    classifier = model.zero_shot_classifier(model.classnames, spec.template if spec else TEMPLATE)
    return _per_class(model, model.zero_shot_logits(to_batch(model, photos), classifier))


def _per_class(model: Any, logits: torch.Tensor) -> list[list[Answer]]:
    """logits (B, C) -> one answer per class for each image."""
    pairs = zip(logits.tolist(), logits.softmax(-1).tolist(), strict=True)
    return [[Answer(*row) for row in zip(model.classnames, *pair, strict=True)] for pair in pairs]


def rejected(model: Any, photos: Sequence[Photo]) -> list[bool]:
    """Whether each photograph belongs to none of the model's classes."""
    return [name is None for name in model.predict(to_batch(model, photos), reject=True)]


def changes(before: Sequence[Answer], after: Sequence[Answer], n: int = 8) -> list[tuple[Answer | None, Answer | None]]:
    """Answers in class order before and after an edit of the class names -> the `n` most probable classes, paired.

    Names in both lists are paired, and so are runs of new names that replace equally many old ones; the others are
    paired with None.
    """
    matcher = SequenceMatcher(None, [a.name for a in before], [a.name for a in after], autojunk=False)
    pairs: list[tuple[Answer | None, Answer | None]] = []
    for _, i, i_end, j, j_end in matcher.get_opcodes():
        if i_end - i == j_end - j:
            pairs += zip(before[i:i_end], after[j:j_end], strict=True)
        else:
            pairs += [(answer, None) for answer in before[i:i_end]] + [(None, answer) for answer in after[j:j_end]]
    return sorted(pairs, key=lambda pair: -max(a.probability for a in pair if a))[:n]


@torch.inference_mode()
def batch_effects(model: Any, photo: Photo, others: Sequence[Photo]) -> tuple[list[str], list[BatchEffect]]:
    """How the logits of a photograph depend on the images next to it.

    Returns:
        The names of the selected classes, which are the top ones of the photograph alone with the statistics of the
        batch; and the photograph's logits, in two decimals: with the statistics of the batch alone, with each of the
        first three others, and with all; with the stored statistics, if the head has them, alone and with all.
    """
    images = to_batch(model, [photo, *others])
    alone, together = ("none", [0]), [("all", list(range(len(images))))] if len(others) > 1 else []
    single = [(other.name, [0, i]) for i, other in enumerate(others[:3], 1)]
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
