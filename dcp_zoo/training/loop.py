"""The training loop of all methods that train by gradients, and training of prompts by epochs."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.backbone._torch import seeded
from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.errors import warn
from dcp_zoo.features import Batch, autocast
from dcp_zoo.heads.head import Head
from dcp_zoo.progress import Progress
from dcp_zoo.training.recipes import TrainingRecipe, batch_sizes
from dcp_zoo.training.state import TrainingState
from dcp_zoo.training.task import Epoch, Task

NOT_LEARNT = 0.4  # of the loss of a random guess: training images with a higher loss are not learnt
# inputs and labels of a batch, and its targets if there are any -> the loss; or the loss, and a value to
# report instead
Loss = Callable[..., Tensor | tuple[Tensor, Tensor]]
Schedule = Callable[[int], float]  # the learning rate of each step, counted from 0


def descend(
    state: TrainingState,  # which has begun with its optimizer and precision
    loss_of: Loss,
    batches: Iterable[Batch],  # at least the remaining steps' tuples of tensors
    lr_at: Schedule,
    steps: int,  # of the whole run
    progress: Progress,
    after: Callable[[int], object] = lambda step: None,  # called after each step with its number; True ends the run
) -> None:
    """Gradient descent, one step per batch: the loop of every method that trains. The state records the loss
    of every step."""
    device = state.trained[0].device
    done = len(state.losses)
    remaining = steps - done
    with state:
        for step, batch in enumerate(progress(islice(batches, remaining), "training steps", remaining), done):
            for group in state.optimizer.param_groups:
                group["lr"] = lr_at(step)
            tensors = [tensor.to(device, non_blocking=device.type == "cuda") for tensor in batch]
            with autocast(device, state.precision):
                result = loss_of(*tensors)
            loss, reported = result if isinstance(result, tuple) else (result, result)
            state.optimizer.zero_grad()
            state.scaler.scale(loss).backward()
            state.step(reported.item())
            if after(step):
                break


def cosine(peak: float, steps: int, floor: float = 0.0) -> Schedule:
    """The learning rate of each step, from `peak` to `floor` along half a cosine."""
    return lambda step: floor + (peak - floor) * (1 + math.cos(math.pi * step / steps)) / 2


def train(
    task: Task,
    head: Head,
    *,
    loss_of: Loss | None = None,
    epoch_weights: Sequence[float] = (),
    targets: Tensor | None = None,
) -> list[float]:
    """Train what requires gradients in a head, such as its prompts, by the task's recipe. Returns the loss
    of every step. The order of the images, their augmentation and dropout depend only on the task's seed and
    on the step, so that a run can resume after any step, with any number of workers. A head without image
    prompts is trained on features, unless each epoch shows other crops.

    Args:
        head: with fresh prompts and on its device.
        loss_of: by default the cross-entropy.
        epoch_weights: of the epochs, with a sum of 1: the trained tensors become their average over the
            epochs. By default they are those of the last epoch.
        targets: for the loss, see `ImageLoader.shuffled`. Default: none.
    """
    images = task.images if head.has_image_prompts else task.feature_loader()
    recipe: TrainingRecipe = task.recipe
    sizes = batch_sizes(len(images), recipe.batch_size, recipe.drop_last)
    per_epoch = len(sizes)
    steps = recipe.num_epochs * per_epoch
    trained = [p for p in head.parameters() if p.requires_grad]
    optimizer = build_optimizer(recipe, trained)
    compute = loss_of or partial(cross_entropy, head)

    @torch.no_grad()
    def add_to_average(step: int) -> None:
        """Part of each step: add the tensors to their average, in the optimizer's state, after the last step of
        an epoch."""
        epoch, within = divmod(step, per_epoch)
        if epoch_weights and within == per_epoch - 1:
            for p in trained:
                average = optimizer.state[p].setdefault("average", torch.zeros_like(p))
                average.add_(p, alpha=epoch_weights[epoch])

    state = (task.state or TrainingState()).begin(optimizer, task.precision, add_to_average)
    losses = state.losses
    size = f"{sum(p.numel() for p in trained):,} trained parameters"
    state.log(f"{steps:,} steps of at most {recipe.batch_size} images; {size}.")

    def seeded_loss(*batch: Any) -> Tensor | tuple[Tensor, Tensor]:
        with seeded(mixed_seed(task.seed, len(losses), 1), head.device):  # dropout depends on the step only
            return compute(*batch)

    def batches() -> Iterator[Batch]:
        first_epoch, first = divmod(len(losses), per_epoch)
        for epoch in range(first_epoch, recipe.num_epochs):
            generator = torch.Generator().manual_seed(mixed_seed(task.seed, epoch))
            yield from images.shuffled(sizes, generator, first=first, targets=targets)
            first = 0

    def after(step: int) -> bool:
        """After an epoch, call the callbacks; whether one of them ends the run."""
        if (step + 1) % per_epoch:
            return False
        epoch = step // per_epoch
        completed = Epoch(epoch + 1, step + 1, recipe.lr_at(epoch), fmean(losses[-per_epoch:]))
        stops = [callback(head, completed) for callback in task.callbacks]
        return any(stops)

    head.train()
    descend(state, seeded_loss, batches(), lambda step: recipe.lr_at(step // per_epoch), steps, task.progress, after)
    head.eval()
    if epoch_weights:
        run = sum(epoch_weights[: len(losses) // per_epoch])
        for p in trained:
            p.data.copy_(optimizer.state[p]["average"] / run)
    warn_if_not_learnt(fmean(losses[-per_epoch:]), images.num_classes, recipe.num_epochs)
    return losses


def cross_entropy(head: Head, inputs: Inputs, labels: Tensor) -> Tensor:
    return F.cross_entropy(head(inputs).float(), labels)


def warn_if_not_learnt(loss: float, classes: int, epochs: int) -> None:
    """Warn if the loss on the training images is above `NOT_LEARNT` of a guess's."""
    guess = math.log(max(classes, 2))
    if loss > NOT_LEARNT * guess:
        warn(
            f"Training has not converged: the loss on the training images is {loss:.2f} at the end, where guessing "
            f"gives {guess:.2f}. Train longer, as by --set epochs={3 * epochs}, or check that the labels are right."
        )


def build_optimizer(recipe: TrainingRecipe, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The recipe's optimizer."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, recipe.lr, weight_decay=recipe.weight_decay)


def mixed_seed(*numbers: int) -> int:
    """Combine several numbers into a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
