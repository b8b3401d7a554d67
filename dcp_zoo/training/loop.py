"""The training loop, and what it minimises."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dcp_zoo.backbone.inputs import Inputs
from dcp_zoo.fields import Values
from dcp_zoo.heads.head import Head
from dcp_zoo.training.device import autocast
from dcp_zoo.training.evaluation import warn_if_not_learnt
from dcp_zoo.training.recipes import TrainingRecipe, batch_sizes
from dcp_zoo.training.sources import Batch, ImageSource, Progress, no_progress, seeded
from dcp_zoo.training.state import Log, TrainingState, no_log

TEXT_WEIGHT, IMAGE_WEIGHT = 25.0, 10.0  # PromptSRC's


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


# called after every epoch, of a run that resumes only the remaining ones, with the model in training mode; True ends it
Callback = Callable[[nn.Module, Epoch], bool | None]


def descend(
    state: TrainingState,  # which has begun with its optimizer and precision
    # of a batch's tensors: the loss, or the loss and another value to report in its place
    loss_of: Callable[..., Tensor | tuple[Tensor, Tensor]],
    batches: Iterable[Batch],  # at least the remaining steps' tuples of tensors
    lr_at: Callable[[int], float],  # learning rate of a step, counted from 0
    steps: int,  # of the whole run
    progress: Progress = no_progress,
    after: Callable[[int], object] = lambda step: None,  # called after each step with its number; True ends the run
) -> list[float]:
    """Gradient descent, one step per batch: the loop of every method that trains. Returns the loss of every step."""
    trained, done = state.trained, len(state.losses)
    device = trained[0].device
    with state:
        for step, batch in enumerate(progress(islice(batches, steps - done), "training steps", steps - done), done):
            for group in state.optimizer.param_groups:
                group["lr"] = lr_at(step)
            with autocast(device, state.precision):
                result = loss_of(*(t.to(device, non_blocking=device.type == "cuda") for t in batch))
            loss, reported = result if isinstance(result, tuple) else (result, result)
            state.optimizer.zero_grad()
            state.scaler.scale(loss).backward()
            state.step(reported.item())
            if after(step):
                break
    return state.losses


def cosine(peak: float, steps: int, floor: float = 0.0) -> Callable[[int], float]:
    """A schedule: the learning rate of each step, from `peak` to `floor` along half a cosine."""
    return lambda step: floor + (peak - floor) * (1 + math.cos(math.pi * step / steps)) / 2


class EpochAverage:
    """The average of tensors that are trained, after each epoch, with these weights of the epochs, which sum to 1. A
    run that resumes restores what is `kept`: the sums so far, and the epochs in them."""

    def __init__(self, trained: Sequence[Tensor], weights: Sequence[float]) -> None:
        self.trained, self.weights = trained, weights
        self.sums = [torch.zeros_like(p, requires_grad=False) for p in trained]
        self.counted = torch.zeros((), dtype=torch.long)  # epochs in the sums
        self.kept = [*self.sums, self.counted]

    def add(self, epoch: int) -> None:
        """Count the weights after an epoch, before the next one's first step; once, if that fails and is done again."""
        if self.counted > epoch:
            return
        self.counted += 1
        for total, p in zip(self.sums, self.trained, strict=True):
            total.add_(p.detach(), alpha=self.weights[epoch])

    @torch.no_grad()
    def finish(self, epochs: int) -> None:
        """Replace the weights by their average over the epochs that were run, of which the last is counted now."""
        self.add(epochs - 1)
        for p, total in zip(self.trained, self.sums, strict=True):
            p.copy_(total / sum(self.weights[:epochs]))


def train(
    model: Head,
    source: ImageSource,
    recipe: TrainingRecipe,
    *,
    seed: int = 1,
    precision: str = "float32",
    log: Log = no_log,
    progress: Progress = no_progress,
    state: TrainingState | None = None,
    callbacks: Sequence[Callback] = (),
    loss_of: Callable[..., tuple[Tensor, Tensor]] | None = None,
    average: EpochAverage | None = None,
    targets: Tensor | None = None,
) -> list[float]:
    """Train what requires gradients in a head, its prompts and CMPA of a DCP. Returns the loss of every step.

    Args:
        model: with fresh prompts and on its device.
        source: the few-shot training images.
        seed: of the order of the images, their augmentation and dropout, which depend only on it and on the step: a run
            can resume after any step, with any number of workers.
        precision: of `PRECISIONS`: autocast over float32 prompts and CMPA.
        state: saves the run to a file, so that it can resume when stopped. Default: nothing is saved.
        loss_of: as `objective` returns it. Default: that of the recipe.
        average: of the weights over the epochs, which replaces them at the end.
        targets: for the loss, see `ImageSource.batches`. Default: none.
    """
    recipe = recipe.fitted(len(source.items), source.num_classes)
    sizes = batch_sizes(len(source.items), recipe.batch_size, recipe.drop_last)
    trained, per_epoch = [p for p in model.parameters() if p.requires_grad], len(sizes)
    run = (state or TrainingState()).begin(build_optimizer(recipe, trained), precision, average.kept if average else [])
    losses, steps = run.losses, recipe.num_epochs * per_epoch
    size = f"{sum(p.numel() for p in trained):,} trained parameters"
    log(f"{steps:,} steps of at most {recipe.batch_size} images; {size}. Faster: the method text-probe, in seconds.")
    loss_of = loss_of or objective(model, recipe)

    def loss(inputs: Inputs, labels: Tensor, *targets: Tensor) -> tuple[Tensor, Tensor]:
        if average and losses and len(losses) % per_epoch == 0:
            average.add(len(losses) // per_epoch - 1)
        with seeded(_mix(seed, len(losses), 1), model.device):  # dropout depends on the step only
            return loss_of(inputs, labels, *targets)

    def after(step: int) -> bool:
        """After an epoch tell the callbacks; whether one of them ends the run."""
        if (step + 1) % per_epoch:
            return False
        epoch = step // per_epoch
        reached = Epoch(epoch + 1, step + 1, recipe.lr_at(epoch), fmean(losses[-per_epoch:]))
        stops = [callback(model, reached) for callback in callbacks]
        return any(stops)

    batches = _remaining(source, recipe, seed, per_epoch, len(losses), targets)
    model.train()
    descend(run, loss, batches, lambda step: recipe.lr_at(step // per_epoch), steps, progress, after)
    model.eval()
    if average:
        average.finish(len(losses) // per_epoch)
    warn_if_not_learnt(fmean(losses[-per_epoch:]), source.num_classes, "epochs", recipe.num_epochs)
    return losses


def build_optimizer(recipe: TrainingRecipe, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """The recipe's optimizer."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay)


def objective(model: Any, recipe: TrainingRecipe) -> Callable[..., tuple[Tensor, Tensor]]:
    """The loss of (inputs, labels, targets), and the cross-entropy alone, which is the loss
    but for a DCP, whose loss is

        cross-entropy + clip_reg * (25 mean |t - t'| + 10 mean |f - f'|)

    with its text features t (C, E), image features f (B, E), and those of zero-shot CLIP, t' and f', as in PromptSRC
    (Khattak et al., ICCV 2023), against overfitting to a few images. f' are the targets, or for None computed in the
    step, which takes a third longer (`dcp_vitb16`, 10 classes, batch size 4).
    """
    clip_reg = getattr(recipe, "clip_reg", 0.0)
    clip = model.encoder
    zero_shot = clip.zero_shot_classifier(model.classnames, model.texts) if clip_reg else None

    def loss_of(inputs: Inputs, labels: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if zero_shot is None:
            loss = F.cross_entropy(model(inputs).float(), labels)
            return loss, loss
        features, text = model.encode(inputs)
        if targets is None:
            with torch.no_grad():
                targets = clip.encode_image(inputs)
        distances = F.l1_loss(text.float(), zero_shot.float()), F.l1_loss(features.float(), targets.float())
        own = F.cross_entropy(clip.logits(features, text).float(), labels)
        return own + clip_reg * (TEXT_WEIGHT * distances[0] + IMAGE_WEIGHT * distances[1]), own

    return loss_of


def _remaining(
    source: ImageSource, recipe: TrainingRecipe, seed: int, per_epoch: int, done: int, targets: Tensor | None
) -> Iterator[Batch]:
    """The batches of the remaining steps."""
    for epoch in range(done // per_epoch, recipe.num_epochs):
        first, generator = max(0, done - epoch * per_epoch), torch.Generator().manual_seed(_mix(seed, epoch))
        options: Values = {"first": first, "drop_last": recipe.drop_last, "targets": targets}
        yield from source.batches(recipe.batch_size, generator, **options)


def _mix(*numbers: int) -> int:
    """Combine several numbers into a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
