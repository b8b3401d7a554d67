"""What a method is, and what methods share: the views that they are fitted to, and training with a loss of
their own.

Shapes: n or B images, C classes, E embedding.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.features import MIRRORED, PLAIN, Batch, ImageLoader, Views, crop_views
from dcp_zoo.heads.config import Abilities
from dcp_zoo.heads.head import Head
from dcp_zoo.training.loop import Loss, Schedule, build_optimizer, cosine, descend
from dcp_zoo.training.recipes import BaseRecipe, Recipe, TrainingRecipe, batch_sizes, count, default_recipe
from dcp_zoo.training.state import TrainingState
from dcp_zoo.training.task import Task
from dcp_zoo.zoo.specs import get_spec

T = TypeVar("T")
ABLE = Abilities()
CLOSED = Abilities(transfers=False)  # to its own classes
FITTED = Abilities(transfers=False, fitted=True)
CACHED = Abilities(transfers=False, fitted=True, linear=False)
CROPS = "random crops of each training image; not used by a model whose images are only flipped"


@dataclass(frozen=True)
class CropsRecipe(BaseRecipe, augment="crop-flip"):
    """For methods on features of augmented images."""

    augment_epochs: int = count(10, CROPS)


@dataclass(frozen=True)
class RowsRecipe(TrainingRecipe, batch_size=256):
    """For methods that `train_on_rows`."""

    is_trained = False
    augment_epochs: int = count(20, CROPS)


def plain(task: Task) -> Views:
    """The training images as they are."""
    return (PLAIN,)


def mirrored(task: Task) -> Views:
    """The training images and, unless they are many, their mirror images."""
    return task.images.with_flips


def augmented(task: Task) -> Views:
    """As the recipe says: random crops, a number of each image; the image and its mirror image; or the image
    alone."""
    if task.recipe.augment == "none":
        return (PLAIN,)
    if task.images.extract is None:  # features are given
        return task.images.with_flips
    if task.recipe.augment == "flip":
        return (PLAIN, MIRRORED)
    return crop_views(task.recipe.augment_epochs, task.seed)


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
        features: the views of the training images whose features it is fitted to, such as `plain`; None for
            a method that trains on images. A method on features needs nothing else but text features of the
            names.
    """

    name: str
    title: str
    reference: str
    fit: Callable[[Task], Head]
    config: type[BaseRecipe] = BaseRecipe
    abilities: Abilities = ABLE
    trains: bool = True
    chooses: bool = False
    features: Callable[[Task], Views] | None = None

    def recipe(self, model: str, dataset: str, shots: int, protocol: str) -> BaseRecipe:
        """The published hyperparameters for this task, with the model's budget if prompts are trained, and
        otherwise its augmentation: random crops and flips, as published, unless it needs another. The
        model's row in the registry may change values; `per_shot` are multiplied by the number of shots."""
        spec = get_spec(model)
        shots = max(shots, 1)
        recipe = self.config.for_task(model, dataset, shots, protocol)
        if spec.recipe and not isinstance(recipe, Recipe):  # another optimizer, schedule, batch size and augmentation
            dcp_recipe = default_recipe(model, dataset)
            if recipe.is_trained:
                budget = [part.name for part in fields(TrainingRecipe) if part.name != "classifier"]
                recipe = recipe.updated({name: getattr(dcp_recipe, name) for name in budget})
            elif recipe.augment != "none":
                recipe = replace(recipe, augment=dcp_recipe.augment)
        changes = dict(spec.baseline_recipes.get(self.name, {}))
        per_shot = changes.pop("per_shot", {})
        for name, number in per_shot.items():
            changes[name] = number * shots
        return recipe.updated(changes)

    def needs_images(self, recipe: BaseRecipe) -> bool:
        """Whether it needs training images with this recipe, for itself or for the classifier after it."""
        return self.trains or recipe.classifier != "none"


def most_accurate(candidates: Iterable[tuple[T, Tensor]], labels: Tensor) -> T:
    """The value of the pair (value, logits (n, C)) that classifies the most images correctly, the first on a
    tie."""

    def correct(candidate: tuple[T, Tensor]) -> int:
        return int((candidate[1].argmax(-1).cpu() == labels).sum())

    return max(candidates, key=correct)[0]


def own_clip(clip: FrozenCLIP) -> FrozenCLIP:
    """A copy of a CLIP that a method may train; the shared one is never changed."""
    return clip.with_clip(copy.deepcopy(clip.clip))


def shuffled(images: ImageLoader, batch_size: int, seed: int) -> Iterator[Batch]:
    """An endless stream of (inputs, labels) batches, epoch after epoch."""
    generator = torch.Generator().manual_seed(seed)
    sizes = batch_sizes(len(images), batch_size, drop_last=True)
    while True:
        yield from images.shuffled(sizes, generator)


def minimise(
    task: Task, loss: Loss, optimizer: torch.optim.Optimizer, batches: Iterable[Batch], lr_at: Schedule, steps: int
) -> None:
    """Gradient descent without a state that is saved."""
    state = TrainingState().begin(optimizer, task.precision)
    descend(state, loss, batches, lr_at, steps, task.progress)


def train_on_images(
    task: Task, optimizer: torch.optim.Optimizer, loss: Loss, images: ImageLoader, steps: int, final_lr: float = 0.0
) -> None:
    """Minimise a loss on shuffled batches of images, with a cosine from the recipe's learning rate."""
    recipe = task.recipe
    batches = shuffled(images, recipe.batch_size, task.seed)
    minimise(task, loss, optimizer, batches, cosine(recipe.lr, steps, final_lr), steps)


def train_on_rows(task: Task, trained: Sequence[Tensor], loss: Loss) -> None:
    """Train these tensors on the features of all views of the training images, one row each, by a
    `RowsRecipe`: an epoch has as many batches as there are of images, of rows at random."""
    recipe: RowsRecipe = task.recipe
    views = task.train.rows(*augmented(task))  # (V, n, E)
    rows = views.flatten(0, 1)  # (V n, E)
    labels = task.train.labels.repeat(len(views))
    per_epoch = len(batch_sizes(len(task.train), recipe.batch_size, recipe.drop_last))
    batches = random_rows(rows, labels, recipe.batch_size, per_epoch, task.seed)
    optimizer = build_optimizer(recipe, trained)
    steps = recipe.num_epochs * per_epoch
    minimise(task, loss, optimizer, batches, lambda step: recipe.lr_at(step // per_epoch), steps)


def random_rows(rows: Tensor, labels: Tensor, size: int, per_epoch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless stream of batches of rows and their labels, no row twice in an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for batch in order[: size * per_epoch].split(size):
            yield rows[batch], labels[batch]
