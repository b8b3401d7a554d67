"""A `Run` of any method on few images per class: planned, with all inputs checked before any work starts,
then trained, measured and saved. `train`, `FewShotClassifier.fit`, `benchmark` and `build` all plan a `Run`,
which alone makes a `Task`."""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dcp_zoo.answers import Outputs
from dcp_zoo.backbone._torch import construction
from dcp_zoo.backbone.classes import Texts
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Item, Split, few_shot, find_spec, is_user_data
from dcp_zoo.data.groups import count_of_groups
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
from dcp_zoo.features import AUTO
from dcp_zoo.features.cache import shared_features
from dcp_zoo.features.device import pick_device, pick_precision
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.groups import group_images
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import CACHE_BYTES, Photos
from dcp_zoo.features.subjects import looks_few
from dcp_zoo.features.views import PLAIN
from dcp_zoo.fields import Values
from dcp_zoo.files import alone_in
from dcp_zoo.heads.config import MEASURED, NO_CLASSIFIER
from dcp_zoo.heads.head import Head
from dcp_zoo.probe.folds import folds, without
from dcp_zoo.progress import Progress, bar, format_duration, no_progress
from dcp_zoo.training.evaluation import EVAL_BATCH, Evaluation, measure, measured, outputs_by_mode
from dcp_zoo.training.folder import STATE_NAME, check_free
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.base import plain
from dcp_zoo.training.methods.table import DCP_METHOD, RecipeLike, chosen_recipe
from dcp_zoo.training.recipes import PROBE_REFUSED, BaseRecipe, check_seed
from dcp_zoo.training.state import SAVE_EVERY, Log, TrainingState, no_log, remove_state
from dcp_zoo.training.task import Callback, ProbeInputs, Task
from dcp_zoo.zoo.build import check_encoders, load_encoders, plain_clip
from dcp_zoo.zoo.specs import SIZES

BEFORE_REFIT = "before_refit"  # folder of the training whose head is measured
Reader = Callable[[Sequence[Item], str, bool], ImageLoader]  # see `Run.images`; in a sweep, what trials share


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
    facts: dict[str, Facts] = field(default_factory=dict)  # of own images: filled as they are read

    def subset(self) -> Split:
        """The split with the training images that are used: drawn by shots and seed, or all."""
        return self.split if self.shots is None else few_shot(self.split, self.shots, self.seed)

    def images(
        self, clip: FrozenCLIP, progress: Progress, items: Sequence[Item], augment: str = "none", again: bool = False
    ) -> ImageLoader:
        """Loader for a CLIP on the run's device, shown as in training: those that are read `again` and again
        stay in memory, decoded or after a frozen stem."""
        facts = self.facts if is_user_data(self.split.name) else None
        photos = Photos(items, CACHE_BYTES if again else 0, facts)
        loader = ImageLoader(photos, FeatureExtractor(clip, self.precision, progress), augment, self.workers)
        if not again:
            return loader
        needs_flips = augment == "none" and self.recipe.classifier != "none"
        return loader.after_stem(loader.with_flips if needs_flips else loader.views)

    def grouped(self, images: ImageLoader, options: "RunOptions") -> list[Item]:
        """The items with their groups; of own images these are found, unless they were given."""
        if not is_user_data(self.split.name):
            return list(images.items)
        features = METHODS[self.method].features
        reads_flips = features not in (None, plain) or self.recipe.classifier != "none"
        items = group_images([images], images.with_flips if reads_flips else (PLAIN,), subjects=True)
        found_groups = count_of_groups(items)
        if found_groups:
            options.log(f"{found_groups}: none is on both sides of a measurement.")
        sides = [facts.sides for facts in self.facts.values()]  # of those that were read now
        squashes = images.extract is not None and images.extract.clip.pretrained_cfg.get("crop_mode") == "squash"
        if sides and not squashes and median(min(each) / max(each) for each in sides) < 2 / 3:
            options.log("The model reads the central square, less than two thirds of most of these images.")
        return items

    def task(
        self, subset: Split, clip: FrozenCLIP, progress: Progress = no_progress, read: Reader | None = None
    ) -> Task:
        """What the method is given: the images of `subset`, for a CLIP on the run's device."""
        method = METHODS[self.method]
        read = read or partial(self.images, clip, progress)
        needed = method.needs_images(self.recipe)
        val = read(subset.val, "none", False) if needed and subset.val else None
        return Task(
            clip,
            self.model,
            subset.classnames,
            self.descriptions or find_spec(self.split.name).template,
            read(subset.train, self.recipe.augment, method.features is None),
            val.table().first_parts(1) if val and method.chooses else None,
            self.recipe,
            self.seed,
            self.precision,
            progress,
            probe=ProbeInputs(
                weights=None if self.sample_weight is None else torch.tensor(self.sample_weight),
                none=read(subset.no_class, "none", False) if subset.no_class else None,
                checks=val if is_user_data(self.split.name) else None,
                encoders=load_encoders(self.encoders, clip),
                describes=self.describes,
            ),
        )

    def info(self, subset: Split) -> Values:
        """What a checkpoint stores about how it was trained, on the training images of `subset`."""
        recipe = self.recipe.fitted(len(subset.train), len(subset.classnames))
        stored: Values = {
            "dataset": self.split.name,
            "shots": self.shots,
            "seed": self.seed,
            "split_sha256": self.split.sha256,
            "subset_sha256": subset_sha256(subset.train),
        }
        if is_user_data(self.split.name):
            counts = Counter(item.label for item in subset.train)
            stored["class_images"] = {name: counts[label] for label, name in enumerate(subset.classnames)}
            stored["image_hashes"] = image_hashes(learnt_from(subset), self.facts)
        if self.split.unreadable:
            stored["unreadable_images"] = self.split.unreadable
        if subset.no_class:
            stored["none_sha256"] = subset_sha256(subset.no_class)
        if self.test_share is not None:
            stored["test_share"] = self.test_share
        stored["recipe"] = recipe.training | {"precision": self.precision}
        return stored

    def identity(self, subset: Split, clip: FrozenCLIP, info: Values) -> Values:
        """What the state of a training belongs to: its `info`, with one hash of its images in place of
        several, and more. The state of another run is rejected."""
        of_images = {name: info.get(name) for name in ("split_sha256", "subset_sha256", "image_hashes")}
        return {
            **{name: value for name, value in info.items() if name not in (*of_images, "recipe")},
            **self.recipe.fitted(len(subset.train), len(subset.classnames)).as_dict(),
            "precision": self.precision,
            "hash of the images": sha256(repr(of_images).encode()).hexdigest()[:12],
            "model": self.model,
            "method": self.method,
            "clip": clip.source,
            "CLIP weights": clip.fingerprint(),
            "CLIP architecture": construction(clip.clip),
            "preprocessing": clip.preprocessing,
            **({"descriptions": self.descriptions} if self.descriptions else {}),
        }


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
        raise ZooError(PROBE_REFUSED.format(method))
    if is_user_data(split.name) and not options.get("descriptions"):
        warn_of_numbers(split.classnames)
    encoders = (encoder,) if isinstance(encoder, str) else tuple(encoder or ())
    if encoders and fitting.classifier == "none":
        raise ZooError("An image encoder is read by the text probe: choose --classifier text-probe, or omit --encoder.")
    check_encoders(encoders)
    return Run(model, split, shots, seed, fitting, picked, method, precision, encoders=encoders, **options)


def check_supported(run: Run, callbacks: Sequence[Callback]) -> None:
    """ZooError for callbacks of a method that does not train by epochs."""
    if callbacks and not run.recipe.is_trained:
        able = [name for name in METHODS if METHODS[name].recipe(run.model, run.split.name, 1, "few-shot").is_trained]
        raise ZooError(f"{run.method} does not support callbacks: choose from {', '.join(able)}.")


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
    known_metrics: Mapping[str, object] | None = None,
    *,
    clip: FrozenCLIP | None = None,
    subset: Split | None = None,
    read: Reader | None = None,
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
        known_metrics: accuracies to store instead of measuring.
        clip: of the run, where it is loaded already, on its device.
        subset, read: the images of the run, where they are read already, and what reads them.
        by_folds: whether the accuracy is measured by folds of the training images, not on test images.
    """
    options = options or RunOptions()
    subset = subset or run.subset()
    with alone_in(output) if output else nullcontext():
        check_supported(run, options.callbacks)
        if output:
            if options.overwrite and run.recipe.is_trained:
                remove_state(output)
            check_free(output, options.overwrite, resumes=run.recipe.is_trained)
        head, metrics, evaluation = _fit_and_measure(
            run, output, options, known_metrics, clip=clip, subset=subset, read=read, by_folds=by_folds
        )
        if METHODS[run.method].needs_images(run.recipe):
            _warn_of_two_classes(subset, head.info)
        if is_user_data(run.split.name) and known_metrics is None and run.test_share != 0 and not metrics:
            options.log("There are too few images, or groups, of a class to leave any out: the accuracy is not known.")
        untested = head.info.get("untested")
        if untested:
            advice = "to leave one out, a class needs two images, or groups"
            options.log(f"No image of {shorten(untested)} was tested: {advice}.")
        if output:
            head.save_pretrained(output, overwrite=True)  # as was checked before
            remove_state(output)
        if evaluation:  # last, as a report that cannot be written must not cost the head
            options.show(evaluation)
        return head, metrics


@shared_features()
def _fit_and_measure(
    run: Run,
    output: Path | None,
    options: RunOptions,
    known_metrics: Mapping[str, object] | None = None,
    *,
    clip: FrozenCLIP | None = None,
    subset: Split,
    read: Reader | None = None,
    by_folds: bool = False,
) -> tuple[Head, dict[str, float], Evaluation | None]:
    """What `train_head` saves, its accuracies, and its predictions on the test images or `by_folds`. The
    state of a training stays in `output`."""
    started = time.perf_counter()
    earlier = 0.0  # seconds of the training that is resumed
    info = Values()
    clip = clip or plain_clip(run.model).to(run.device)
    task = run.task(subset, clip, options.progress, read)
    method = METHODS[run.method]
    options.log(f"{method.title} on {run.model}: {len(subset.train)} images of {len(subset.classnames)} classes")
    needs_images = method.needs_images(run.recipe)
    images = task.images
    if needs_images:
        task.images = task.images.with_items(run.grouped(task.images, options))
    if run.recipe.is_trained:
        info = run.info(subset)
        state_path = output and output / STATE_NAME
        identity = run.identity(subset, clip, info)
        task.state = TrainingState(state_path, identity, options.save_every, options.log)
        task.callbacks = options.callbacks
        earlier = task.state.seconds
    head = fit_head(run.method, task)
    if not info:  # made after the fit, which has read and hashed each image
        info = run.info(subset)
    seconds = round(earlier + time.perf_counter() - started, 2)
    metrics: dict[str, float] = {}
    evaluation = None
    outcome = dict(known_metrics or {})
    if by_folds:
        metrics, evaluation = _by_folds(run, task, head) or ({}, None)
        if evaluation and looks_few(task.images.items):
            evaluation = replace(evaluation, at_most=_as_single(run, replace(task, images=images)))
    elif known_metrics is None and options.test and run.split.test:
        is_read_twice = head.stats_modes != ("stored",)  # once for each kind of statistics
        test = run.images(clip, options.progress, run.split.test, again=is_read_twice)
        metrics, evaluation = measure(head, test, getattr(run.recipe, "eval_batch_size", EVAL_BATCH))
        if is_user_data(run.split.name) and needs_images and not run.split.held_out:
            _warn_of_shared_groups(subset.train, task.images, test)
    if evaluation:
        outcome = {"metrics": metrics, **evaluation.info}
        _tell_smallest(subset, evaluation, options.log)
    if needs_images:
        groups = task.images.groups.unique().numel()
        if groups < len(task.images):
            outcome["groups"] = groups
    if head.text_probe is not None:
        head.text_probe.held_out = None  # it is measured
    if clip.note:
        outcome["clip_note"] = clip.note
    head.info = {**info, **head.info, "trained": f"{date.today()}", "train_seconds": seconds, **outcome}
    return head, metrics, evaluation


def _tell_smallest(subset: Split, evaluation: Evaluation, log: Log) -> None:
    """Log the recall of the smallest classes, if they have at most half of the images of the largest."""
    sizes = Counter(item.label for item in subset.train)
    least = min(sizes.values())
    if 2 * least > max(sizes.values()):
        return
    matrix = evaluation.confusion_matrix
    recalls = 100 * matrix.diagonal() / matrix.sum(1)
    told = [
        f"{name} {least} image{'s' * (least > 1)}, recall {recalls[label]:.0f} %"
        for label, name in enumerate(subset.classnames)
        if sizes[label] == least and matrix[label].any()
    ]
    if told:
        log(f"smallest classes: {shorten(told)}")


def learnt_from(subset: Split) -> list[Item]:
    """All images that a head is fitted to or chosen by, the examples of no class included."""
    return subset.train + subset.val + subset.no_class


def _warn_of_two_classes(subset: Split, info: Values) -> None:
    """Warn of own training images that are in several classes, by the hashes in a head's `info`."""
    several = in_several_classes(learnt_from(subset), info.get("image_hashes", {}))
    pairs = [f"{group[0].name} and {group[1].name}" for group in several]
    if pairs:
        warn(f"The same image is in several classes: {shorten(pairs)}. Leave out the wrong ones: a head learns both.")


def _warn_of_shared_groups(given: Sequence[Item], train: ImageLoader, test: ImageLoader) -> None:
    """Warn of test images that were taken together with training images, which are `given` without the
    groups that were found. How accurate the head is without them is not said: there may be others that are
    not found."""
    both = group_images([train.with_items(given), test])
    first = {item.group: item for item in reversed(both[: len(train.items)]) if item.group}
    shared = [item for item in both[len(train.items) :] if item.group in first]
    if shared:
        pair = f"{shared[0].name} and {first[shared[0].group].name}"
        warn(
            f"{len(shared)} of {len(test.items)} test images were taken together with training images or are copies of "
            f"them, such as {pair}: the accuracy is too high. Keep such images in one part."
        )


def _by_folds(run: Run, task: Task, head: Head) -> tuple[dict[str, float], Evaluation] | None:
    """`measure` of heads that are trained as this one, each without one of four folds, on the images of
    these; None if no group can be left out. A class of one group is always trained on."""
    images = task.images
    if head.text_probe is not None and not METHODS[run.method].trains:
        held_out = head.text_probe.held_out  # the fit of a text probe alone has left them out already
        if held_out is None:
            return None
        rejected = None if held_out.rejected is None else held_out.rejected.numpy()
        outputs = {
            "stored": Outputs(held_out.logits.numpy(), rejected),
            NO_CLASSIFIER: Outputs(held_out.text_logits.numpy()),
        }
        return measured(outputs, head.classnames, [images.items[i] for i in held_out.positions.tolist()])
    parts = folds(images.labels, images.groups)
    if not parts:
        return None
    found = []
    with without_warnings():
        for out in parts:
            kept = without(out, len(images)).nonzero().flatten().tolist()
            probe = task.probe._replace(describes=False)
            if probe.weights is not None:
                probe = probe._replace(weights=probe.weights[kept])
            trained = fit_head(run.method, replace(task, images=images.of(kept), probe=probe))
            found.append(outputs_by_mode(trained, images.of(out.tolist())))
    outputs = {mode: Outputs.joined([each[mode] for each in found]) for mode in found[0]}
    return measured(outputs, head.classnames, [images.items[i] for i in torch.cat(parts).tolist()])


def _as_single(run: Run, task: Task) -> float:
    """The upper end of the interval that `_by_folds` tells where images that look like few subjects are taken
    for single photographs."""
    images = task.images
    task = replace(task, images=images.with_items(group_images([images])))
    with without_warnings():
        told = _by_folds(run, task, fit_head(run.method, task))
    assert told
    return told[1].accuracy.interval[1]


def hold_out(run: Run, options: RunOptions, clip: FrozenCLIP | None = None) -> Run:
    """A run of own images without a test part that holds out some of each class, whole groups, for the
    test."""
    clip = clip or plain_clip(run.model).to(run.device)
    again = METHODS[run.method].features is None
    images = run.images(clip, options.progress, run.split.train, run.recipe.augment, again)
    whole = replace(run.split, train=run.grouped(images, options))
    return replace(run, split=training_split(whole, run.test_share))


@shared_features()
def train_on_all(run: Run, output: Path, options: RunOptions | None = None) -> tuple[Head, dict[str, float]]:
    """As `train_head`, on all images. The accuracy is told by four folds of these; with a test part or
    `test_share`, or by methods that train prompts, in a first training without test images. Too few groups
    for this have a message."""
    options = options or RunOptions()
    parted = run.split.has_parts
    learns = METHODS[run.method].features is not None and METHODS[run.method].needs_images(run.recipe)
    by_folds = learns and run.test_share is None and not parted
    with alone_in(output):
        check_supported(run, options.callbacks)
        check_free(output, options.overwrite, resumes=run.recipe.is_trained)
        first = output / BEFORE_REFIT
        if options.overwrite:
            remove_state(first)
        clip = plain_clip(run.model).to(run.device)
        part = run if by_folds or parted else hold_out(run, options, clip)
        if by_folds or not part.split.test:
            head, metrics = train_head(run, output, options, clip=clip, by_folds=by_folds)
        else:
            part = replace(part, describes=False)
            trained, metrics, evaluation = _fit_and_measure(part, first, options, clip=clip, subset=part.subset())
            took = format_duration(trained.info["train_seconds"])
            final = replace(run, split=all_for_training(part.split), shots=None, test_share=0.0)  # with its groups
            options.log(f"Refitting on all {len(final.split.train):,} images; the first fit took {took}.")
            known_metrics = {name: trained.info[name] for name in MEASURED if name in trained.info}
            head, _ = train_head(final, output, options, known_metrics, clip=clip)
            shutil.rmtree(first, ignore_errors=True)
            if evaluation:
                options.show(evaluation)
    return head, metrics
