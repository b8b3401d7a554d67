"""A `Run` of any method on few images per class: planned, with all inputs checked before any work starts, then trained,
measured and saved. `train`, `FewShotClassifier.fit`, `benchmark` and `build` all plan a `Run`, which alone makes a
`Task`."""

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
from torch import Tensor

from dcp_zoo.backbone._torch import construction
from dcp_zoo.backbone.classes import Texts
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Item, Split, few_shot, find_spec, is_own
from dcp_zoo.data.groups import grouped, in_groups
from dcp_zoo.data.images import Progress, bar, no_progress
from dcp_zoo.data.splits import all_for_training, image_hashes, subset_sha256, training_split, warn_of_numbers
from dcp_zoo.errors import ZooError, warn
from dcp_zoo.fields import Values
from dcp_zoo.files import alone_in, format_duration
from dcp_zoo.heads.checkpoint import MEASURED
from dcp_zoo.heads.config import STATE_NAME, check_free
from dcp_zoo.heads.head import Head
from dcp_zoo.probe.folds import folds, without
from dcp_zoo.training.cache import keeps_features, kept_features
from dcp_zoo.training.device import pick_device, pick_precision
from dcp_zoo.training.evaluation import EVAL_BATCH, Evaluation, answers, measure, measured
from dcp_zoo.training.loop import Callback
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.table import DCP_METHOD, RecipeLike, chosen_recipe
from dcp_zoo.training.recipes import AUTO, MANY, PROBE_REFUSED, BaseRecipe, check_seed
from dcp_zoo.training.sources import ImageSource, KnownFacts, groups_in, image_source
from dcp_zoo.training.state import SAVE_EVERY, Log, TrainingState, no_log, remove_state
from dcp_zoo.zoo.build import check_encoders, load_encoders, plain_clip
from dcp_zoo.zoo.registry import SIZES

BEFORE_REFIT = "before_refit"  # folder of the training whose head is measured
# of items, augmentation, and whether they are read once: `Run.source`, or in a sweep what trials share
Reader = Callable[[Sequence[Item], str, bool], ImageSource]


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
    facts: KnownFacts = field(default_factory=dict)  # of own images: filled as they are read

    def subset(self) -> Split:
        """The split with the training images that are used: drawn by shots and seed, or all."""
        return self.split if self.shots is None else few_shot(self.split, self.shots, self.seed)

    def source(
        self, clip: FrozenCLIP, progress: Progress, items: Sequence[Item], augment: str, once: bool
    ) -> ImageSource:
        """Images for a CLIP on the run's device, see `image_source`."""
        facts = self.facts if is_own(self.split.name) else None
        return image_source(clip, items, augment, self.workers, progress, once, self.precision, facts=facts)

    def grouped(self, source: ImageSource, options: "RunOptions") -> list[Item]:
        """The items of a source with their groups; of own images these are found, unless they were given."""
        if not is_own(self.split.name):
            return list(source.items)
        items = grouped(source.items, lambda: groups_in(source, progress=options.progress))
        if said := in_groups(items):
            options.log(f"{said}: none is on both sides of a measurement.")
        sides = [facts.sides for facts in self.facts.values()]  # of those that were read now
        squashes = source.clip.pretrained_cfg.get("crop_mode") == "squash"
        if sides and not squashes and median(min(each) / max(each) for each in sides) < 2 / 3:
            options.log("The model reads the central square, less than two thirds of most of these images.")
        return items

    def task(
        self, subset: Split, clip: FrozenCLIP, progress: Progress = no_progress, read: Reader | None = None
    ) -> Task:
        """What the method is given: the images of `subset`, for a CLIP on the run's device."""
        method, read = METHODS[self.method], read or partial(self.source, clip, progress)
        augment = self.recipe.image_augment if len(subset.train) <= MANY else self.recipe.augment
        needed = method.needs_images(self.recipe)
        val = read(subset.val, "none", True) if needed and subset.val else None
        return Task(
            clip,
            self.model,
            subset.classnames,
            self.descriptions or find_spec(self.split.name).template,
            read(subset.train, augment, method.features) if needed else None,
            val,
            self.recipe,
            self.seed,
            self.precision,
            progress,
            probe_weights=None if self.sample_weight is None else torch.tensor(self.sample_weight),
            none=read(subset.none, "none", True) if subset.none else None,
            encoders=load_encoders(self.encoders, clip),
            checks=val if is_own(self.split.name) else None,
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
        if is_own(self.split.name):
            counts = Counter(item.label for item in subset.train)
            stored["class_images"] = {name: counts[label] for label, name in enumerate(subset.classnames)}
            stored["image_hashes"] = image_hashes(subset.train + subset.val, self.facts)
        if self.split.unreadable:
            stored["unreadable_images"] = self.split.unreadable
        if subset.none:
            stored["none_sha256"] = subset_sha256(subset.none)
        if self.test_share is not None:
            stored["test_share"] = self.test_share
        stored["recipe"] = recipe.training | {"precision": self.precision}
        return stored

    def identity(self, subset: Split, clip: FrozenCLIP, info: Values) -> Values:
        """What the state of a training belongs to: its `info`, with one hash of its images in place of several, and
        more. The state of another run is rejected."""
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
        encoder: image models of timm, by name, that the text probe reads beside CLIP; see `dcp_zoo.zoo.build`.
        options: further attributes of `Run`.
    """
    check_seed(seed)
    model, place = SIZES.get(model, model), pick_device(device)
    precision = pick_precision(precision, model, place)
    per_class = shots or max(1, len(split.train) // len(split.classnames))
    fitting = chosen_recipe(method, model, split.name, per_class, recipe, classifier)
    fitting = fitting.updated(changes or {}, where="--set")
    if fitting.classifier != "none" and METHODS[method].abilities.fitted:
        raise ZooError(PROBE_REFUSED.format(method))
    if is_own(split.name) and not options.get("descriptions"):
        warn_of_numbers(split.classnames)
    encoders = (encoder,) if isinstance(encoder, str) else tuple(encoder or ())
    if encoders and fitting.classifier == "none":
        raise ZooError("An image encoder is read by the text probe: choose --classifier text-probe, or omit --encoder.")
    check_encoders(encoders)
    return Run(model, split, shots, seed, fitting, place, method, precision, encoders=encoders, **options)


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
    measured: Mapping[str, object] | None = None,
    *,
    clip: FrozenCLIP | None = None,
    subset: Split | None = None,
    read: Reader | None = None,
    by_folds: bool = False,
) -> tuple[Head, dict[str, float]]:
    """Train, measure and save one head of any method. Returns it, and its top-1 accuracies in percent. ZooError for bad
    input, an error of the method, or an output folder that is not writable, or of another run or process.

    A training that was stopped or killed resumes from the last state in its output folder. On a CPU it ends with the
    same weights bit for bit, given the same machine and number of threads.

    Args:
        run, options: the run, see `plan` and `RunOptions`.
        output: folder for `model.safetensors`, `config.json` and, of a training, until the run has finished its state.
            None writes nothing.
        measured: accuracies to store instead of measuring.
        clip: of the run, where it is loaded already, on its device.
        subset, read: the images of the run, where they are read already, and what reads them.
        by_folds: whether the accuracy is measured by folds of the training images, not on test images.
    """
    options = options or RunOptions()
    with alone_in(output) if output else nullcontext():
        check_supported(run, options.callbacks)
        if output:
            if options.overwrite and run.recipe.is_trained:
                remove_state(output)
            check_free(output, options.overwrite, resumes=run.recipe.is_trained)
        head, metrics, evaluation = _fit_and_measure(run, output, options, measured, clip, subset, read, by_folds)
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
    by_folds: bool = False,
) -> tuple[Head, dict[str, float], Evaluation | None]:
    """What `train_head` saves, its accuracies, and its predictions on the test images or `by_folds`. The state of a
    training stays in `output`."""
    started, earlier, info = time.perf_counter(), 0.0, Values()
    subset = subset or run.subset()
    clip = clip or plain_clip(run.model).to(run.device)
    task = run.task(subset, clip, options.progress, read)
    method = METHODS[run.method]
    options.log(f"{method.title} on {run.model}: {len(subset.train)} images of {len(subset.classnames)} classes")
    if task.train:
        task.train.items = task.plain_train.items = run.grouped(task.plain_train, options)
    if run.recipe.is_trained:
        if task.train and is_own(run.split.name):
            task.train.decode()
        info = run.info(subset)
        place, identity = output and output / STATE_NAME, run.identity(subset, clip, info)
        state = TrainingState(place, identity, options.save_every, options.log)
        earlier = state.seconds
        task.training = {"state": state, "callbacks": options.callbacks, "log": options.log}
    head = fit_head(run.method, task)
    info = info or run.info(subset)  # by now each image was read, and hashed in the same pass
    seconds = round(earlier + time.perf_counter() - started, 2)
    metrics: dict[str, float] = {}
    evaluation, outcome = None, dict(measured or {})
    if by_folds:
        metrics, evaluation = _by_folds(run, task) or ({}, None)
    elif measured is None and options.test and run.split.test:
        test = run.source(clip, options.progress, run.split.test, "none", head.stats_modes == ("stored",))
        if method.features:
            test.read(progress=options.progress)
        metrics, evaluation = measure(head, test, getattr(run.recipe, "eval_batch_size", EVAL_BATCH), options.progress)
        if is_own(run.split.name) and task.train and not run.split.held_out:
            _warn_of_shared_groups(subset.train, task.plain_train, test)
    if evaluation:
        outcome = {"metrics": metrics, **evaluation.info}
    if task.train and (groups := task.plain_train.groups.unique().numel()) < len(task.train.items):
        outcome["groups"] = groups
    head.info = {**info, **head.info, "trained": f"{date.today()}", "train_seconds": seconds, **outcome}
    return head, metrics, evaluation


def _warn_of_shared_groups(given: Sequence[Item], train: ImageSource, test: ImageSource) -> None:
    """Warn of test images that were taken together with training images, which are `given` without the groups that were
    found. How accurate the head is without them is not said: there may be others that are not found."""
    both = grouped([*given, *test.items], lambda: groups_in(train, test))
    first = {item.group: item for item in reversed(both[: len(train.items)]) if item.group}
    if shared := [item for item in both[len(train.items) :] if item.group in first]:
        pair = f"{shared[0].name} and {first[shared[0].group].name}"
        warn(
            f"{len(shared)} of {len(test.items)} test images were taken together with training images or are copies of "
            f"them, such as {pair}: the accuracy is too high. Keep such images in one part."
        )


def _by_folds(run: Run, task: Task) -> tuple[dict[str, float], Evaluation] | None:
    """`measure` of heads that are trained as this one is, but without one of four folds, on its images; None if no
    group can be left out. A class of one group is always trained on."""
    assert task.train is not None
    source, weights = task.plain_train, task.probe_weights
    parts = folds(source.labels, source.groups)
    modes, refused = list[dict[str, Tensor]](), list[Tensor | None]()
    with nullcontext() if keeps_features() else kept_features():
        for out in parts:
            kept = without(out, len(source.items)).nonzero().flatten().tolist()
            of_kept = None if weights is None else weights[kept]
            head = fit_head(run.method, replace(task, train=task.train.of(kept), probe_weights=of_kept))
            logits, rejected = answers(head, source.of(out.tolist()), EVAL_BATCH, task.progress)
            modes.append(logits)
            refused.append(rejected)
    if not parts:
        return None
    whole = {mode: torch.cat([each[mode] for each in modes]) for mode in modes[0]}
    known = [each for each in refused if each is not None]
    rejects = torch.cat(known) if len(known) == len(refused) else None
    return measured(whole, rejects, head.classnames, [source.items[i] for i in torch.cat(parts).tolist()])


def hold_out(run: Run, options: RunOptions, clip: FrozenCLIP | None = None) -> Run:
    """A run of own images without a test part that holds out some of each class, whole groups, for the test."""
    clip = clip or plain_clip(run.model).to(run.device)
    source = run.source(clip, options.progress, run.split.train, run.recipe.image_augment, METHODS[run.method].features)
    images = replace(run.split, train=run.grouped(source, options))
    return replace(run, split=training_split(images, run.test_share))


def train_on_all(run: Run, output: Path, options: RunOptions | None = None) -> tuple[Head, dict[str, float]]:
    """As `train_head`, on all images. The accuracy is told by four folds of these; with a test part or `test_share`, or
    by methods that train prompts, in a first training without test images. Too few groups for this have a message."""
    options, parted = options or RunOptions(), run.split.has_parts
    learns = METHODS[run.method].features and METHODS[run.method].needs_images(run.recipe)
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
            trained, metrics, evaluation = _fit_and_measure(part, first, options, clip=clip)
            took = format_duration(trained.info["train_seconds"])
            final = replace(run, split=all_for_training(part.split), shots=None, test_share=0.0)  # with its groups
            options.log(f"Refitting on all {len(final.split.train):,} images; the first fit took {took}.")
            measured = {name: trained.info[name] for name in MEASURED if name in trained.info}
            head, _ = train_head(final, output, options, measured, clip=clip)
            shutil.rmtree(first, ignore_errors=True)
            if evaluation:
                options.show(evaluation)
        if not metrics:
            options.log("There are too few images, or groups, of a class to leave any out: the accuracy is not known.")
    return head, metrics
