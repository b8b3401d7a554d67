"""The training loop."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch.nn import functional as F

from dcp_zoo.errors import ZooError
from dcp_zoo.training import distributed
from dcp_zoo.training.callbacks import VALIDATIONS, Callback, Epoch
from dcp_zoo.training.device import autocast
from dcp_zoo.training.evaluation import EVAL_BATCH, predict, top1
from dcp_zoo.training.objective import objective
from dcp_zoo.training.recipes import TrainingRecipe, batch_sizes
from dcp_zoo.training.sources import ImageSource, Progress, no_progress
from dcp_zoo.training.state import TrainingState

LOG_COLUMNS = "step,epoch,lr,loss,seconds"


def train(
    source: ImageSource,
    recipe: TrainingRecipe,
    *,
    seed: int = 1,
    precision: str = "float32",
    step_log: TextIO | None = None,
    progress: Progress = no_progress,
    state: TrainingState | None = None,
    callbacks: Sequence[Callback] = (),
    validation: ImageSource | None = None,
    class_weight: torch.Tensor | None = None,
) -> list[float]:
    """Train the parameters that require gradients: the prompts and CMPA of a DCP. CLIP stays frozen.

    In several processes (see `dcp_zoo.training.distributed`) each takes its part of every batch, and all end with the
    weights that a single process would reach, up to rounding.

    Args:
        source: the few-shot training images, and the model to train, with fresh prompts and on its device.
        recipe: optimizer, schedule and batch size.
        seed: of the order of the images, their augmentation and dropout. These depend only on the seed and the step,
            so that a run can resume after any step, with any number of workers.
        precision: "float32", or "bfloat16"/"float16" for autocast over float32 prompts and CMPA. The dtype of CLIP's
            weights is not changed; call `cast_frozen` first to store them in that precision.
        step_log: receives a CSV line for every step.
        progress: wraps the loop over steps in a progress bar.
        state: saves the run to a file, so that it can resume when stopped. Default: nothing is saved.
        callbacks: called after every epoch, see `callbacks.Callback`.
        validation: images that are classified now and then for the callbacks; nothing is learnt from them.
        class_weight: weights (C,) of the images' losses by class. Default: all 1.

    Returns:
        The loss of every step.

    Raises:
        ZooError: the loss is no longer finite, an image cannot be read, or memory is exhausted.
        KeyboardInterrupt: Ctrl-C; with a `state`, after the current step.
    """
    model, device = source.model, next(source.model.parameters()).device
    state = state or TrainingState()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(recipe, trained)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16" and device.type != "mps")
    model.train()
    state.begin(model, optimizer, scaler)
    recipe = recipe.fitted(len(source.items), source.num_classes)
    sizes = batch_sizes(len(source.items), recipe.batch_size, recipe.drop_last)
    per_epoch = len(sizes)
    _write_log(step_log, state, recipe, per_epoch, 0)
    for callback in callbacks:
        callback.on_start(model, recipe.as_dict())
    loss_of = objective(model, recipe, class_weight)
    with distributed.shared_batches(model, sizes) as share, state:
        for epoch, inputs, labels, *targets in progress(*_steps(source, recipe, seed, per_epoch, len(state.losses))):
            size = sizes[len(state.losses) % per_epoch]
            share(size)
            torch.manual_seed(_mix(seed, len(state.losses), 1))  # for models with dropout: it depends on the step only
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(epoch)
            with autocast(device, precision):
                loss, cross_entropy = loss_of(
                    inputs.to(device), labels.to(device), source.patches, *(t.to(device) for t in targets)
                )
            part = len(labels) / size  # 1, unless several processes share the batch
            optimizer.zero_grad()
            scaler.scale(loss * part).backward()
            cross_entropy = distributed.sum_gradients(cross_entropy.detach() * part, trained)
            with state.update():
                scaler.step(optimizer)
                scaler.update()
                state.losses.append(check_finite_loss(cross_entropy.item(), len(state.losses), f"now {recipe.lr}"))
            _write_log(step_log, state, recipe, per_epoch, len(state.losses) - 1)
            if callbacks and len(state.losses) % per_epoch == 0:
                ended = _epoch(model, recipe, epoch, state.losses, per_epoch, validation, precision)
                stops = [callback.on_epoch(model, ended) for callback in callbacks]
                if any(stops):
                    break
    for callback in callbacks:
        callback.on_end(model)
    model.eval()
    return state.losses


def _epoch(
    model: Any,
    recipe: TrainingRecipe,
    epoch: int,
    losses: Sequence[float],
    per_epoch: int,
    validation: ImageSource | None,
    precision: str,
) -> Epoch:
    """What callbacks are told after an epoch; the validation images are classified `VALIDATIONS` times in a run."""
    ended = Epoch(epoch + 1, len(losses), recipe.lr_at(epoch), sum(losses[-per_epoch:]) / per_epoch)
    left = recipe.num_epochs - ended.epoch
    if validation is None or left % -(-recipe.num_epochs // VALIDATIONS):
        return ended
    logits = predict(validation.for_model(model), EVAL_BATCH, precision)
    model.train()
    return ended._replace(
        val_loss=F.cross_entropy(logits, validation.labels).item(), val_top1=top1(logits, validation.labels)
    )


def build_optimizer(recipe: TrainingRecipe, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The recipe's optimizer; `train` sets its learning rate once per epoch."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(parameters, recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    return torch.optim.AdamW(parameters, recipe.lr, weight_decay=recipe.weight_decay)


def _steps(
    source: ImageSource, recipe: TrainingRecipe, seed: int, per_epoch: int, done: int
) -> tuple[Iterable[Any], str, int]:
    """The remaining steps of a run as (epoch, inputs, labels), with the source's targets if it has them, a description,
    and their number."""
    part = distributed.rank(), distributed.world_size()
    steps = (
        (epoch, *batch) if source.targets is None else (epoch, *batch[0], batch[1])
        for epoch in range(done // per_epoch, recipe.num_epochs)
        for batch in source.batches(
            recipe.batch_size,
            _generator(seed, epoch),
            first=max(0, done - epoch * per_epoch),
            part=part,
            drop_last=recipe.drop_last,
        )
    )
    return steps, "training", per_epoch * recipe.num_epochs - done


def _generator(seed: int, epoch: int) -> torch.Generator:
    """The random generator of one epoch."""
    return torch.Generator().manual_seed(_mix(seed, epoch))


def _mix(*numbers: int) -> int:
    """Combine several numbers into a seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def check_finite_loss(loss: float, step: int, lr: str) -> float:
    """The loss of a step, counted from 0; ZooError if it is not finite. `lr` tells the user about the learning rate."""
    if not math.isfinite(loss):
        raise ZooError(
            f"Training diverged: the loss of step {step + 1} is {loss}. Lower the learning rate ({lr}), or use "
            "float32 or bfloat16 instead of float16."
        )
    return loss


def _write_log(log: TextIO | None, state: TrainingState, recipe: TrainingRecipe, per_epoch: int, first: int) -> None:
    """Write the lines of the completed steps, starting at step `first`."""
    if log is None:
        return
    for step in range(first, len(state.losses)):
        epoch = step // per_epoch
        line = f"{step + 1},{epoch},{recipe.lr_at(epoch):.8g},{state.losses[step]:.6f},{state.seconds[step]:.2f}\n"
        log.write(line)


def open_log(path: Path) -> TextIO:
    """A CSV file for `train`, line-buffered so that a run can be monitored."""
    log = path.open("w", buffering=1)
    log.write(LOG_COLUMNS + "\n")
    return log
