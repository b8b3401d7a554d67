"""A `Run` of any method on few images per class: planned, with all inputs checked before any work starts,
then trained, measured and saved. `train`, `FewShotClassifier.fit`, `benchmark` and `build` all plan a `Run`,
which alone makes a `Task`."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dcp_zoo.backbone._torch import construction
from dcp_zoo.backbone.classes import Texts
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Item, Split, few_shot, find_spec, is_user_data
from dcp_zoo.data.groups import groups_text
from dcp_zoo.data.images import Facts
from dcp_zoo.data.splits import (
    all_for_training,
    image_hashes,
    in_several_classes,
    subset_sha256,
    training_split,
    warn_of_numbers,
)
from dcp_zoo.errors import ZooError, shorten, warn, without_warnings
from dcp_zoo.features import (
    AUTO,
    CACHE_BYTES,
    PLAIN,
    FeatureExtractor,
    ImageLoader,
    Photos,
    group_images,
    looks_few,
    pick_device,
    pick_precision,
    shared_features,
)
from dcp_zoo.fields import Values
from dcp_zoo.files import alone_in
from dcp_zoo.heads.config import MEASURED, NO_CLASSIFIER
from dcp_zoo.heads.head import Head
from dcp_zoo.probe.folds import all_but, folds
from dcp_zoo.progress import Progress, bar, format_duration, no_progress
from dcp_zoo.training.evaluation import EVAL_BATCH, Evaluation, evaluations, top1_by_mode
from dcp_zoo.training.folder import STATE_NAME, check_free
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.base import plain
from dcp_zoo.training.methods.table import DCP_METHOD, RecipeLike, chosen_recipe
from dcp_zoo.training.recipes import BaseRecipe, check_seed
from dcp_zoo.training.state import SAVE_EVERY, Log, TrainingState, no_log, remove_state
from dcp_zoo.training.task import Callback, ProbeInputs, Task
from dcp_zoo.zoo.build import check_encoders, load_encoder, plain_clip
from dcp_zoo.zoo.specs import SIZES

BEFORE_REFIT = "before_refit"  # folder of the training whose head is measured


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
    workers: int = 0  # processes that decode images
    descriptions: Texts | None = None  # what CLIP reads of each class. Default: the dataset's template
    test_share: float | None = None  # of the images, held out for the test, if not the default; for the record
    sample_weight: tuple[float, ...] | None = None  # of each training image in the text probe. Default: all 1
    encoders: tuple[str, ...] = ()  # image models of timm that the text probe reads beside CLIP
    describes: bool = True  # whether to estimate what the head's threshold accepts, see `ProbeInputs`
    drawn: Split | None = None  # see `subset`; default: by shots and seed

    @cached_property
    def subset(self) -> Split:
        """The split with the training images that are used: some that are drawn, or all."""
        if self.drawn is not None:
            return self.drawn
        return self.split if self.shots is None else few_shot(self.split, self.shots, self.seed)

    @property
    def is_own(self) -> bool:
        """Whether the images are the user's own."""
        return is_user_data(self.split.name)

    @property
    def needs_images(self) -> bool:
        """Whether it reads training images."""
        return METHODS[self.method].needs_images(self.recipe)

    @property
    def recipe_with_epochs(self) -> BaseRecipe:
        """The recipe, with as many epochs as the training images need."""
        return self.recipe.with_epochs(len(self.subset.train), len(self.subset.classnames))

    def with_groups(self, images: ImageLoader, log: Log) -> ImageLoader:
        """The images with their groups; of own images these are found, unless they were given."""
        if not self.is_own:
            return images
        features = METHODS[self.method].features
        reads_flips = features not in (None, plain) or self.recipe.classifier != "none"
        items = group_images([images], images.with_flips if reads_flips else (PLAIN,), subjects=True)
        found = groups_text(items)
        if found:
            log(f"{found}: none is on both sides of a measurement.")
        return images.with_items(items)

    def task(
        self,
        source: "Source",
        images: ImageLoader | None = None,
        state: TrainingState | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> Task:
        """What the method is given: the training `images`, by default as this source reads them; and of a
        training its state and callbacks."""
        subset = self.subset
        val = source.read(subset.val) if subset.val else None
        return Task(
            clip=source.clip,
            model=self.model,
            classnames=subset.classnames,
            texts=self.descriptions or find_spec(self.split.name).template,
            images=images or source.for_training(self, subset.train),
            val=val.table().embeddings if val and METHODS[self.method].chooses else None,
            recipe=self.recipe,
            seed=self.seed,
            precision=self.precision,
            progress=source.extract.progress,
            state=state,
            callbacks=callbacks,
            probe=ProbeInputs(
                weights=None if self.sample_weight is None else torch.tensor(self.sample_weight),
                none=source.read(subset.no_class) if subset.no_class else None,
                checks=val if self.is_own else None,
                encoders=[load_encoder(name, source.clip) for name in self.encoders],
                describes=self.describes,
            ),
        )

    def info(self, facts: Mapping[str, Facts] | None = None) -> Values:
        """What a checkpoint stores about how it was trained. `facts`: of own images, by key; those without are
        read."""
        subset = self.subset
        stored: Values = {
            "dataset": self.split.name,
            "shots": self.shots,
            "seed": self.seed,
            "split_sha256": self.split.sha256,
            "subset_sha256": subset_sha256(subset.train),
        }
        if self.is_own:
            counts = Counter(item.label for item in subset.train)
            stored["class_images"] = {name: counts[label] for label, name in enumerate(subset.classnames)}
            stored["image_hashes"] = image_hashes(subset.learnt_from, facts)
        if self.test_share is not None:
            stored["test_share"] = self.test_share
        stored["recipe"] = self.recipe_with_epochs.training | {"precision": self.precision}
        return stored

    def identity(self, source: "Source") -> Values:
        """What the state of a training belongs to: its `info`, and more. The state of another run is rejected."""
        info = self.info(source.facts)
        del info["recipe"]  # of which this has all fields
        clip = source.clip
        return {
            **info,
            **self.recipe_with_epochs.as_dict(),
            "precision": self.precision,
            "model": self.model,
            "method": self.method,
            "CLIP weights": clip.fingerprint(),
            "CLIP architecture": construction(clip.clip),
            "preprocessing": clip.preprocessing,
            "descriptions": self.descriptions,
        }


class Source:
    """The CLIP of a run on its device, and what reads images for it; trials of a sweep share one.

    Attributes:
        facts: of own images by key, found as they are read; None of a dataset's.
    """

    facts: dict[str, Facts] | None = None

    def __init__(self, run: Run, progress: Progress = no_progress, clip: FrozenCLIP | None = None) -> None:
        self.run = run
        self.clip = clip or plain_clip(run.model).to(run.device)
        self.extract = FeatureExtractor(self.clip, run.precision, progress)
        if run.is_own:
            self.facts = {}

    def read(self, items: Sequence[Item], augment: str = "none", again: bool = False) -> ImageLoader:
        """Images, shown as in training: those that are read `again` and again stay in memory, decoded or
        after a frozen stem."""
        photos = Photos(items, CACHE_BYTES if again else 0, self.facts)
        loader = ImageLoader(photos, self.extract, augment, self.run.workers)
        if not again:
            return loader
        needs_flips = augment == "none" and self.run.recipe.classifier != "none"
        return loader.after_stem(loader.with_flips if needs_flips else loader.training_views)

    def for_training(self, run: Run, items: Sequence[Item]) -> ImageLoader:
        """Images as a run's method is shown them."""
        return self.read(items, run.recipe.augment, METHODS[run.method].features is None)


def plan(
    split: Split,
    model: str,
    method: str = DCP_METHOD,
    *,
    shots: int | None = None,
    seed: int = 1,
    recipe: RecipeLike = None,
    classifier: str | None = None,
    changes: Mapping[str, object] | None = None,
    device: str = "auto",
    precision: str = AUTO,
    encoder: str | Sequence[str] | None = None,
    **options: Any,
) -> Run:
    """A run on the images of a split, with all other inputs checked before any work starts.

    Args:
        split, model, method, shots, seed: see `Run`.
        recipe, classifier: see `chosen_recipe`.
        changes: to the recipe, as of `--set`.
        device, precision: see `pick_device` and `pick_precision`.
        encoder: image models of timm, by name, that the text probe reads beside CLIP; see
            `dcp_zoo.zoo.build`.
        options: further attributes of `Run`.
    """
    check_seed(seed)
    model = SIZES.get(model, model)
    picked = pick_device(device)
    precision = pick_precision(precision, model, picked)
    per_class = shots or max(1, len(split.train) // len(split.classnames))
    fitting = chosen_recipe(method, model, split.name, per_class, recipe, classifier)
    fitting = fitting.updated(changes or {}, where="--set")
    if fitting.classifier != "none" and METHODS[method].abilities.fitted:
        raise ZooError(f"From what {method} is fitted to a text probe would learn nothing more: omit the classifier.")
    if is_user_data(split.name) and not options.get("descriptions"):
        warn_of_numbers(split.classnames)
    encoders = (encoder,) if isinstance(encoder, str) else tuple(encoder or ())
    if encoders and fitting.classifier == "none":
        raise ZooError("An image encoder is read by the text probe: choose --classifier text-probe, or omit --encoder.")
    check_encoders(encoders)
    return Run(model, split, shots, seed, fitting, picked, method, precision, encoders=encoders, **options)


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


@shared_features()
def train_head(
    run: Run,
    output: Path | None = None,
    options: RunOptions | None = None,
    source: Source | None = None,
    *,
    by_folds: bool = False,
) -> tuple[Head, dict[str, float]]:
    """Train, measure and save one head of any method. Returns it, and its top-1 accuracies in percent.
    ZooError for bad input, an error of the method, or an output folder that is not writable, or of another
    run or process.

    A training that was stopped or killed resumes from the last state in its output folder. On a CPU it ends
    with the same weights bit for bit, given the same machine and number of threads.

    Args:
        run, options: the run, see `plan` and `RunOptions`.
        output: folder for `model.safetensors`, `config.json` and, of a training, until the run has finished
            its state. None writes nothing.
        source: of the images, where there is one already.
        by_folds: whether the accuracy is measured by folds of the training images, not on test images.
    """
    options = options or RunOptions()
    with alone_in(output) if output else nullcontext():
        source = source or Source(run, options.progress)
        head, task = _fit(run, output, options, source)
        evaluation = _measure(run, head, task, options, source, by_folds)
        if run.is_own and run.test_share != 0 and not evaluation:
            options.log("There are too few images, or groups, of a class to leave any out: the accuracy is not known.")
        _save(run, head, output)
        if evaluation:  # last, as a report that cannot be written must not cost the head
            options.show(evaluation)
    return head, head.info.get("metrics", {})


def _check(run: Run, output: Path | None, options: RunOptions) -> None:
    """ZooError for callbacks of a method without epochs, or an output folder that is not free."""
    resumes = run.recipe.is_trained
    if options.callbacks and not resumes:
        raise ZooError(f"{run.method} has no epochs, after which to call callbacks: use another method, such as dcp.")
    if output:
        if options.overwrite and resumes:
            remove_state(output)
        check_free(output, options.overwrite, resumes=resumes)


def _fit(run: Run, output: Path | None, options: RunOptions, source: Source) -> tuple[Head, Task]:
    """The head that a run trains, and the task it is trained on. The state of a training stays in `output`."""
    _check(run, output, options)
    started = time.perf_counter()
    subset = run.subset
    title = METHODS[run.method].title
    options.log(f"{title} on {run.model}: {len(subset.train)} images of {len(subset.classnames)} classes")
    images = source.for_training(run, subset.train)
    if run.needs_images:
        images = run.with_groups(images, options.log)
    state = None
    if run.recipe.is_trained:
        state_path = output and output / STATE_NAME
        state = TrainingState(state_path, run.identity(source), options.save_every, options.log)
        started -= state.seconds  # of the training that is resumed
    task = run.task(source, images, state, options.callbacks)
    head = fit_head(run.method, task)
    head.info = run.info(source.facts) | head.info | {"trained": f"{date.today()}"}
    head.info["train_seconds"] = round(time.perf_counter() - started, 2)
    groups = len(images.groups.unique())
    if groups < len(images):
        head.info["groups"] = groups
    if source.clip.note:
        head.info["clip_note"] = source.clip.note
    return head, task


def _measure(
    run: Run, head: Head, task: Task, options: RunOptions, source: Source, by_folds: bool
) -> Evaluation | None:
    """What a head says of the test images or, `by_folds`, of its own; its accuracy goes into its info. None if
    nothing can be tested."""
    by_mode: Mapping[str, Evaluation] = {}
    if by_folds:
        by_mode = _by_folds(run, task, head)
    elif options.test and run.split.test:
        is_read_twice = head.stats_modes != ("stored",)  # once for each kind of statistics
        test = source.read(run.split.test, again=is_read_twice)
        by_mode = evaluations(head, test, getattr(run.recipe, "eval_batch_size", EVAL_BATCH))
        if run.is_own and run.needs_images and not run.split.held_out:
            _warn_of_shared_groups(run.subset.train, task.images, test)
    if not by_mode:
        return None
    evaluation = next(iter(by_mode.values()))
    if by_folds and looks_few(task.images.items):
        evaluation = replace(evaluation, at_most=_as_single(run, task))
    head.info |= {"metrics": top1_by_mode(by_mode), **evaluation.info}
    _tell_smallest(run.subset, evaluation, options.log)
    return evaluation


def _save(run: Run, head: Head, output: Path | None) -> None:
    """Save a head that is measured; a warning for own images that are in several classes."""
    if run.needs_images and run.is_own:
        several = in_several_classes(run.subset.learnt_from, head.info["image_hashes"])
        pairs = [f"{images[0].name} and {images[1].name}" for images in several]
        if pairs:
            warn(f"The same image is in several classes: {shorten(pairs)}. Leave out the wrong ones.")
    if head.text_probe is not None:
        head.text_probe.held_out = None
    if output:
        head.save_pretrained(output, overwrite=True)  # as was checked before
        remove_state(output)


def _tell_smallest(subset: Split, evaluation: Evaluation, log: Log) -> None:
    """Log the recall of the smallest classes, if they have at most half of the images of the largest."""
    sizes = Counter(subset.classnames[item.label] for item in subset.train)
    least = min(sizes.values(), default=0)
    told = [
        f"{row.name} {least} image{'s' * (least > 1)}, recall {row.percent:.0f} %"
        for row in evaluation.per_class
        if sizes[row.name] == least
    ]
    if told and 2 * least <= max(sizes.values()):
        log(f"smallest classes: {shorten(told)}")


def _warn_of_shared_groups(given: Sequence[Item], train: ImageLoader, test: ImageLoader) -> None:
    """Warn of test images that were taken together with training images, which are `given` without the
    groups that were found. How accurate the head is without them is not said: there may be others that are
    not found."""
    both = group_images([train.with_items(given), test])
    groups = {item.group for item in both[: len(train)] if item.group}
    shared = [item.name for item in both[len(train) :] if item.group in groups]
    if shared:
        warn(
            f"{len(shared)} of {len(test)} test images were taken together with training images or are copies of them, "
            f"such as {shared[0]}: the accuracy is too high. Keep such images in one part."
        )


def _by_folds(run: Run, task: Task, head: Head) -> dict[str, Evaluation]:
    """`evaluations` of heads that are trained as this one, each without one of four folds, on the images of
    these; empty if no group can be left out. A class of one group is always trained on."""
    images = task.images
    if head.text_probe is not None and not METHODS[run.method].trains:
        held_out = head.text_probe.held_out  # the fit of a text probe alone has left them out already
        if held_out is None:
            return {}
        items = [images.items[i] for i in held_out.positions.tolist()]
        return {
            "stored": Evaluation(head.classnames, items, held_out.logits, held_out.rejected),
            NO_CLASSIFIER: Evaluation(head.classnames, items, held_out.text_logits),
        }
    probe = task.probe._replace(describes=False)
    found = []
    for out in folds(images.labels, images.groups):
        kept = all_but(out, len(images)).nonzero().flatten().tolist()
        with without_warnings():
            trained = fit_head(run.method, replace(task, images=images.of(kept), probe=probe))
            found.append(evaluations(trained, images.of(out.tolist())))
    return {mode: Evaluation.joined([each[mode] for each in found]) for mode in found[0]} if found else {}


def _as_single(run: Run, task: Task) -> float:
    """The upper end of the interval that `_by_folds` tells where images that look like few subjects are taken
    for single photographs."""
    images = task.images.with_items(run.subset.train)
    task = replace(task, images=images.with_items(group_images([images])))
    with without_warnings():
        told = _by_folds(run, task, fit_head(run.method, task))
    return next(iter(told.values())).accuracy.interval[1]


def hold_out(run: Run, options: RunOptions, source: Source | None = None) -> Run:
    """A run of own images without a test part that holds out some of each class, whole groups, for the
    test."""
    source = source or Source(run, options.progress)
    images = run.with_groups(source.for_training(run, run.split.train), options.log)
    grouped = replace(run.split, train=list(images.items))
    return replace(run, split=training_split(grouped, run.test_share))


@shared_features()
def train_on_all(run: Run, output: Path, options: RunOptions | None = None) -> tuple[Head, dict[str, float]]:
    """As `train_head`, on all images. The accuracy is told by four folds of these; with a test part or
    `test_share`, or by methods that train prompts, in a first training without test images. Too few groups
    for this have a message."""
    options = options or RunOptions()
    parted = run.split.has_parts
    learns = METHODS[run.method].features is not None and run.needs_images
    by_folds = learns and run.test_share is None and not parted
    with alone_in(output):
        _check(run, output, options)
        source = Source(run, options.progress)
        part = run if by_folds or parted else hold_out(run, options, source)
        if by_folds or not part.split.test:
            return train_head(run, output, options, source, by_folds=by_folds)
        measured_in = output / BEFORE_REFIT
        first, task = _fit(replace(part, describes=False), measured_in, options, source)
        evaluation = _measure(part, first, task, options, source, by_folds=False)
        # with the groups that were found
        final = replace(run, split=all_for_training(part.split), shots=None, drawn=None, test_share=0.0)
        took = format_duration(first.info["train_seconds"])
        options.log(f"Refitting on all {len(final.split.train):,} images; the first fit took {took}.")
        head, _ = _fit(final, output, options, source)
        head.info |= {name: value for name, value in first.info.items() if name in MEASURED}
        _save(final, head, output)
        shutil.rmtree(measured_in, ignore_errors=True)
        if evaluation:
            options.show(evaluation)
    return head, head.info.get("metrics", {})
