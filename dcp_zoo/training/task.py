"""What a method is given to make a head, and how it makes one from a classifier that it computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dcp_zoo.backbone.classes import Texts
from dcp_zoo.backbone.clip import FrozenCLIP, ImageEncoder
from dcp_zoo.features import PLAIN, FeatureTable, ImageLoader
from dcp_zoo.features.extract import plain_reading
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.progress import Progress, no_progress
from dcp_zoo.training.state import TrainingState


class Epoch(NamedTuple):
    """One epoch of a run.

    Attributes:
        epoch, step: completed so far.
        lr: learning rate of the epoch.
        loss: mean training loss of the epoch.
    """

    epoch: int
    step: int
    lr: float
    loss: float


# called after every epoch, of a run that resumes only the remaining ones, with the model in training mode;
# True ends it
Callback = Callable[[nn.Module, Epoch], bool | None]


class ProbeInputs(NamedTuple):
    """The inputs of a text probe besides the training images.

    Attributes:
        weights: of the training images' losses (n,), see `Candidates`. Default: all the same.
        none: images of none of the classes, from which it learns what to reject; None if there are none.
        checks: the user's own images for validation, which set its threshold if they are enough, or None.
        encoders: that it reads beside CLIP.
        describes: whether to estimate what its threshold accepts of images of no class, which costs more
            fits.
    """

    weights: Tensor | None = None
    none: ImageLoader | None = None
    checks: ImageLoader | None = None
    encoders: Sequence[ImageEncoder] = ()
    describes: bool = True


IMAGES_ALONE = ProbeInputs()


@dataclass
class Task:
    """The input of every method: the same images, budget and seed.

    Attributes:
        clip: the plain CLIP on its device; methods do not change it.
        model: its name in the zoo.
        classnames, texts: of the dataset; the texts are its zero-shot template, or sentences of each class.
        images: the few-shot training images, shown as in the recipe; methods that do not train read none.
        val: features of few-shot validation images, the only ones for choosing hyperparameters; None if
            there are none.
        recipe: the method's hyperparameters.
        seed: of all random numbers.
        precision: of training, of `PRECISIONS`: autocast over float32 weights; logits are computed in
            float32.
        state: of a training of prompts that is saved and resumed; None saves nothing.
        callbacks: of a training of prompts, see `Callback`.
        probe: what a text probe after the method is given besides the training images.
        train: what a method on features is fitted to: the embeddings (n, E) of the training images by the
            plain CLIP, in the views that `Method.features` names; `fit_head` sets it.
    """

    clip: FrozenCLIP
    model: str
    classnames: Sequence[str]
    texts: Texts
    images: ImageLoader
    val: FeatureTable | None
    recipe: Any  # of the method's `config`
    seed: int = 1
    precision: str = "float32"
    progress: Progress = no_progress
    state: TrainingState | None = None
    callbacks: Sequence[Callback] = ()
    probe: ProbeInputs = IMAGES_ALONE
    train: FeatureTable = field(init=False, repr=False)

    @cached_property
    def text(self) -> Tensor:
        """Zero-shot CLIP's normalised text features (C, E) of the class names."""
        return self.clip.zero_shot_classifier(self.classnames, self.texts)

    def embeddings(self, table: FeatureTable) -> Tensor:
        """The plain view's embeddings (n, E), on the device."""
        return table.embeddings.rows(PLAIN)[0].to(self.clip.device)

    def feature_loader(self, clip: FrozenCLIP | None = None) -> ImageLoader:
        """The training images as features of a CLIP, by default the plain one, unless each epoch shows other
        crops."""
        if self.images.crops:
            return self.images
        features = self.images.table([plain_reading(clip or self.clip)], self.images.training_views).embeddings
        return ImageLoader.of_features(features, self.images.augment)

    def linear_head(self, weight: Tensor, bias: Tensor) -> LinearHead:
        """A head with this classifier, weight (C, E) and bias (C,), of these classes alone."""
        return LinearHead(self.clip, self.classnames, weight, bias)

    def text_head(self, text: Tensor, *, clip: FrozenCLIP | None = None, texts: Texts = "") -> LinearHead:
        """A head whose logits are exp(logit_scale) times the cosine with normalised text features (C, E).

        Args:
            clip: a copy of the task's CLIP that the method trained. Default: the task's.
            texts: what CLIP reads of new classes: a template, or sentences. Default: the head is limited to
                its classes.
        """
        changed: list[str] = []
        if clip is not None:
            before = self.clip.clip.state_dict()
            changed = [name for name, after in clip.clip.state_dict().items() if not torch.equal(after, before[name])]
        original = self.clip if changed else None
        if not texts:  # the text tower is not read again
            changed = [name for name in changed if name.startswith("visual.")]
        clip = clip or self.clip
        weight, bias = clip.scaled(text)
        return LinearHead(clip, self.classnames, weight, bias, texts=texts, changed=changed, original=original)
