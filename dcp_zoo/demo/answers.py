"""Computes what the page shows for photographs and class names. The models come from `heads.acquire`."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

import torch

from dcp_zoo.data import DATASETS
from dcp_zoo.demo.photos import Photo
from dcp_zoo.insight.zero_shot import zero_shot_classifier, zero_shot_logits
from dcp_zoo.model.dcp import DCP
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
    """The logits of one image in a batch with certain others, for selected classes, and its top class."""

    name: str
    logits: list[float]
    top: str


def to_batch(model: DCP, photos: Sequence[Photo]) -> torch.Tensor:
    """Photographs -> images (B, 3, H, W) on the model's device."""
    transform = create_transform(model)
    return torch.stack([transform(photo.image) for photo in photos]).to(model.prompts["vision"].device)


def all_answers(logits: torch.Tensor, names: Sequence[str]) -> list[Answer]:
    """logits (C,) -> one answer per class, in order."""
    return [Answer(*row) for row in zip(names, logits.tolist(), logits.softmax(-1).tolist(), strict=True)]


def best(answers: Sequence[Answer], n: int = TOP) -> list[Answer]:
    return sorted(answers, key=lambda answer: -answer.logit)[:n]


@torch.inference_mode()
def classify(model: DCP, photos: Sequence[Photo]) -> list[list[Answer]]:
    """All classes for each photograph, in class order, with the model's default context."""
    return [all_answers(row, model.classnames) for row in model(to_batch(model, photos))]


@torch.inference_mode()
def zero_shot(model: DCP, photos: Sequence[Photo]) -> list[list[Answer]]:
    """The same with CLIP without prompts, and the zero-shot template of the head's dataset."""
    spec = DATASETS.get(str(model.info.get("dataset")))
    classifier = zero_shot_classifier(model, model.classnames, spec.template if spec else "a photo of a {}.")
    return [all_answers(row, model.classnames) for row in zero_shot_logits(model, to_batch(model, photos), classifier)]


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
    model: DCP, photos: Sequence[Photo], index: int, others: int = 3
) -> tuple[list[str], list[BatchEffect]]:
    """How the logits of photograph `index` depend on the images next to it.

    Returns:
        The names of the selected classes, which are the top ones of the photograph alone; and the photograph's logits
        with the calibrated context, if there is one (alone, as other images do not matter, see `calibrated_shift`),
        then with the batch context: alone, with each of up to `others` others, and with all.
    """
    images = to_batch(model, photos)
    rest = [i for i in range(len(photos)) if i != index]
    groups = {"alone": [index]} | {f"with {photos[i].name}": [index, i] for i in rest[:others]}
    if len(rest) > 1:
        groups["with all"] = [index, *rest]
    model.context = "batch"
    rows = {name: model(images[group])[0] for name, group in groups.items()}
    if model.calibrated is not None:
        model.context = "calibrated"
        rows = {"calibrated": model(images[[index]])[0]} | rows
    selected = rows["alone"].topk(min(TOP, model.num_classes)).indices
    names = [model.classnames[i] for i in selected]
    return names, [
        BatchEffect(name, row[selected].tolist(), model.classnames[int(row.argmax())]) for name, row in rows.items()
    ]


@torch.inference_mode()
def calibrated_shift(model: DCP, photos: Sequence[Photo], index: int) -> float | None:
    """The largest change of any logit of photograph `index` between alone and in a batch with all, when calibrated."""
    if model.calibrated is None:
        return None
    model.context = "calibrated"
    images = to_batch(model, photos)
    return (model(images)[index] - model(images[[index]])[0]).abs().max().item()
