"""Train the methods of `dcp_zoo.methods` other than DCP on labelled images."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dcp_zoo.api.inputs import Labelled
from dcp_zoo.data import Item
from dcp_zoo.methods import METHODS
from dcp_zoo.methods.base import PlainCLIP, Task, plain_clip
from dcp_zoo.methods.heads import fit_head
from dcp_zoo.training.loop import pick_device
from dcp_zoo.training.sources import ImageSource, Progress, image_source
from dcp_zoo.zoo.factory import create_transform
from dcp_zoo.zoo.registry import get_spec

TEMPLATE = "a photo of a {}."
CACHES = ("tip-adapter", "tip-adapter-f")  # their classifiers keep the training images, and cannot be heads


class CacheModel:
    """A classifier that is no head, and the CLIP that its images are prepared for."""

    def __init__(self, task: Task, method: str) -> None:
        self.clip, self.classifier = task.clip, METHODS[method].fit(task)

    def logits(self, items: Sequence[Item]) -> torch.Tensor:
        """Logits (n, C) of the items' images, on the CPU."""
        return self.classifier.logits(plain_source(self.clip, items))


def fit_method(
    method: str,
    model: str,
    data: Labelled,
    val: Sequence[Item],
    changes: Mapping[str, Any],
    seed: int,
    device: str,
    precision: str,
    progress: Progress,
) -> Any:
    """Train a method -> a `LinearHead`, or for a method that cannot be a head a `CacheModel`.

    Args:
        method: a name in `METHODS`.
        model: a model of the zoo.
        data: the training images.
        val: images for choosing hyperparameters, with the same classes; may be empty.
        changes: to the method's recipe.
        seed, device, precision, progress: see `dcp_zoo.train`.

    Raises:
        ZooError: an unknown model or recipe field, or an error of the method.
    """
    clip = plain_clip(model).to(pick_device(device))
    shots = int(torch.bincount(torch.tensor([item.label for item in data.items])).max())
    recipe = METHODS[method].recipe(model, "folder", shots, "few-shot").updated(changes, where="recipe")
    train = image_source(clip, data.items, recipe.augment, progress=progress)
    validation = plain_source(clip, val) if val else None
    task = Task(clip, model, data.names, TEMPLATE, train, validation, recipe, seed, precision, progress)
    if method in CACHES:
        return CacheModel(task, method)
    head = fit_head(method, task)
    head.architecture, head.clip_source = model, get_spec(model).clip_pretrained
    head.info |= {"recipe": recipe.as_dict(), "seed": seed}
    return head.eval()


def plain_source(clip: PlainCLIP, items: Sequence[Item]) -> ImageSource:
    return ImageSource(clip, items, create_transform(clip))
