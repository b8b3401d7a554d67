"""What the page shows of photographs and class names, as numbers. The models come from `heads.acquire`."""

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
    """What became of one class when the class names changed: None on a side where it was not there."""

    before: Answer | None
    after: Answer | None


class Company(NamedTuple):
    """The logits of one image beside certain others: values of the classes asked for, and the top class."""

    name: str
    logits: list[float]
    top: str


def to_batch(model: DCP, photos: Sequence[Photo]) -> torch.Tensor:
    """Photographs -> images (B, 3, H, W) on the model's device."""
    transform = create_transform(model)
    return torch.stack([transform(photo.image) for photo in photos]).to(model.prompts["vision"].device)


def all_answers(logits: torch.Tensor, names: Sequence[str]) -> list[Answer]:
    """logits (C,) -> one answer for each class, in their order."""
    return [Answer(*row) for row in zip(names, logits.tolist(), logits.softmax(-1).tolist(), strict=True)]


def best(answers: Sequence[Answer], n: int = TOP) -> list[Answer]:
    return sorted(answers, key=lambda answer: -answer.logit)[:n]


@torch.inference_mode()
def classify(model: DCP, photos: Sequence[Photo]) -> list[list[Answer]]:
    """Every class for each photograph, in the model's own context and class order."""
    return [all_answers(row, model.classnames) for row in model(to_batch(model, photos))]


@torch.inference_mode()
def zero_shot(model: DCP, photos: Sequence[Photo]) -> list[list[Answer]]:
    """The same from plain CLIP without prompts, with the zero-shot template of the head's dataset."""
    spec = DATASETS.get(str(model.info.get("dataset")))
    classifier = zero_shot_classifier(model, model.classnames, spec.template if spec else "a photo of a {}.")
    return [all_answers(row, model.classnames) for row in zero_shot_logits(model, to_batch(model, photos), classifier)]


def changes(before: Sequence[Answer], after: Sequence[Answer], n: int = 8) -> list[Change]:
    """Answers in class order before and after an edit of the class names -> the `n` most probable classes, paired.

    Names that stand in both lists are pairs, and so are new names in the very places of as many old ones.
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
def companies(model: DCP, photos: Sequence[Photo], index: int, others: int = 3) -> tuple[list[str], list[Company]]:
    """How the logits of photograph `index` depend on the images beside it.

    Returns:
        The names of the classes shown, the best of the photograph alone; and the photograph with the calibrated
        context (if there is one; alone, its largest change in company is nil, see `calibrated_shift`), then in the
        plain method alone, with each of up to `others` others, and with all.
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
    shown = rows["alone"].topk(min(TOP, model.num_classes)).indices
    names = [model.classnames[i] for i in shown]
    return names, [
        Company(name, row[shown].tolist(), model.classnames[int(row.argmax())]) for name, row in rows.items()
    ]


@torch.inference_mode()
def calibrated_shift(model: DCP, photos: Sequence[Photo], index: int) -> float | None:
    """The most that any logit of photograph `index` changes between alone and beside all others, when calibrated."""
    if model.calibrated is None:
        return None
    model.context = "calibrated"
    images = to_batch(model, photos)
    return (model(images)[index] - model(images[[index]])[0]).abs().max().item()
