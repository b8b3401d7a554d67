"""A `Run` of any method on few images per class, from its plan to a measured checkpoint."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import cast

import torch
from torch.nn import functional as F

from dcp_zoo.data import Split, few_shot, is_own
from dcp_zoo.data.progress import Progress, bar, no_progress
from dcp_zoo.data.seen import image_hashes, note_images
from dcp_zoo.data.splits import all_for_training, subset_sha256
from dcp_zoo.fields import Values
from dcp_zoo.files import format_duration
from dcp_zoo.model.checkpoint import MEASURED
from dcp_zoo.model.classes import saved_texts
from dcp_zoo.model.clip import FrozenCLIP, fingerprint
from dcp_zoo.model.config import STATE_NAME, alone_in, check_free, is_finished, made, read_config
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.head import Head
from dcp_zoo.training.evaluation import EVAL_BATCH, Evaluation, measure, measurement, predict, warn_if_not_learnt
from dcp_zoo.training.loop import Callback, open_log
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.text_probe import fit_probe
from dcp_zoo.training.planning import Reader, Run, check_supported
from dcp_zoo.training.recipes import Recipe, TrainingRecipe
from dcp_zoo.training.sources import image_source
from dcp_zoo.training.state import SAVE_EVERY, Log, TrainingState, never, no_log, remove_state
from dcp_zoo.zoo.factory import plain_clip

BEFORE_REFIT = "before_refit"  # folder of the head that is measured


@dataclass(frozen=True)
class RunOptions:
    """What a run writes and shows; nothing here but a callback changes what is learnt.

    Attributes:
        test: whether to measure on the split's test images, if it has any.
        overwrite: start again, replacing an existing checkpoint or the state of a stopped run.
        save_every: seconds between two saves of the state of a training; 0 saves after every step.
        progress, log: progress bars, by default in a terminal or notebook; messages, by default none.
        stop: called after every step of a training, see `TrainingState`.
        show: receives the predictions on the test images.
        callbacks: called after every epoch with the model and the `Epoch`; True ends the training.
    """

    test: bool = True
    overwrite: bool = False
    save_every: float = SAVE_EVERY
    progress: Progress = bar
    log: Log = no_log
    stop: Callable[[], bool] = never
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
        started = time.perf_counter()
        subset = subset or run.subset()
        clip = clip or plain_clip(run.model).to(run.device)
        task = run.task(subset, clip, options.progress, read)
        title = METHODS[run.method].title
        options.log(f"{title} on {run.model}: {len(subset.train)} images of {len(subset.classnames)} classes")
        head, earlier = fit(run, task, subset, output, options)
        if options.stop():  # requested in the last step, or while statistics are stored
            raise KeyboardInterrupt
        _check_learnt(task, head)
        metrics: dict[str, float] = {}
        evaluation, found = None, dict(measured or {})
        seconds = round(earlier + time.perf_counter() - started, 1)
        if measured is None and options.test and run.split.test:
            once = head.stats_modes == ("stored",)
            test = image_source(clip, run.split.test, "none", run.workers, options.progress, once, run.precision)
            metrics, evaluation = measure(
                head, test, getattr(run.recipe, "eval_batch_size", EVAL_BATCH), options.progress
            )
            found = measurement(metrics, evaluation)
        head.info = head.info | {"trained": f"{date.today()}", "train_seconds": seconds} | found
        if output:
            head.save_pretrained(output)
            remove_state(output)
        if evaluation:  # last, as a report that cannot be written must not cost the head
            options.show(evaluation)
        return head, metrics


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
    identity = _identity(run, task.clip, info)
    state = TrainingState(path, identity, options.save_every, options.log, options.stop)
    earlier = state.seconds[-1] if state.seconds else 0.0
    weights = None if run.class_weight is None else torch.tensor(run.class_weight)
    with open_log(output) as step_log:
        task.training = {
            "state": state,
            "callbacks": options.callbacks,
            "class_weight": weights,
            "step_log": step_log,
            "log": options.log,
            "grad_checkpointing": run.grad_checkpointing,
        }
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
    """`train_head`, and then once more with the same recipe on all images of the split, the test images included: that
    head is saved, with the accuracies of the first, if there were test images."""
    options = options or RunOptions()
    first, final = output / BEFORE_REFIT, replace(run, split=all_for_training(run.split), shots=None, test_share=0.0)
    if not run.split.test:
        return train_head(final, output, options)
    with alone_in(output):
        check_free(output, options.overwrite, resumes=run.recipe.is_trained)
        finished = is_finished(first)
        if options.overwrite or not finished or not _is_head_of(first, run):
            trained, _ = train_head(run, first, replace(options, overwrite=options.overwrite or finished))
            info, clip = trained.info, trained.frozen
        else:
            info, clip = made(read_config(first)), None
        measured = {name: info[name] for name in MEASURED if name in info}
        took = format_duration(info["train_seconds"])
        options.log(f"Refitting on all {len(final.split.train):,} images; the first fit took {took}.")
        head, _ = train_head(final, output, options, measured, clip=clip)
        shutil.rmtree(first)
    return head, measured.get("metrics", {})


def add_probe(head: Head, split: Split, shots: int | None, seed: int, progress: Progress = no_progress) -> Values:
    """Give a head a text probe, and a DCP stored statistics if it has none, from few-shot images of its classes, which
    are put into the order of the split's. Returns how it was fitted, which the head's info stores too."""
    subset = split if shots is None else few_shot(split, shots, seed)
    head.set_classnames(subset.classnames)
    clip = head.frozen
    train = image_source(clip, subset.train, "flip" if clip.stem else "none", progress=progress)
    if head.stats != "stored":
        cast(DCP, head).store_stats(train.batches(64))
    found: Values = fit_probe(head, train, progress)
    found |= {"split_sha256": split.sha256, "subset_sha256": subset_sha256(subset.train)}
    head.info = {name: value for name, value in head.info.items() if name not in (*MEASURED, "not_measured")}
    head.info["text_probe"] = found
    if head.method in METHODS and not METHODS[head.method].trains:  # only its text probe has seen images
        head.info["image_hashes"] = image_hashes(subset.train) if is_own(split.name) else {}
    else:
        note_images(head.info, subset.train)
    return found


def _is_head_of(folder: Path, run: Run) -> bool:
    """Whether the finished head in a folder is the one that this run would train."""
    config, texts = read_config(folder), None
    model_args = run.recipe.config.as_dict() if isinstance(run.recipe, Recipe) else {}
    same_model = (config["architecture"], config["model_args"]) == (run.model, model_args)
    expected = run.info(run.subset()) | {"method": run.method}
    if run.descriptions:
        texts = saved_texts(run.split.classnames, run.descriptions)
    stored = config["dcp"]["texts"]
    same_texts = (stored if isinstance(stored, dict) else None) == texts
    return same_model and same_texts and all(config["dcp"].get(name) == value for name, value in expected.items())


def _identity(run: Run, clip: FrozenCLIP, info: Mapping[str, object]) -> Values:
    """What identifies a training: the checkpoint's info, with one hash of its images in place of several, and more. The
    state of another run is rejected."""
    of_images = {name: info.get(name) for name in ("split_sha256", "subset_sha256", "image_hashes")}
    return {
        **{name: value for name, value in info.items() if name not in of_images},
        "hash of the images": sha256(repr(of_images).encode()).hexdigest()[:12],
        "model": run.model,
        "method": run.method,
        "clip": clip.source,
        "CLIP weights": fingerprint(clip.clip.parameters()),
        **({"options": run.recipe.config.as_dict()} if isinstance(run.recipe, Recipe) else {}),
        **({"descriptions": run.descriptions} if run.descriptions else {}),
    }
