"""One run of any method on few images per class, from its name to a measured checkpoint."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dcp_zoo.data import Item, Split, check_images, few_shot, find_spec, is_own, load_labelled, training_split
from dcp_zoo.data.splits import all_for_training, check_test_share, subset_sha256, warn_of_tiny_classes
from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.files import locked
from dcp_zoo.model.checkpoint import WEIGHTS_NAME
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.config import read_config
from dcp_zoo.model.head import MEASURED, Head
from dcp_zoo.model.names import Descriptions, sentences_of
from dcp_zoo.training import distributed
from dcp_zoo.training.cache import fingerprint
from dcp_zoo.training.callbacks import Callback
from dcp_zoo.training.device import CHECKPOINTING, pick_device, pick_precision
from dcp_zoo.training.evaluation import EVAL_BATCH, Evaluation, measure, measurement, stats_of
from dcp_zoo.training.loop import open_log
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.heads import check_learnt
from dcp_zoo.training.methods.table import DCP_METHOD, RecipeLike, chosen_recipe
from dcp_zoo.training.recipes import AUTO, MANY, BaseRecipe, Recipe
from dcp_zoo.training.sources import ImageSource, Progress, image_source, no_progress
from dcp_zoo.training.stage import fit_stage
from dcp_zoo.training.state import SAVE_EVERY, STATE_NAME, TrainingState, remove_state
from dcp_zoo.zoo.factory import plain_clip

LOCK_NAME = ".lock"  # in the output folder while a process trains there
BEFORE_REFIT = "before_refit"  # folder of the head that is measured


@dataclass(frozen=True)
class Run:
    """What is trained, and on which images."""

    model: str  # in the zoo, such as "dcp_vitb16"
    split: Split  # the full dataset, from which the few-shot subset is drawn
    shots: int | None  # training images per class; None uses all
    seed: int  # of the subset, of initial weights and of the order of the images
    recipe: BaseRecipe  # the method's, see `chosen_recipe`
    device: torch.device
    method: str = DCP_METHOD
    precision: str = "float32"
    clip_pretrained: str | None = None  # another open_clip tag for CLIP's weights
    workers: int = 0  # processes that decode images
    grad_checkpointing: str = "auto"  # or "on" or "off", see `needs_checkpointing`; only of DCP
    descriptions: Descriptions | None = None  # sentences of each class, in place of its name
    test_share: float | None = None  # of the images, held out for the test, if not the default; for the record
    class_weight: tuple[float, ...] | None = None  # of the images' losses for each class; only of DCP. Default: all 1

    def subset(self) -> Split:
        """The split with the training images that are used: drawn by shots and seed, or all."""
        return self.split if self.shots is None else few_shot(self.split, self.shots, self.seed)

    def task(self, subset: Split, clip: FrozenCLIP, progress: Progress = no_progress) -> Task:
        """What the method is given: the images of `subset`, for a CLIP on the run's device."""

        method = METHODS[self.method]

        def source(items: Sequence[Item], augment: str = "none") -> ImageSource:
            return image_source(clip, items, augment, self.workers, progress, once=method.features)

        augment = self.recipe.image_augment if len(subset.train) <= MANY else self.recipe.augment
        return Task(
            clip,
            self.model,
            subset.classnames,
            self.descriptions or find_spec(self.split.name).template,
            source(subset.train, augment) if method.needs_images(self.recipe) else None,
            source(subset.val) if subset.val else None,
            self.recipe,
            self.seed,
            self.precision,
            progress,
        )

    def info(self, subset: Split) -> dict[str, Any]:
        """What a checkpoint stores about how it was trained, on the training images of `subset`."""
        recipe = self.recipe.fitted(len(subset.train), len(subset.classnames))
        stored: dict[str, Any] = {
            "dataset": self.split.name,
            "shots": self.shots,
            "seed": self.seed,
            "split_sha256": self.split.sha256,
            "subset_sha256": subset_sha256(subset.train),
        }
        if is_own(self.split.name):
            counts = Counter(item.label for item in subset.train)
            stored["class_images"] = {name: counts[label] for label, name in enumerate(subset.classnames)}
        if self.test_share is not None:
            stored["test_share"] = self.test_share
        stored["recipe"] = recipe.training | {"precision": self.precision}
        if self.class_weight is not None:
            stored["class_weight"] = [round(weight, 4) for weight in self.class_weight]
        return stored


@dataclass(frozen=True)
class RunOptions:
    """What a run writes and shows; nothing here but early stopping changes what is learnt.

    Attributes:
        test: whether to measure on the split's test images, if it has any.
        overwrite: start again, replacing an existing checkpoint or the state of a stopped run.
        save_every: seconds between two saves of DCP's state; 0 saves after every step.
        progress, log: progress bars and messages.
        stop: called after every step of DCP, see `TrainingState`.
        show: receives the answers on the test images.
        callbacks: called after every epoch of DCP, see `loop.train`; the split's validation images are classified for
            them.
    """

    test: bool = True
    overwrite: bool = False
    save_every: float = SAVE_EVERY
    progress: Progress = no_progress
    log: Callable[[str], object] = str
    stop: Callable[[], bool] = bool  # never
    show: Callable[[Evaluation], object] = id
    callbacks: Sequence[Callback] = ()


def plan(
    model: str,
    dataset: str,
    data_root: str | Path | None,
    shots: int | None,
    seed: int,
    recipe: RecipeLike = None,
    device: str = "auto",
    test: float | None = None,
    *,
    labels: Path | None = None,
    method: str = DCP_METHOD,
    classifier: str | None = None,
    changes: Mapping[str, Any] | None = None,
    **options: Any,
) -> Run:
    """A run from names, with all inputs checked before any work starts.

    Args:
        model, dataset, data_root, labels, shots, seed, device, method: see `Run` and `load_labelled`.
        recipe, classifier: see `chosen_recipe`.
        test: share of images held out for the test if they come without test images, see `training_split`.
        changes: to the recipe, as of `--set`.
        options: further attributes of `Run`.
    """
    place = pick_device(device)
    options["precision"] = pick_precision(options.get("precision", AUTO), model, place)
    check_choice("grad_checkpointing", options.get("grad_checkpointing", "auto"), CHECKPOINTING)

    def chosen(per_class: int) -> BaseRecipe:
        found = chosen_recipe(method, model, dataset, per_class, recipe, classifier)
        return found.updated(changes or {}, where="--set")

    chosen(shots or 1)  # so that mistakes are said before images are read
    images = load_labelled(dataset, data_root, labels)
    check_test_share(images, test)
    split = training_split(images, test)
    fitting = chosen(shots or len(split.train) // len(split.classnames))
    if is_own(dataset):
        warn_of_tiny_classes(split)
    if dataset == "folder":
        check_images(images.items)
    return Run(model, split, shots, seed, fitting, place, method, test_share=test, **options)


def check_supported(run: Run, callbacks: Sequence[Callback] = ()) -> None:
    """ZooError for what only DCP's training has."""
    if run.method != DCP_METHOD and (run.class_weight is not None or callbacks):
        raise ZooError(f'{run.method} has neither class_weight nor callbacks: only dcp does (method="{DCP_METHOD}").')


def train_head(
    run: Run, output: Path | None = None, options: RunOptions | None = None, measured: Mapping[str, Any] | None = None
) -> tuple[Head, dict[str, float]]:
    """Train, measure and save one head of any method. Returns it, and its top-1 accuracies in percent. ZooError for bad
    input, a method that cannot be a head, an error of the method, or an output folder that is not writable, belongs to
    another run or to another process.

    A run of DCP that was stopped or killed resumes from the last state in its output folder and ends with the same
    weights bit for bit, given the same machine and number of threads. With several processes, all call this function,
    and only the main process stores statistics, measures and saves.

    Args:
        run, options: the run, see `plan` and `RunOptions`.
        output: folder for `model.safetensors`, `config.json` and, of DCP, `log.csv` and until the run has finished its
            state. None writes nothing.
        measured: accuracies to store instead of measuring.
    """
    with _alone_in(output):
        return _train_head(run, output, options or RunOptions(), measured)


def _train_head(
    run: Run, output: Path | None, options: RunOptions, measured: Mapping[str, Any] | None
) -> tuple[Head, dict[str, float]]:
    METHODS[run.method].check_head()
    check_supported(run, options.callbacks)
    if output and distributed.is_main():
        if options.overwrite and run.method == DCP_METHOD:
            remove_state(output)
        check_free(output, options.overwrite, resumes=run.method == DCP_METHOD)
    started = time.perf_counter()
    subset = run.subset()
    clip = plain_clip(run.model, run.clip_pretrained).to(run.device)
    task = run.task(subset, clip, options.progress)
    title = METHODS[run.method].title
    options.log(f"{title} on {run.model}: {len(subset.train)} images of {len(subset.classnames)} classes")
    head, earlier = _fit(run, task, output, options, run.info(subset))
    if options.stop():  # requested in the last step, or while statistics are stored
        raise KeyboardInterrupt
    if not distributed.is_main():
        return head, {}
    if run.method != DCP_METHOD:
        check_learnt(head, task)
    metrics: dict[str, float] = {}
    evaluation, found = None, dict(measured or {})
    seconds = round(earlier + time.perf_counter() - started, 1)
    if measured is None and options.test and run.split.test:
        once = len(stats_of(head)) == 1
        test = image_source(head, run.split.test, "none", run.workers, options.progress, once)
        metrics, evaluation = measure(test, getattr(run.recipe, "eval_batch_size", EVAL_BATCH), options.progress)
        found = measurement(metrics, evaluation)
    head.info = run.info(subset) | head.info | {"train_seconds": seconds} | found
    if output:
        head.save_pretrained(output)
        remove_state(output)
    if evaluation:  # last, as a report that cannot be written must not cost the head
        options.show(evaluation)
    return head, metrics


def _fit(run: Run, task: Task, output: Path | None, options: RunOptions, info: dict[str, Any]) -> tuple[Head, float]:
    """The method's head, and for how many seconds a stopped run trained before, if this one resumes it."""
    method = METHODS[run.method]
    if run.method != DCP_METHOD:
        return method.fit_head(task), 0.0
    identity = _identity(run, task.clip) | info
    state = TrainingState(output and output / STATE_NAME, identity, options.save_every, options.log, options.stop)
    earlier = state.seconds[-1] if state.seconds else 0.0
    weights = None if run.class_weight is None else torch.tensor(run.class_weight)
    with open_log(output if distributed.is_main() else None) as step_log:
        head = method.fit_head(
            task,
            grad_checkpointing=run.grad_checkpointing,
            reload_clip=lambda: plain_clip(run.model, run.clip_pretrained).clip.to(run.device),
            step_log=step_log,
            state=state,
            callbacks=options.callbacks,
            class_weight=weights,
            log=options.log,
        )
    return head, earlier


def train_and_refit(run: Run, output: Path, options: RunOptions | None = None) -> tuple[Head, dict[str, float]]:
    """`train_head`, and then once more with the same recipe on all images of the split, the test images included: that
    head is saved, with the accuracies of the first, if there were test images."""
    options = options or RunOptions()
    first, final = output / BEFORE_REFIT, replace(run, split=all_for_training(run.split), shots=None, test_share=0.0)
    if not run.split.test:
        return train_head(final, output, options)
    if distributed.is_main():
        check_free(output, options.overwrite, resumes=run.method == DCP_METHOD)
    finished = distributed.from_main(lambda: _is_finished(first))
    if options.overwrite or not finished or not distributed.from_main(lambda: _is_head_of(first, run)):
        train_head(run, first, replace(options, overwrite=options.overwrite or finished))
    info = distributed.from_main(lambda: read_config(first)["dcp"])
    measured = {name: info[name] for name in MEASURED if name in info}
    head, _ = train_head(final, output, options, measured)
    if distributed.is_main():
        shutil.rmtree(first)
    return head, measured.get("metrics", {})


def fit_classifier(
    model: Any, split: Split, shots: int | None, seed: int, *, workers: int = 0, progress: Progress = no_progress
) -> dict[str, Any]:
    """Give a head a classifier stage, and stored statistics if it has none, from few-shot images of its classes, which
    are put into the order of the split's. Returns how it was fitted, which the model's info stores too."""
    subset = split if shots is None else few_shot(split, shots, seed)
    model.set_classnames(subset.classnames)
    train = image_source(model, subset.train, "flip" if model.stem else "none", workers, progress)
    val = image_source(model, subset.val, "none", workers, progress) if subset.val else None
    if model.stats != "stored":
        model.store_stats(train.batches(64), train.patches)
    found = fit_stage(train, val, progress)
    found |= {"split_sha256": split.sha256, "subset_sha256": subset_sha256(subset.train)}
    model.info = {name: value for name, value in model.info.items() if name not in (*MEASURED, "not_measured")}
    model.info["classifier"] = found
    return found


def _is_finished(folder: Path) -> bool:
    return (folder / WEIGHTS_NAME).exists() and not (folder / STATE_NAME).exists()


def check_free(output: Path, overwrite: bool, *, resumes: bool = False) -> None:
    """ZooError if the folder holds a finished checkpoint, or, unless the caller `resumes` it, a DCP in training."""
    if overwrite:
        return
    if _is_finished(output):
        raise ZooError(f"{output} already holds a checkpoint: choose another --output, or pass --overwrite.")
    if not resumes and (output / STATE_NAME).exists():
        raise ZooError(
            f"{output} holds a DCP whose training was stopped, and can resume: choose another --output, or pass "
            "--overwrite."
        )


def _is_head_of(folder: Path, run: Run) -> bool:
    """Whether the finished head in a folder is the one that this run would train."""
    config, dcp = read_config(folder), isinstance(run.recipe, Recipe)
    model_args = run.recipe.config.as_dict() if isinstance(run.recipe, Recipe) else {}
    same_model = (config["architecture"], config["model_args"]) == (run.model, model_args)
    expected = run.info(run.subset()) | ({} if dcp else {"method": run.method})
    if run.descriptions or dcp:
        texts = sentences_of(run.split.classnames, run.descriptions) if run.descriptions else None
        expected["descriptions" if dcp else "template"] = texts
    if run.clip_pretrained:
        expected["clip"] = run.clip_pretrained
    return same_model and all(config["dcp"].get(name) == value for name, value in expected.items())


def _identity(run: Run, clip: FrozenCLIP) -> dict[str, Any]:
    """What identifies a run of DCP in addition to its checkpoint's info: the state of another run is rejected."""
    assert isinstance(run.recipe, Recipe)
    return {
        "model": run.model,
        "clip": clip.clip_source,
        "CLIP weights": fingerprint(clip.clip.parameters()),
        "options": run.recipe.config.as_dict(),
        **({"descriptions": run.descriptions} if run.descriptions else {}),
    }


@contextmanager
def _alone_in(output: Path | None) -> Iterator[None]:
    """Hold the lock of an output folder, if there is one; ZooError if another process trains there."""
    if output is None or not distributed.is_main():
        yield
        return
    with locked(lock := output / LOCK_NAME) as free:
        if not free:
            raise ZooError(f"Another process is training in {output}: wait for it, or choose another --output.")
        try:
            yield
        finally:
            with suppress(OSError):  # Windows keeps it, as it is open
                lock.unlink()
