"""Train a head on few-shot images and measure it on test images."""

import math
import random
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch.nn import functional as F

from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.model.checkpoint import head_state
from dcp_zoo.model.dcp import DCP
from dcp_zoo.training import distributed
from dcp_zoo.training.callbacks import VALIDATIONS, Callback, Epoch
from dcp_zoo.training.evaluation import Evaluation
from dcp_zoo.training.memory import needs_checkpointing
from dcp_zoo.training.objective import objective
from dcp_zoo.training.recipes import PRECISIONS, Recipe, TrainingRecipe, batch_sizes
from dcp_zoo.training.sources import ImageSource, Progress, no_progress, plain_view
from dcp_zoo.training.stage import fit_stage
from dcp_zoo.training.state import TrainingState

NOT_LEARNT = 0.4  # of the loss of a random guess
EVAL_BATCH = 100  # images; logits do not depend on it, except while the context is not calibrated yet
LOG_COLUMNS = "step,epoch,lr,loss,seconds"


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pick_device(name: str = "auto") -> torch.device:
    """A torch device; "auto" is CUDA, else MPS, else the CPU. ZooError if it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise ZooError(f"Device {name!r} is not available ({error}). Use --device auto or cpu.") from error


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
    class_weights: torch.Tensor | None = None,
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
        class_weights: weights (C,) of the images' losses by class. Default: all 1.

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
    loss_of = objective(model, recipe, class_weights)
    with distributed.shared_batches(model, sizes) as share, state:
        for epoch, inputs, labels in progress(*_steps(source, recipe, seed, per_epoch, len(state.losses))):
            size = sizes[len(state.losses) % per_epoch]
            share(size)
            torch.manual_seed(_mix(seed, len(state.losses), 1))  # for models with dropout: it depends on the step only
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr_at(epoch)
            with autocast(device, precision):
                loss, cross_entropy = loss_of(inputs.to(device), labels.to(device), source.patches)
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
    """The remaining steps of a run as (epoch, inputs, labels), a description, and their number."""
    part = distributed.rank(), distributed.world_size()
    steps = (
        (epoch, inputs, labels)
        for epoch in range(done // per_epoch, recipe.num_epochs)
        for inputs, labels in source.batches(
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


@torch.no_grad()
def cast_frozen(model: DCP, precision: str) -> None:
    """Store CLIP's weights in this precision only; trained parameters and the logit scale stay in float32."""
    for p in model.clip.parameters():
        if p.numel() > 1 and p.is_floating_point():
            p.data = p.data.to(getattr(torch, precision))


def autocast(device: torch.device, precision: str) -> Any:
    """The autocast context of a precision; a null context for float32. ZooError for an unknown precision."""
    check_choice("precision", precision, PRECISIONS)
    return nullcontext() if precision == "float32" else torch.autocast(device.type, getattr(torch, precision))


@torch.no_grad()
def round_and_calibrate(source: ImageSource, batch_size: int = 64) -> None:
    """After training: round the trained tensors to float16, as they will be stored, and measure the calibrated context.

    Args:
        source: the few-shot training images without augmentation, and the trained model.

    Raises:
        ZooError: prompts, or the context, beyond float16's range: training diverged.
    """
    model = source.model
    for tensor in head_state(model).values():
        tensor.copy_(tensor.half())
    model.calibrate(source.batches(batch_size), patches=source.patches)
    if model.calibrated is not None:
        model.calibrated.copy_(model.calibrated.half())
    if not all(tensor.isfinite().all() for tensor in head_state(model).values()):
        raise ZooError(
            "Training diverged: the prompts became too large for float16. Lower the learning rate (--set lr=...), and "
            "start again (--overwrite)."
        )


def fit_dcp(
    source: ImageSource,
    recipe: Recipe,
    *,
    val: ImageSource | None = None,
    seed: int = 1,
    precision: str = "float32",
    grad_checkpointing: str = "auto",
    reload_clip: Callable[[], Any] | None = None,
    progress: Progress = no_progress,
    **options: Any,
) -> dict[str, Any]:
    """Train a DCP from fresh prompts, round the trained tensors to float16, calibrate, and fit the classifier stage:
    ready to be saved.

    Args:
        source: see `train`.
        val: few-shot validation images for the classifier stage, see `fit_stage`, and for the callbacks.
        recipe, seed, precision, progress, options: see `train`.
        grad_checkpointing: "on", "off" or "auto", see `memory.needs_checkpointing`.
        reload_clip: returns CLIP with float32 weights again. If given, CLIP is stored in half precision only while
            training in it; otherwise, autocast converts it on the fly.

    Returns:
        How the classifier stage was fitted, if the recipe has one; see `fit_stage`.

    Raises:
        ZooError: see `train`.
    """
    model = source.model
    batch = -(-min(recipe.batch_size, len(source.items)) // distributed.world_size())
    model.set_grad_checkpointing(needs_checkpointing(grad_checkpointing, model, batch))
    if reload_clip:
        cast_frozen(model, precision)
    losses = train(source, recipe, seed=seed, precision=precision, progress=progress, validation=val, **options)
    model.set_grad_checkpointing(False)
    if not distributed.is_main():
        return {}
    warn_if_not_learnt(losses, source, recipe)
    if reload_clip and precision != "float32":  # a checkpoint is calibrated as it will be used
        model.clip = reload_clip()
    round_and_calibrate(plain_view(source, progress))
    if recipe.classifier == "none":
        return {}
    return {"classifier": fit_stage(source if source.views is not None else plain_view(source), val, progress)}


def warn_if_not_learnt(losses: Sequence[float], source: ImageSource, recipe: Recipe) -> None:
    """Warn, with the next step, if the mean loss of the last epoch is above `NOT_LEARNT` of that of a random guess."""
    recipe = recipe.fitted(len(source.items), source.num_classes)
    last = losses[-len(batch_sizes(len(source.items), recipe.batch_size, recipe.drop_last)) :]
    loss, guess = sum(last) / len(last), math.log(max(source.num_classes, 2))
    if loss > NOT_LEARNT * guess:
        warnings.warn(
            f"The training images are not learnt: their loss is {loss:.2f} at the end, where guessing gives "
            f"{guess:.2f}. Train longer (--set epochs={3 * recipe.num_epochs}; in Python "
            f"recipe={{'epochs': {3 * recipe.num_epochs}}}), or check that the labels are right.",
            stacklevel=3,
        )


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def predict(
    source: ImageSource, batch_size: int, precision: str = "float32", progress: Progress = no_progress
) -> torch.Tensor:
    """Logits (n, C) of all images of a source, in order, on the CPU, in the model's current context."""
    model = source.model.eval()
    device = next(model.parameters()).device
    logits = []
    with autocast(device, precision):
        for inputs, _ in progress(source.batches(batch_size), "test images", -(-len(source.items) // batch_size)):
            logits.append(model(inputs.to(device), patches=source.patches).float().cpu())
    return torch.cat(logits)


def eval_batch(model: Any, eval_batch_size: int) -> int:
    """Images per batch of an evaluation in a model's context: that of its recipe where they share a context."""
    return eval_batch_size if model.context == "batch" else EVAL_BATCH


def top1(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 accuracy in percent, rounded to a hundredth: logits (n, C), labels (n,)."""
    return round(100 * (logits.argmax(-1) == labels).float().mean().item(), 2)


def measure(
    source: ImageSource, recipe: Recipe, precision: str = "float32", progress: Progress = no_progress
) -> tuple[dict[str, float], Evaluation]:
    """Top-1 accuracy in percent with the calibrated context, and with the batch context as the release evaluates; and
    the answers in the first of them that the model has."""
    model, metrics, evaluations = source.model, {}, []
    for context in ("calibrated", "batch"):
        if context == "batch" or model.calibrated is not None:
            model.context = context
            logits = predict(source, eval_batch(model, recipe.eval_batch_size), precision, progress)
            metrics[f"top1_{context}"] = top1(logits, source.labels)
            evaluations.append(Evaluation(model.classnames, source.items, logits))
    model.context = None
    return metrics, evaluations[0]


def open_log(path: Path) -> TextIO:
    """A CSV file for `train`, line-buffered so that a run can be monitored."""
    log = path.open("w", buffering=1)
    log.write(LOG_COLUMNS + "\n")
    return log
