"""A `Run` of any method on few images per class, from its plan to a measured checkpoint."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import date
from hashlib import sha256
from pathlib import Path

from torch.nn import functional as F

from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.backbone.fingerprint import construction
from dcp_zoo.data import Split
from dcp_zoo.data.images import Progress, bar
from dcp_zoo.data.splits import all_for_training
from dcp_zoo.fields import Values
from dcp_zoo.files import format_duration
from dcp_zoo.heads.checkpoint import MEASURED
from dcp_zoo.heads.config import STATE_NAME, alone_in, check_free
from dcp_zoo.heads.head import Head
from dcp_zoo.training.evaluation import EVAL_BATCH, Evaluation, measure, predict, warn_if_not_learnt
from dcp_zoo.training.loop import Callback
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.planning import Reader, Run, check_supported
from dcp_zoo.training.recipes import TrainingRecipe
from dcp_zoo.training.sources import image_source
from dcp_zoo.training.state import SAVE_EVERY, Log, TrainingState, no_log, remove_state
from dcp_zoo.zoo.factory import plain_clip

BEFORE_REFIT = "before_refit"  # folder of the training whose head is measured


@dataclass(frozen=True)
class RunOptions:
    """What a run writes and shows; nothing here but a callback changes what is learnt.

    Attributes:
        test: whether to measure on the split's test images, if it has any.
        overwrite: start again, replacing an existing checkpoint or the state of a stopped run.
        save_every: seconds between two saves of the state of a training; 0 saves after every step.
        progress, log: progress bars, by default in a terminal or notebook; messages, by default none.
        show: receives the predictions on the test images.
        callbacks: called after every epoch with the model and the `Epoch`; True ends the training.
    """

    test: bool = True
    overwrite: bool = False
    save_every: float = SAVE_EVERY
    progress: Progress = bar
    log: Log = no_log
    show: Callable[[Evaluation], object] = no_log
    callbacks: Sequence[Callback] = ()


def train_head(
    run: Run,
    output: Path | None = None,
    options: RunOptions | None = None,
    measured: Mapping[str, object] | None = None,
    *,
    clip: FrozenCLIP | None = None,
    subset: Split | None = None,
    read: Reader | None = None,
) -> tuple[Head, dict[str, float]]:
    """Train, measure and save one head of any method. Returns it, and its top-1 accuracies in percent. ZooError for bad
    input, an error of the method, or an output folder that is not writable, or of another run or process.

    A training that was stopped or killed resumes from the last state in its output folder. On a CPU it ends with the
    same weights bit for bit, given the same machine and number of threads.

    Args:
        run, options: the run, see `plan` and `RunOptions`.
        output: folder for `model.safetensors`, `config.json` and, of a training, `log.csv` and until the run has
            finished its state. None writes nothing.
        measured: accuracies to store instead of measuring.
        clip: of the run, where it is loaded already, on its device.
        subset, read: the images of the run, where they are read already, and what reads them.
    """
    options = options or RunOptions()
    with alone_in(output) if output else nullcontext():
        check_supported(run, options.callbacks)
        if output:
            if options.overwrite and run.recipe.is_trained:
                remove_state(output)
            check_free(output, options.overwrite, resumes=run.recipe.is_trained)
        head, metrics, evaluation = _fit_and_measure(run, output, options, measured, clip, subset, read)
        if output:
            head.save_pretrained(output)
            remove_state(output)
        if evaluation:  # last, as a report that cannot be written must not cost the head
            options.show(evaluation)
        return head, metrics


def _fit_and_measure(
    run: Run,
    output: Path | None,
    options: RunOptions,
    measured: Mapping[str, object] | None = None,
    clip: FrozenCLIP | None = None,
    subset: Split | None = None,
    read: Reader | None = None,
) -> tuple[Head, dict[str, float], Evaluation | None]:
    """What `train_head` saves, its accuracies, and its predictions on the test images; a training's state and log stay
    in `output`."""
    started = time.perf_counter()
    subset = subset or run.subset()
    clip = clip or plain_clip(run.model).to(run.device)
    task = run.task(subset, clip, options.progress, read)
    title = METHODS[run.method].title
    options.log(f"{title} on {run.model}: {len(subset.train)} images of {len(subset.classnames)} classes")
    head, earlier = fit(run, task, subset, output, options)
    _check_learnt(task, head)
    metrics: dict[str, float] = {}
    evaluation, found = None, dict(measured or {})
    seconds = round(earlier + time.perf_counter() - started, 2)
    if measured is None and options.test and run.split.test:
        once = head.stats_modes == ("stored",)
        test = image_source(clip, run.split.test, "none", run.workers, options.progress, once, run.precision)
        metrics, evaluation = measure(head, test, getattr(run.recipe, "eval_batch_size", EVAL_BATCH), options.progress)
        found = {"metrics": metrics, "test_images": len(evaluation.items)}
        if evaluation.balanced is not None:
            found["balanced_top1"] = evaluation.balanced
    head.info = head.info | {"trained": f"{date.today()}", "train_seconds": seconds} | found
    return head, metrics, evaluation


def fit(
    run: Run, task: Task, subset: Split, output: Path | None = None, options: RunOptions | None = None
) -> tuple[Head, float]:
    """The head that a run's method makes of its task on `subset`, with `info` of how it was trained; and for how many
    seconds a stopped run trained before, if this one resumes it."""
    options, info = options or RunOptions(), run.info(subset)
    if not run.recipe.is_trained:
        head = fit_head(run.method, task)
        head.info = info | head.info
        return head, 0.0
    path = None if output is None else output / STATE_NAME
    identity = _identity(run, task.clip, subset, info)
    state = TrainingState(path, identity, options.save_every, options.log)
    earlier = state.seconds[-1] if state.seconds else 0.0
    task.training = {"state": state, "callbacks": options.callbacks, "log": options.log}
    task.reload_clip = lambda: plain_clip(run.model).to(run.device)
    head = fit_head(run.method, task)
    head.info = info | head.info
    return head, earlier


def _check_learnt(task: Task, head: Head) -> None:
    """Warn if a method with a schedule of its own has not learnt its training images; `loop.train` does so itself."""
    recipe, length = task.recipe, next((name for name in ("steps", "epochs") if hasattr(task.recipe, name)), "")
    if recipe.is_trained or not length or task.train is None:
        return
    train = task.plain_train
    recipe = recipe.fitted(len(train.items), train.num_classes)
    value = recipe.num_epochs if isinstance(recipe, TrainingRecipe) else getattr(recipe, length)
    logits = predict(head, train, EVAL_BATCH, task.progress)
    warn_if_not_learnt(F.cross_entropy(logits, train.labels).item(), train.num_classes, length, value)


def train_and_refit(run: Run, output: Path, options: RunOptions | None = None) -> tuple[Head, dict[str, float]]:
    """As `train_head`, and then once more with the same recipe on all images of the split, the test images included:
    that head is saved, with the accuracies of the first, if there were test images."""
    options = options or RunOptions()
    first, final = output / BEFORE_REFIT, replace(run, split=all_for_training(run.split), shots=None, test_share=0.0)
    if not run.split.test:
        return train_head(final, output, options)
    with alone_in(output):
        check_supported(run, options.callbacks)
        check_free(output, options.overwrite, resumes=run.recipe.is_trained)
        if options.overwrite:
            remove_state(first)
        trained, metrics, evaluation = _fit_and_measure(run, first, options)  # its state stays, to be resumed
        if evaluation:
            options.show(evaluation)
        took = format_duration(trained.info["train_seconds"])
        options.log(f"Refitting on all {len(final.split.train):,} images; the first fit took {took}.")
        measured = {name: trained.info[name] for name in MEASURED if name in trained.info}
        head, _ = train_head(final, output, options, measured, clip=trained.frozen)
        shutil.rmtree(first, ignore_errors=True)
    return head, metrics


def _identity(run: Run, clip: FrozenCLIP, subset: Split, info: Mapping[str, object]) -> Values:
    """What identifies a training: the checkpoint's info, with one hash of its images in place of several, and more. The
    state of another run is rejected."""
    of_images = {name: info.get(name) for name in ("split_sha256", "subset_sha256", "image_hashes")}
    return {
        **{name: value for name, value in info.items() if name not in (*of_images, "recipe")},
        **run.recipe.fitted(len(subset.train), len(subset.classnames)).as_dict(),
        "precision": run.precision,
        "hash of the images": sha256(repr(of_images).encode()).hexdigest()[:12],
        "model": run.model,
        "method": run.method,
        "clip": clip.source,
        "CLIP weights": clip.fingerprint(),
        "CLIP architecture": construction(clip.clip),
        "preprocessing": clip.preprocessing,
        **({"descriptions": run.descriptions} if run.descriptions else {}),
    }
