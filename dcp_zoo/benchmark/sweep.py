"""Run trials: a method is trained on one few-shot subset and tested as its protocol requires. In a list
of trials, finished ones are skipped, failures are recorded, and the sweep goes on."""

import os
import socket
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from dcp_zoo.benchmark import plan, store
from dcp_zoo.benchmark.plan import PROTOCOLS, SAVED_HEADS, Settings, Trial
from dcp_zoo.data import Item, Split, few_shot, find_spec, subsample_classes
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.features import (
    CACHE_BYTES,
    FeatureCache,
    FeatureExtractor,
    ImageLoader,
    Photos,
    decoders,
    kept_features,
    pick_device,
    pick_precision,
)
from dcp_zoo.fields import Values
from dcp_zoo.files import alone_in, sha256_of
from dcp_zoo.heads.config import WEIGHTS_NAME
from dcp_zoo.heads.head import Head
from dcp_zoo.training.evaluation import (
    EVAL_BATCH,
    evaluations,
    expected_calibration_error,
    negative_log_likelihood,
    top1,
)
from dcp_zoo.training.folder import is_finished
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.recipes import VALIDATION
from dcp_zoo.training.run import Run, RunOptions, Source, train_head
from dcp_zoo.training.run import plan as plan_run
from dcp_zoo.zoo.build import plain_clip, trained_head

LOADERS = 4  # that are kept, for trials with the same training, validation and test images
FEATURE_BYTES = 2**31  # of features that are kept


class Event(NamedTuple):
    """What has become of a trial."""

    trial: Trial
    state: str  # "done" or "failed"
    message: str = ""  # accuracies, or why


class TrialImages(Source):
    """Images for one CLIP, shared by its trials. Features are kept, and decoded images, and tokens after a
    frozen stem, in the loaders that were used last."""

    def __init__(self, model: str, settings: Settings) -> None:
        self.data_root = settings.data_root
        self.device = pick_device(settings.device)
        self.clip = plain_clip(model).to(self.device)
        self.extract = FeatureExtractor(
            self.clip, pick_precision(settings.precision, model, self.device), settings.progress
        )
        self.features = FeatureCache(limit=FEATURE_BYTES)
        self._loaders: dict[tuple, ImageLoader] = {}  # the one that was used last is the last

    def split(self, dataset: str, part: str = "all") -> Split:
        """The dataset, or only its "base" or "new" classes."""
        return subsample_classes(plan.read_split(dataset, self.data_root), part)

    def subset(self, dataset: str, part: str, shots: int, seed: int) -> Split:
        """With few-shot images, drawn before half of the classes is selected, as in CoOp; without
        shots, all."""
        whole = self.split(dataset)
        return subsample_classes(few_shot(whole, shots, seed) if shots else whole, part)

    def read(self, items: Sequence[Item], augment: str = "none", again: bool = True) -> ImageLoader:
        """These images, see `Source.read`; trials share what was read."""
        key = (tuple((item.name, item.label) for item in items), augment, again)
        loader = self._loaders.pop(key, None)
        if loader is None:
            photos = Photos(items, CACHE_BYTES if again else 0)
            loader = ImageLoader(photos, self.extract, augment, decoders(self.device, len(items)))
            if again:
                loader = loader.after_stem(loader.with_flips)
        self._loaders[key] = loader
        if len(self._loaders) > LOADERS:
            del self._loaders[next(iter(self._loaders))]
        return loader


shared_images = lru_cache(maxsize=1)(TrialImages)  # those for the previous model are freed


def run_trial(trial: Trial, settings: Settings, images: TrialImages | None = None) -> Values:
    """Train and test: the content of the trial's result file. ZooError for missing or damaged data, or
    divergence. `images`: what reads them, by default those that trials of a model share."""
    unfinished = store.Unfinished(trial, settings)
    images = images or shared_images(trial.model, settings)
    split = images.split(trial.dataset)
    part = PROTOCOLS[trial.protocol].parts[0]
    subset = images.subset(trial.dataset, part, trial.shots, trial.seed)
    run = plan_run(
        split,
        trial.model,
        trial.method,
        shots=trial.shots or None,
        seed=trial.seed,
        recipe=trial.recipe,
        device=settings.device,
        precision=settings.precision,
        drawn=subset,
    )
    folder = None
    if run.recipe.is_trained or len(trial.targets) > 1:  # otherwise it is trained again in seconds
        folder = unfinished.head
        unfinished.keep()
    with kept_features(images.features):
        head = _trained(run, folder, images)
        _test(trial, head, images, unfinished)
    info = head.info
    by_default = VALIDATION if METHODS[trial.method].chooses and subset.val else "none"
    result = unfinished.conditions | {
        "trial": asdict(trial),
        "device": str(images.device),
        "split_sha256": split.sha256,
        "subset_sha256": info["subset_sha256"] if trial.shots else "",
        "info": info,
        "selection": info.get("text_probe", info).get("selection") or by_default,
        "results": unfinished.results,
        "train_seconds": info["train_seconds"],
    }
    # heads of this name are those of few-shot: other protocols train others
    if trial.method == settings.save_heads and trial.protocol == "few-shot":
        metrics = {f"top1_{entry['stats']}": entry["top1"] for entry in unfinished.results}
        saved = head.save_pretrained(settings.output / SAVED_HEADS / trial.head, overwrite=True, metrics=metrics)
        result["head_sha256"] = sha256_of(saved / WEIGHTS_NAME)
    return result


def _trained(run: Run, folder: Path | None, images: TrialImages) -> Head:
    """The head that a run trains, or has trained in this folder before."""
    if folder and is_finished(folder):
        return trained_head(images.clip, folder).eval().to(images.device)
    options = RunOptions(test=False, progress=images.extract.progress)
    run = replace(run, describes=folder is not None)
    return train_head(run, folder, options, images)[0]


def _test(trial: Trial, head: Head, images: TrialImages, unfinished: store.Unfinished) -> None:
    """Add one result per test dataset, part of its classes, and way of measuring the head to those that are
    known."""
    batch_size = getattr(trial.recipe, "eval_batch_size", EVAL_BATCH)
    done = {(entry["target"], entry["classes"]) for entry in unfinished.results}
    for target, part in product(trial.targets or (trial.dataset,), PROTOCOLS[trial.protocol].parts):
        if (target, part) in done:
            continue
        split = images.split(target, part)
        if split.classnames != head.classnames:
            head.set_classnames(split.classnames, find_spec(target).template)
        by_mode = evaluations(head, images.read(split.test), batch_size)
        if list(by_mode) == ["stored"] or not head.has_own_features:
            by_mode = {"": by_mode["stored"]}  # without its text probe it is another method
        for mode, evaluation in by_mode.items():
            answers = (evaluation.logits, evaluation.labels)
            entry = {
                "target": target,
                "classes": part,
                "stats": mode,
                "top1": top1(*answers),
                "ece": expected_calibration_error(*answers),
                "nll": negative_log_likelihood(*answers),
                "images": len(split.test),
            }
            unfinished.results.append(entry)
        unfinished.keep()


def execute(trial: Trial, settings: Settings, images: TrialImages | None = None) -> Event:
    """Run one trial, in this process or on a worker, and write its file, or that of its error. ZooError
    for an output folder that is not writable."""
    try:
        result = run_trial(trial, settings, images)
    except Exception as error:  # whatever it is, the other trials can continue
        message = str(error) if isinstance(error, ZooError) else f"{type(error).__name__}: {error}"
        store.save_failure(settings.output, trial, message, traceback.format_exc())
        return Event(trial, "failed", message)
    store.save_result(settings.output, result)
    accuracies = [f"{each['target']} {each['classes']} {each['top1']} % {each['stats']}" for each in result["results"]]
    return Event(trial, "done", ", ".join(accuracies))


def run_in_process(trials: Sequence[Trial], settings: Settings) -> Iterator[Event]:
    for trial in trials:
        yield execute(trial, settings)


# --- on Ray ---


RETRIES = 2  # after a worker died, a machine was lost, or memory was exhausted


def import_ray() -> Any:
    """The ray module, with the settings that it reads when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # otherwise they have no end
    return import_extra("ray", "ray")


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The ray module while it is connected, as it was or to this address: "10.0.0.1:6379", "auto" or "local"."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon and port.isdecimal():  # Ray itself would retry for minutes and then exit the process
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray raises many types, including plain Exception
        raise ZooError(f"No Ray cluster at {address!r}: {error}. To start one: --ray local.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def sweep_on_ray(
    trials: Sequence[Trial],
    settings: Settings,
    *,
    address: str = "local",
    cpus: float = 1,
    gpus: float | None = None,
) -> Iterator[Event]:
    """Run trials on a cluster and yield their events. Each writes its result to the sweep's folder,
    which all machines must share, so that if this process dies, only running trials are lost. Closing
    the generator cancels what runs. Workers are reused, with the images they have prepared.

    Args:
        cpus: of a trial; also the number of torch's threads.
        gpus: of a trial: 0.5 puts two on a GPU. Default: 1 if the cluster has GPUs, else 0.
    """
    data_root = settings.data_root and settings.data_root.absolute()
    settings = replace(settings, output=settings.output.absolute(), data_root=data_root)  # workers start elsewhere
    with connected(address) as ray:
        if gpus is None:
            gpus = 1 if "GPU" in ray.cluster_resources() else 0
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(machine.get("CPU", 0) >= cpus and machine.get("GPU", 0) >= gpus for machine in machines):
            needed = f"{cpus:g} cores and {gpus:g} GPUs for one trial"
            raise ZooError(f"No machine of the cluster has {needed}. Request less with --per-trial.")
        options = {"num_cpus": cpus, "num_gpus": gpus, "max_retries": RETRIES}
        # with `max_calls` a worker with a GPU would exit after each task
        remote = ray.remote(max_calls=0, **options)(execute)
        running = {remote.remote(trial, settings): trial for trial in trials}
        try:
            while running:
                (reference,), _ = ray.wait(list(running))
                yield _ended(ray, reference, running.pop(reference), settings)
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _ended(ray: ModuleType, reference: object, trial: Trial, settings: Settings) -> Event:
    """The event of a trial that has ended; it has failed if Ray lost it too often. Raises what the
    worker raised."""
    try:
        event: Event = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        reason = f"Ray lost it ({type(error).__name__}), {RETRIES + 1} times"
        store.save_failure(settings.output, trial, reason, str(error))
        return Event(trial, "failed", reason)
    if event.state == "done" and trial.key not in store.done(settings.output):
        problem = f"A worker has finished {trial.key}, but its result is not in {settings.output}."
        raise ZooError(f"{problem} --output must be a folder shared by all machines of the cluster.")
    return event


def sweep(
    trials: Sequence[Trial],
    settings: Settings,
    *,
    run: Callable[[Sequence[Trial], Settings], Iterable[Event]] = run_in_process,
    show: Callable[[Event, int, int], object] | None = None,
) -> dict[Trial, str]:
    """Run all trials that have not finished yet, by `run_in_process` or `sweep_on_ray`. `show` is called with
    each event, its number and that of all. Returns the trials that failed, with their error messages. ZooError
    for a folder in which another process sweeps, or of other settings."""
    plan.forget_images()
    shared_images.cache_clear()
    with alone_in(settings.output):
        todo = [trial for trial in trials if not store.finished(trial, settings)]
        failed = {}
        for number, event in enumerate(run(todo, settings), 1):
            if show:
                show(event, number, len(todo))
            if event.state == "failed":
                failed[event.trial] = event.message
    return failed
