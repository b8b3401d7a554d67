"""Shared by methods: the task that one is given, the classifier that it returns, and training with a loss of its own.

Shapes: n or B images, C classes, E embedding.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import Texts, check_classnames, class_texts, end_positions, mean_of_texts
from dcp_zoo.model.towers.blocks import Block
from dcp_zoo.model.towers.text import shares_prefix
from dcp_zoo.training.loop import build_optimizer, cosine, descend
from dcp_zoo.training.sources import ImageSource, Progress, encode_views, image_source, no_progress
from dcp_zoo.training.state import TrainingState

FINAL_LR = 1e-6  # of CLIP-LoRA and 2SFS
Loss = Callable[[Tensor, Tensor], Tensor]  # inputs and labels of a batch -> its loss


@torch.no_grad()
def frozen_features(clip: FrozenCLIP, source: ImageSource, progress: Progress = no_progress) -> Tensor:
    """Normalised features (views, n, E) of the plain image tower in float32, on the CPU; cached in the source. The
    source must not augment randomly: its images are read only once."""
    if source.features is None:
        source.features = encode_views(source, clip.encode_image, source.flips, progress, kept="features")
    return source.features


def encode_images(clip: FrozenCLIP, source: ImageSource, progress: Progress = no_progress) -> Tensor:
    """One pass over a source, in order -> normalised features (n, E) in float32, on the CPU, of view 0."""
    return encode_views(source.first_view, clip.encode_image, progress=progress)[0]


@dataclass
class Task:
    """The input of every method: the same images, budget and seed.

    Attributes:
        clip: the plain CLIP on its device; methods do not change it.
        model: its name in the zoo.
        classnames, template: of the dataset; the template is its zero-shot prompt, or sentences of each class.
        train: the few-shot training images, augmented as in the recipe; None for methods that do not train.
        val: few-shot validation images, the only ones for choosing hyperparameters; None if there are none.
        recipe: the method's hyperparameters.
        seed: of all random draws.
        precision: of training; logits are computed in float32.
    """

    clip: FrozenCLIP
    model: str
    classnames: Sequence[str]
    template: Texts
    train: ImageSource | None
    val: ImageSource | None
    recipe: Any
    seed: int = 1
    precision: str = "float32"
    progress: Progress = no_progress

    @property
    def text(self) -> Tensor:
        """Zero-shot CLIP's normalised text features (C, E) of the class names."""
        return self.clip.zero_shot_classifier(check_classnames(self.classnames), self.template)

    @property
    def train_images(self) -> ImageSource:
        """The training images, augmented as in the recipe; without augmentation, only view 0."""
        assert self.train is not None
        return self.train.first_view if self.recipe.augment == "none" else self.train

    @property
    def plain_train(self) -> ImageSource:
        """A source of the unaugmented training images; if it has views, view 0 is the unaugmented one."""
        assert self.train is not None
        if self.recipe.augment == "none" or self.train.views is not None:
            return self.train
        return image_source(self.train.model, self.train.items, "none", self.train.workers, self.progress)


def feature_view(task: Task) -> ImageSource:
    """The training images as features of the frozen image tower, unless random crops need that in every step."""
    train = task.train
    assert train is not None
    if train.views is None and task.recipe.augment == "crop-flip":
        return train
    features = frozen_features(task.clip, train, task.progress)
    return replace(train, views=features[:1] if task.recipe.augment == "none" else features)


def augmented_features(task: Task, passes: int) -> Tensor:
    """Normalised features (V, n, E) of V augmented views of the training images, on the CPU: all views if these can be
    computed in advance, otherwise as many random `passes`."""
    view = feature_view(task)
    if view.views is not None:
        return view.views
    return torch.stack([encode_images(task.clip, view, task.progress) for _ in range(passes)])


class Classifier(Protocol):
    """The result of a method; `info` holds hyperparameters chosen on the validation images, for the record."""

    info: dict[str, Any]

    def logits(self, source: ImageSource) -> Tensor:
        """Logits (n, C) of all images of a source, in order, on the CPU."""

    def linear(self) -> tuple[Tensor, Tensor]:
        """The logits' weight (C, E) and bias (C,), if the method's row in the table does not say `linear=False`."""

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        """Classify into these classes; ZooError for methods that are limited to those of their training."""


class FeatureClassifier:
    """A classifier on image features. A method defines `linear`, or `classify` if its logits are not linear. `clip` is
    a copy of the task's CLIP that the method trains; by default it is the task's, whose image features are computed
    once per source for all methods."""

    def __init__(self, task: Task, clip: FrozenCLIP | None = None) -> None:
        self.clip, self.progress, self.is_frozen = clip or task.clip, task.progress, clip is None
        self.info: dict[str, Any] = {}

    def linear(self) -> tuple[Tensor, Tensor]:
        """Weight (C, E) and bias (C,) of the logits."""
        raise NotImplementedError

    def classify(self, features: Tensor) -> Tensor:
        """Normalised image features (n, E) -> logits (n, C)."""
        return F.linear(features, *self.linear())

    def features(self, source: ImageSource) -> Tensor:
        """Normalised image features (n, E) of a source, on the CPU."""
        if self.is_frozen:
            return frozen_features(self.clip, source, self.progress)[0]
        return encode_images(self.clip, source, self.progress)

    @torch.no_grad()
    def logits(self, source: ImageSource) -> Tensor:
        features = self.features(source).to(self.clip.device)
        return torch.cat([self.classify(chunk).cpu() for chunk in features.split(1000)])

    def set_classnames(self, classnames: Sequence[str], template: Texts | None = None) -> None:
        raise ZooError(
            f"{type(self).__name__} is limited to the classes it was trained on. For other class names use a method "
            "that reads them, such as zero-shot, coop or dcp."
        )


class CosineClassifier(FeatureClassifier):
    """Logits are exp(logit_scale) times the cosine of image features and `text`, those of the classes (C, E)."""

    text: Tensor

    def linear(self) -> tuple[Tensor, Tensor]:
        return self.clip.scaled(self.text)

    def classify(self, features: Tensor) -> Tensor:
        return self.clip.logits(features, self.text)


def most_accurate(candidates: Iterable[tuple[Any, Tensor]], labels: Tensor) -> Any:
    """The value of the pair (value, logits (n, C)) that classifies the most images correctly, the first on a tie."""
    hits = [(int((logits.argmax(-1).cpu() == labels).sum()), value) for value, logits in candidates]
    return max(hits, key=lambda pair: pair[0])[1]


def own_clip(clip: FrozenCLIP) -> FrozenCLIP:
    """A copy of a CLIP that a method may train; the shared one is never changed."""
    return FrozenCLIP(copy.deepcopy(clip.clip), clip.tokenizer, clip.pretrained_cfg)


def sentence_ids(clip: FrozenCLIP, classnames: Sequence[str], template: Texts) -> tuple[Tensor, Sequence[int] | None]:
    """Token ids (S, L) of the template filled with each name, or of the sentences of each class, and how many each has,
    see `class_texts`; in a causal tower cut after the longest, as tokens after an end token have no effect there."""
    sentences, counts = class_texts(classnames, template)
    ids = clip.tokenize(sentences)
    return (ids[:, : int(end_positions(clip.text, ids).max()) + 1] if shares_prefix(clip.text) else ids), counts


def sentence_features(clip: FrozenCLIP, ids: Tensor, blocks: Sequence[Block] = ()) -> Tensor:
    """ids (S, L) -> text features (S, E), not normalised; gradients reach all weights that require them, and those of
    `blocks`, which take the place of a causal tower's."""
    if not shares_prefix(clip.text):
        return clip.clip.encode_text(ids, normalize=False)
    text = clip.text
    y = text.token_embedding(ids) + text.positional_embedding[: ids.shape[1]]
    for block in blocks or clip.text_tower.blocks:
        y = block(y, causal=True)
    return clip.text_tower.project(y[torch.arange(len(y), device=y.device), end_positions(text, ids)])


def shuffled(source: ImageSource, batch_size: int, seed: int, drop_last: bool = True) -> Iterator[Any]:
    """An endless stream of (inputs, labels) batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from source.batches(batch_size, generator, drop_last=drop_last)


@torch.no_grad()
def as_features(clip: FrozenCLIP, inputs: Tensor, patches: bool) -> Tensor:
    """A batch of features (B, E) as it is, images or patch maps as their features in a frozen image tower."""
    return inputs if inputs.ndim == 2 else clip.encode_image(inputs, patches=patches)


def zero_shot_loss(task: Task, encode_image: Callable[..., Tensor], encode_text: Callable[[Tensor], Tensor]) -> Loss:
    """Cross-entropy of zero-shot classification by towers that encode images and token ids (S, L) in every step."""
    ids, counts = sentence_ids(task.clip, check_classnames(task.classnames), task.template)
    patches = task.train_images.patches

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        text = mean_of_texts(encode_text(ids), counts)
        logits = task.clip.logits(encode_image(images, patches=patches), text)
        return F.cross_entropy(logits.float(), labels)

    return loss


def train_steps(task: Task, trained: Iterable[Tensor], loss: Loss, source: ImageSource, steps: int) -> list[float]:
    """AdamW with a cosine from the recipe's learning rate to `FINAL_LR`; returns the loss of every step."""
    recipe = task.recipe
    optimizer = torch.optim.AdamW(trained, recipe.lr, weight_decay=recipe.weight_decay)
    state, batches = TrainingState().begin(optimizer, task.precision), shuffled(source, recipe.batch_size, task.seed)
    return descend(state, loss, batches, cosine(recipe.lr, steps, FINAL_LR), steps, task.progress)


def train_epochs(
    task: Task,
    trained: Iterable[Tensor],
    loss: Loss,
    batches: Iterable[Any],
    per_epoch: int,
    after: Callable[[int], object] = lambda step: None,
) -> list[float]:
    """A `TrainingRecipe`'s optimizer and schedule by epochs of so many batches; `after` as in `descend`."""
    recipe = task.recipe
    state = TrainingState().begin(build_optimizer(recipe, trained), task.precision)
    steps = recipe.num_epochs * per_epoch
    return descend(state, loss, batches, lambda step: recipe.lr_at(step // per_epoch), steps, task.progress, after)
