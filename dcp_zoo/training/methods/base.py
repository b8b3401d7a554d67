"""What a method is, and what methods share: the task that one is given, how its features are read, and training with a
loss of its own.

Shapes: n or B images, C classes, E embedding.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from dcp_zoo.backbone.classes import Texts, check_classnames
from dcp_zoo.backbone.clip import FrozenCLIP, ImageEncoder
from dcp_zoo.backbone.inputs import Features
from dcp_zoo.fields import Values
from dcp_zoo.heads.config import Abilities
from dcp_zoo.heads.head import Head
from dcp_zoo.heads.kinds import LinearHead
from dcp_zoo.training.loop import descend, train
from dcp_zoo.training.recipes import BaseRecipe, Recipe, TrainingRecipe, changed, count, default_recipe
from dcp_zoo.training.sources import Batch, ImageSource, Progress, image_source, no_progress
from dcp_zoo.training.state import TrainingState
from dcp_zoo.zoo.registry import get_spec

T = TypeVar("T")
Loss = Callable[[Any, Tensor], Tensor]  # inputs and labels of a batch -> its loss
Schedule = Callable[[int], float]  # the learning rate of each step
# of heads: any class names; its own only; also fitted to features of its images; also no linear function of features
ABLE, CLOSED = Abilities(), Abilities(transfers=False)
FITTED, CACHED = replace(CLOSED, fitted=True), replace(CLOSED, fitted=True, linear=False)
CROPS = "random crops of each training image; not used by a model whose images are only flipped"


@dataclass(frozen=True)
class CropsRecipe(BaseRecipe):
    """For methods that read the features of augmented images once, without a gradient."""

    augment: str = changed(BaseRecipe, "augment", "crop-flip")
    augment_epochs: int = count(10, CROPS)


@dataclass
class Task:
    """The input of every method: the same images, budget and seed.

    Attributes:
        clip: the plain CLIP on its device; methods do not change it.
        model: its name in the zoo.
        classnames, texts: of the dataset; the texts are its zero-shot template, or sentences of each class.
        train: the few-shot training images, augmented as in the recipe; None for methods that do not train.
        val: few-shot validation images, the only ones for choosing hyperparameters; None if there are none.
        recipe: the method's hyperparameters.
        seed: of all random numbers.
        precision: of training; logits are computed in float32.
        training: options of `loop.train`, which trains prompts: its state, callbacks and log.
        probe_weights: of the training images (n,) in the text probe, see `Candidates`. Default: all the same.
        none: images of none of the classes, from which the text probe learns what to reject; None if there are none.
        encoders: that the text probe reads beside CLIP.
        checks: the user's own images for validation, by which the text probe sets its threshold, or None.
    """

    clip: FrozenCLIP
    model: str
    classnames: Sequence[str]
    texts: Texts
    train: ImageSource | None
    val: ImageSource | None
    recipe: Any  # of the method's `config`
    seed: int = 1
    precision: str = "float32"
    progress: Progress = no_progress
    training: Values = field(default_factory=dict)
    probe_weights: Tensor | None = None
    none: ImageSource | None = None
    encoders: Sequence[ImageEncoder] = ()
    checks: ImageSource | None = None

    @property
    def text(self) -> Tensor:
        """Zero-shot CLIP's normalised text features (C, E) of the class names."""
        return self.clip.zero_shot_classifier(check_classnames(self.classnames), self.texts)

    @property
    def train_images(self) -> ImageSource:
        """The training images, augmented as in the recipe; without augmentation, only view 0."""
        assert self.train is not None
        if self.recipe.augment != "none" or self.train.views is None:
            return self.train
        return replace(self.train, views=self.train.views[:1])

    @cached_property
    def plain_train(self) -> ImageSource:
        """A source of the unaugmented training images; if it has views, view 0 is the unaugmented one."""
        assert self.train is not None
        if self.recipe.augment == "none" or self.train.views is not None:
            return self.train
        source, shared = self.train, (self.train.once, self.train.precision, self.train.facts)
        return image_source(source.clip, source.items, "none", source.workers, self.progress, *shared)

    def features(self, source: ImageSource) -> Tensor:
        """Normalised features (n, E) of a source by the plain image tower, in float32 on its device."""
        return source.features(1, self.progress)[0].to(self.clip.device)

    @property
    def train_features(self) -> Tensor:
        """`features` of the unaugmented training images."""
        return self.features(self.plain_train)

    @property
    def train_labels(self) -> Tensor:
        """Labels (n,) of the training images, on the CPU."""
        assert self.train is not None
        return self.train.labels

    def augmented_features(self, passes: int) -> Tensor:
        """Normalised features (V, n, E) of V augmented views of the training images, on the CPU: all views if these can
        be computed in advance, otherwise as many random `passes`."""
        source = self.feature_source
        if source.views is not None:
            return source.views
        return torch.cat([source.features(1, self.progress) for _ in range(passes)])

    @property
    def feature_source(self) -> ImageSource:
        """The training images as features of the plain image tower, unless random crops need that in every step."""
        assert self.train is not None
        if self.train.crops and self.recipe.augment == "crop-flip":
            return self.train
        features = self.train.features(progress=self.progress)
        return replace(self.train, views=features[:1] if self.recipe.augment == "none" else features, form=Features)

    def linear_head(
        self, weight: Tensor, bias: Tensor, *, clip: FrozenCLIP | None = None, texts: Texts = ""
    ) -> LinearHead:
        """A head with this classifier, weight (C, E) and bias (C,).

        Args:
            clip: a copy of the task's CLIP that the method trained. Default: the task's.
            texts: what CLIP reads of new classes: a template, or sentences. Default: the head is limited to its
                classes.
        """
        own = clip or self.clip
        before = self.clip.clip.state_dict() if clip else {}
        after = own.clip.state_dict()
        changed = [name for name in before if not torch.equal(after[name], before[name])]
        return LinearHead(
            own,
            self.classnames,
            weight,
            bias,
            texts=texts,
            changed=[name for name in changed if texts or name.startswith("visual.")],
            original=self.clip if changed else None,
        )

    def text_head(self, text: Tensor, *, clip: FrozenCLIP | None = None, texts: Texts = "") -> LinearHead:
        """`linear_head` whose logits are exp(logit_scale) times the cosine with normalised text features (C, E)."""
        return self.linear_head(*(clip or self.clip).scaled(text), clip=clip, texts=texts)


@dataclass(frozen=True)
class Method:
    """One way to adapt CLIP to a task; `dcp_zoo.training.METHODS` has them by name.

    Attributes:
        name: in results and on the command line.
        title: in tables and figures.
        reference: the paper.
        fit: turns a task into a head; `fit_head` calls it.
        config: the class of its hyperparameters, which `Task.recipe` is of. Default: it has none of its own.
        abilities: of its heads.
        trains: whether it uses training images, besides those of a text probe after it.
        chooses: whether it always chooses hyperparameters on few-shot validation images, if there are any.
        features: whether it needs nothing but image features and text features of the names in one template.
    """

    name: str
    title: str
    reference: str
    fit: Callable[[Task], Head]
    config: type[BaseRecipe] = BaseRecipe
    abilities: Abilities = ABLE
    trains: bool = True
    chooses: bool = False
    features: bool = False

    def recipe(self, model: str, dataset: str, shots: int, protocol: str) -> BaseRecipe:
        """The published hyperparameters for this task, with the model's budget if prompts are trained, and otherwise
        its augmentation: random crops and flips, as published, unless it needs another. The model's row in the registry
        may change values; `per_shot` are multiplied by the number of shots."""
        spec, shots = get_spec(model), max(shots, 1)
        recipe = self.config.for_task(model, dataset, shots, protocol)
        if spec.recipe and not isinstance(recipe, Recipe):  # another optimizer, schedule, batch size and augmentation
            dcps = default_recipe(model, dataset)
            if recipe.is_trained:
                budget = [part.name for part in fields(TrainingRecipe) if part.name != "classifier"]
                recipe = recipe.updated({name: getattr(dcps, name) for name in budget})
            elif recipe.augment != "none":
                recipe = replace(recipe, augment=dcps.augment)
        own = dict(spec.baseline_recipes.get(self.name, {}))
        per_shot = {name: number * shots for name, number in own.pop("per_shot", {}).items()}
        return recipe.updated(own | per_shot)

    def needs_images(self, recipe: BaseRecipe) -> bool:
        """Whether it needs training images with this recipe, for itself or for the classifier after it."""
        return self.trains or recipe.classifier != "none"


def most_accurate(candidates: Iterable[tuple[T, Tensor]], labels: Tensor) -> T:
    """The value of the pair (value, logits (n, C)) that classifies the most images correctly, the first on a tie."""
    hits = [(int((logits.argmax(-1).cpu() == labels).sum()), value) for value, logits in candidates]
    return max(hits, key=lambda pair: pair[0])[1]


def own_clip(clip: FrozenCLIP) -> FrozenCLIP:
    """A copy of a CLIP that a method may train; the shared one is never changed."""
    return clip.with_clip(copy.deepcopy(clip.clip))


def shuffled(source: ImageSource, batch_size: int, seed: int, drop_last: bool = True) -> Iterator[Batch]:
    """An endless stream of (inputs, labels) batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from source.batches(batch_size, generator, drop_last=drop_last)


def train_prompts(task: Task, head: Head, source: ImageSource, **options: Any) -> list[float]:
    """Train what requires gradients in a head by `loop.train`, with the task's options and these; the losses."""
    shared: Values = {"seed": task.seed, "precision": task.precision, "progress": task.progress}
    return train(head, source, task.recipe, **shared, **task.training, **options)


def minimise(
    task: Task, loss: Loss, optimizer: torch.optim.Optimizer, batches: Iterable[Batch], lr_at: Schedule, steps: int
) -> list[float]:
    """`descend` without a state that is saved; returns the loss of every step."""
    state = TrainingState().begin(optimizer, task.precision)
    return descend(state, loss, batches, lr_at, steps, task.progress)
