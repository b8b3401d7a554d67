"""What all methods share: the plain CLIP, the task that a method is given, and the classifier that it makes of it.

Shapes: n or B images, C classes, E embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import nn

from dcp_zoo.errors import ZooError
from dcp_zoo.model.frozen_clip import FrozenCLIP
from dcp_zoo.model.towers import embed_images, image_features, prompted_vision
from dcp_zoo.training.recipes import TrainingRecipe, default_recipe
from dcp_zoo.training.sources import ImageSource, Progress, no_progress, plain_view
from dcp_zoo.zoo.factory import create_model
from dcp_zoo.zoo.registry import get_spec

EVAL_BATCH = 100  # images at once; no answer depends on it


class PlainCLIP(FrozenCLIP):
    """A CLIP without prompts: the model of the image sources that methods share.

    Args:
        clip, tokenizer: see `FrozenCLIP`.
        pretrained_cfg: timm's, which says how images are prepared.
    """

    def __init__(self, clip: nn.Module, tokenizer: Callable[..., torch.Tensor], pretrained_cfg: dict[str, Any]) -> None:
        super().__init__(clip, tokenizer)
        self.pretrained_cfg = pretrained_cfg
        self.eval()

    def train(self, mode: bool = True) -> "PlainCLIP":
        """Nothing of it trains: it stays in eval mode."""
        return super().train(False)

    def encode_image(
        self, images: torch.Tensor, prompts: Sequence[torch.Tensor] = (), patches: bool = False
    ) -> torch.Tensor:
        """images (B, 3, H, W) -> normalised features (B, E).

        Args:
            images: images, or with `patches` their patch maps (B, Dv, h, w).
            prompts: (M, Dv) each, for the first blocks: they stand at the end of the sequence without a position, and
                the next block's take their place. The first ones pass through `ln_pre`, as all tokens do there.
            patches: see `images`.
        """
        prompts = [*map(self.visual.ln_pre, prompts[:1]), *prompts[1:]]
        x = prompted_vision(self.visual, embed_images(self.visual, images, patches), prompts)
        return image_features(self.visual, x)


def plain_clip(model: str, clip_pretrained: str | None = None) -> PlainCLIP:
    """The CLIP of a model of the zoo, with its weights, on the CPU.

    Args:
        model: a name such as "dcp_vitb16".
        clip_pretrained: another open_clip tag for its weights.

    Raises:
        ZooError: an unknown model or tag.
    """
    dcp = create_model(model, "clip", clip_pretrained=clip_pretrained)
    return PlainCLIP(dcp.clip, dcp.tokenizer, dcp.pretrained_cfg)


@torch.no_grad()
def frozen_features(clip: PlainCLIP, source: ImageSource, progress: Progress = no_progress) -> torch.Tensor:
    """Normalised features (views, n, E) of the plain image tower in float32, on the CPU; kept with the source.

    The source must not augment at random: its images are looked at once.
    """
    if source.features is None:
        views = [source] if source.views is None else [replace(source, views=view[None]) for view in source.views]
        source.features = torch.stack([encode_images(clip, view, progress) for view in views])
    return source.features


@torch.no_grad()
def encode_images(clip: PlainCLIP, source: ImageSource, progress: Progress = no_progress) -> torch.Tensor:
    """One pass over a source, in order -> normalised features (n, E) in float32, on the CPU."""
    batches = progress(source.batches(EVAL_BATCH), "image features", -(-len(source.items) // EVAL_BATCH))
    return torch.cat([clip.encode_image(x.to(clip.device), patches=source.patches).cpu() for x, _ in batches])


@dataclass
class Task:
    """What every method is given: the same images, budget and seed.

    Attributes:
        clip: the plain CLIP on its device; methods leave it as it is.
        model: its name in the zoo.
        classnames, template: of the dataset; the template is its zero-shot prompt.
        train: the few-shot training images, augmented as the recipe says; None where the method does not train.
        val: few-shot validation images, all that a method may choose anything on; None where there are none.
        recipe: the method's numbers.
        seed: of whatever is drawn at random.
        precision: of training; answers are computed in float32.
    """

    clip: PlainCLIP
    model: str
    classnames: Sequence[str]
    template: str
    train: ImageSource | None
    val: ImageSource | None
    recipe: Any
    seed: int = 1
    precision: str = "float32"
    progress: Progress = no_progress

    @property
    def plain_train(self) -> ImageSource:
        """The training images as they are; view 0 is, where a source has views."""
        assert self.train is not None
        if self.recipe.augment == "none" or self.train.views is not None:
            return self.train
        return plain_view(self.train, self.progress)


def feature_view(task: Task) -> ImageSource:
    """The training images as features of the frozen image tower, where all views of them are known beforehand.

    Random crops are not; there the image tower runs in every step.
    """
    train = task.train
    assert train is not None
    if train.views is None and task.recipe.augment != "none":
        return train
    return replace(train, views=frozen_features(task.clip, train, task.progress))


class Classifier(Protocol):
    """What a method makes of a task.

    Attributes:
        info: what it chose on the validation images, for the record.
    """

    info: dict[str, Any]

    def logits(self, source: ImageSource) -> torch.Tensor:
        """Logits (n, C) of all images of a source, in order, on the CPU."""

    def set_classnames(self, classnames: Sequence[str], template: str | None = None) -> None:
        """Classify into these classes from now on, named in this template, default the present one, by a method that
        uses one. ZooError where a method knows only the classes that it was trained on."""


class FeatureClassifier:
    """A classifier over the features of the frozen image tower, which are computed once for every source."""

    def __init__(self, task: Task) -> None:
        self.clip, self.progress = task.clip, task.progress
        self.info: dict[str, Any] = {}

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """Normalised image features (n, E) -> logits (n, C)."""
        raise NotImplementedError

    @torch.no_grad()
    def logits(self, source: ImageSource) -> torch.Tensor:
        features = frozen_features(self.clip, source, self.progress)[0].to(self.clip.device)
        return torch.cat([self.classify(chunk).cpu() for chunk in features.split(1000)])

    def set_classnames(self, classnames: Sequence[str], template: str | None = None) -> None:
        raise ZooError(
            f"{type(self).__name__} knows only the classes that it was trained on: for other class names take a method "
            "that reads them, such as zero-shot, coop or dcp."
        )


def own_budget(model: str, dataset: str) -> dict[str, Any]:
    """Optimizer, schedule, batch and augmentation of a model that needs others than CLIP's: those of its DCP recipe,
    and what the table of models says of its baselines.

    Published numbers were found for CLIP; such a model has nothing of its own in the table of models if they suit it.
    """
    spec = get_spec(model)
    if not spec.recipe:
        return {}
    recipe = default_recipe(model, dataset)
    return {field.name: getattr(recipe, field.name) for field in fields(TrainingRecipe)} | spec.baseline_recipe
