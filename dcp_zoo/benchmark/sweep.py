"""Run trials: a method is trained on one few-shot subset and tested as its protocol requires. In a list of trials,
finished ones are skipped, failures are recorded, and the sweep goes on."""

import os
import socket
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from dcp_zoo.benchmark import plan, store
from dcp_zoo.benchmark.plan import PROTOCOLS, SAVED_HEADS, Settings, Trial
from dcp_zoo.data import Item, Split, few_shot, find_spec, subsample_classes
from dcp_zoo.errors import ZooError, import_extra
from dcp_zoo.fields import Values
from dcp_zoo.files import alone_in, sha256_of
from dcp_zoo.heads.checkpoint import WEIGHTS_NAME, library_versions
from dcp_zoo.heads.config import is_finished
from dcp_zoo.heads.head import Head
from dcp_zoo.training.device import decoders, pick_device, pick_precision
from dcp_zoo.training.evaluation import (
    EVAL_BATCH,
    Evaluation,
    expected_calibration_error,
    negative_log_likelihood,
    predict_modes,
    read,
    top1,
)
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.recipes import VALIDATION
from dcp_zoo.training.run import Run, RunOptions, train_head
from dcp_zoo.training.run import plan as plan_run
from dcp_zoo.training.sources import CACHE_BYTES, ImageSource, Progress, image_source, no_progress
from dcp_zoo.zoo.build import plain_clip, trained_head
from dcp_zoo.zoo.resolve import resolve

METRICS = {"top1": top1, "ece": expected_calibration_error, "nll": negative_log_likelihood}
# bytes; 8 GiB where the system does not report them
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 * 2**30
IMAGE_BYTES = 3 * 500 * 375  # of a decoded image of typical size


class Event(NamedTuple):
    """What has become of a trial."""

    trial: Trial
    state: str  # "done" or "failed"
    message: str = ""  # accuracies, or why
    seconds: float = 0.0  # that it took


class TrialImages:
    """Image sources for one CLIP, cached up to a quarter of the machine's memory; the least recent leave."""

    def __init__(self, model: str, settings: Settings) -> None:
        self.device, self.data_root = pick_device(settings.device), settings.data_root
        self.precision = pick_precision(settings.precision, model, self.device)
        self.clip = plain_clip(model).to(self.device)
        self.progress: Progress = no_progress
        self._sources: OrderedDict[tuple, ImageSource] = OrderedDict()

    def split(self, dataset: str, part: str = "all") -> Split:
        """The dataset, or only its "base" or "new" classes."""
        return subsample_classes(plan.read_split(dataset, self.data_root), part)

    def subset(self, dataset: str, part: str, shots: int, seed: int) -> Split:
        """With few-shot images, drawn before half of the classes is selected, as in CoOp; without shots, all."""
        whole = self.split(dataset)
        return subsample_classes(few_shot(whole, shots, seed) if shots else whole, part)

    def read(self, items: Sequence[Item], augment: str = "none", once: bool = False) -> ImageSource:
        """The source of these images, see `training.run.Reader`; what is read is shared by trials, `once` or not."""
        # images in memory have no hash, and as the splits keep them, no other gets their id
        content = tuple((i.label, i.path if isinstance(i.path, str) else id(i.path)) for i in items)
        flipped = self._sources.get((content, "flip"))
        if augment == "none" and flipped is not None and flipped.views is not None:
            augment = "flip"  # its first view is the plain one
        if (key := (content, augment)) not in self._sources:
            workers = decoders(self.device, len(items))
            source = image_source(self.clip, items, augment, workers, self.progress, precision=self.precision)
            if source.views is not None:  # free the decoded images, up to a gigabyte: the tokens replace them
                source.__dict__.pop("dataset", None)
            self._sources[key] = source
        self._sources.move_to_end(key)
        while len(self._sources) > 3 and sum(map(_bytes, self._sources.values())) > MEMORY / 4:
            self._sources.popitem(last=False)
        return self._sources[key]


def _bytes(source: ImageSource) -> int:
    """Approximate memory of a source: tokens, or decoded images."""
    return min(CACHE_BYTES, len(source.items) * IMAGE_BYTES) if source.views is None else source.views.nbytes


shared_images = lru_cache(maxsize=1)(TrialImages)  # those for the previous model are freed


def run_trial(
    trial: Trial, settings: Settings, progress: Progress = no_progress, images: TrialImages | None = None
) -> Values:
    """Train and test: the content of the trial's result file. ZooError for missing or damaged data, or divergence.
    `images`: what reads them, by default those that trials of a model share."""
    kept = store.Unfinished(trial, settings)
    images = images or shared_images(trial.model, settings)
    images.progress = progress
    part = PROTOCOLS[trial.protocol].parts[0]
    split, subset = images.split(trial.dataset), images.subset(trial.dataset, part, trial.shots, trial.seed)
    run = plan_run(
        split,
        trial.model,
        trial.method,
        shots=trial.shots or None,
        seed=trial.seed,
        recipe=trial.recipe,
        device=settings.device,
        precision=settings.precision,
    )
    folder = None
    if run.recipe.is_trained or len(trial.targets) > 1:  # otherwise it is trained again in seconds
        folder = kept.head
        kept.keep(kept.results)
    head = _trained(run, folder, subset, images)
    trained = time.perf_counter()
    results = _tests(trial, head, images, kept)
    known = run.info(subset)
    hashes = {"split_sha256": split.sha256, "subset_sha256": known["subset_sha256"] if trial.shots else ""}
    # heads of this name are those of few-shot: other protocols train others
    if trial.method == settings.save_heads and trial.protocol == "few-shot":
        metrics = {f"top1_{entry['stats']}": entry["top1"] for entry in results}
        folder = head.save_pretrained(settings.output / SAVED_HEADS / trial.head, **head.info | {"metrics": metrics})
        hashes["head_sha256"] = sha256_of(folder / WEIGHTS_NAME)
    details = {name: value for name, value in head.info.items() if name not in (*known, "train_seconds")}
    chosen_on = VALIDATION if METHODS[trial.method].chooses and subset.val else "none"
    return {
        "trial": asdict(trial),
        **kept.conditions,
        "device": str(images.device),
        **hashes,
        "info": details,
        "selection": details.get("text_probe", details).get("selection") or chosen_on,
        "results": results,
        "train_seconds": head.info["train_seconds"],
        "test_seconds": round(time.perf_counter() - trained, 2),
        "versions": library_versions(),
    }


def _trained(run: Run, folder: Path | None, subset: Split, images: TrialImages) -> Head:
    """The head that a run trains, or has trained in this folder before."""
    if folder and is_finished(folder):
        return trained_head(images.clip, resolve(f"local-dir:{folder}")).eval().to(images.device)
    options = RunOptions(test=False, progress=images.progress)
    return train_head(run, folder, options, clip=images.clip, subset=subset, read=images.read)[0]


def _tests(trial: Trial, head: Head, images: TrialImages, kept: store.Unfinished) -> list[Values]:
    """One entry per test dataset, part of its classes, and way of measuring the head; the kept ones come first."""
    batch_size = getattr(trial.recipe, "eval_batch_size", EVAL_BATCH)
    entries = list(kept.results)
    done = {(entry["target"], entry["classes"]) for entry in entries}
    for target, part in product(trial.targets or (trial.dataset,), PROTOCOLS[trial.protocol].parts):
        if (target, part) in done:
            continue
        split = images.split(target, part)
        if split.classnames != head.classnames:
            head.set_classnames(split.classnames, find_spec(target).template)
        source = images.read(split.test)
        modes, _ = predict_modes(head, partial(read, head, source, batch_size, images.progress))
        if [*modes] == ["stored"] or not head.has_own_features:
            modes = {"": modes["stored"]}  # without its text probe it is another method
        for mode, logits in modes.items():
            answers = Evaluation(split.classnames, split.test, logits)
            measured = {name: metric(answers.logits, answers.labels) for name, metric in METRICS.items()}
            entry: Values = {"target": target, "classes": part, "stats": mode}
            entries.append(entry | measured | {"images": len(answers.labels)})
        kept.keep(entries)
    return entries


def execute(
    trial: Trial, settings: Settings, progress: Progress = no_progress, images: TrialImages | None = None
) -> Event:
    """Run one trial, in this process or on a worker, and write its file, or that of its error. ZooError for an output
    folder that is not writable."""
    started = time.perf_counter()
    try:
        result = run_trial(trial, settings, progress=progress, images=images)
    except Exception as error:  # whatever it is, the other trials can continue
        message = str(error) if isinstance(error, ZooError) else f"{type(error).__name__}: {error}"
        store.save_failure(settings.output, trial, message, traceback.format_exc())
        return Event(trial, "failed", message, seconds=time.perf_counter() - started)
    store.save_result(settings.output, result)
    rows = ((e["target"], e["classes"].replace("all", ""), e["stats"], f"{e['top1']:.2f} %") for e in result["results"])
    accuracies = ", ".join(" ".join(filter(None, row)) for row in rows)
    return Event(trial, "done", accuracies, seconds=time.perf_counter() - started)


def run_in_process(trials: Sequence[Trial], settings: Settings, progress: Progress = no_progress) -> Iterator[Event]:
    for trial in trials:
        yield execute(trial, settings, progress)


# -------------------------------------------------------------------------------------------------------------- on Ray


LOCAL = "local"
RETRIES = 2  # after a worker died, a machine was lost, or memory was exhausted


def import_ray() -> Any:
    """The ray module, with the settings that it reads when it is imported."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))  # otherwise they have no end
    return import_extra("ray", "ray")


@contextmanager
def connected(address: str = LOCAL, **local: object) -> Iterator[Any]:
    """The ray module while it is connected. `address`: "10.0.0.1:6379", "auto", or "local", started with `local`."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    options = {"include_dashboard": False} | local if address == LOCAL else {}
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon and port.isdecimal():  # Ray itself would retry for minutes and then exit the process
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # Ray raises many types, including plain Exception
        raise ZooError(f"No Ray cluster at {address!r}: {error}. To start one: --ray local.") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def sweep_on_ray(
    trials: Sequence[Trial], settings: Settings, *, address: str = LOCAL, cpus: float = 1, gpus: float | None = None
) -> Iterator[Event]:
    """Run trials on a cluster and yield their events. Each writes its result to the sweep's folder, which all machines
    must share, so that if this process dies, only running trials are lost. Closing the generator cancels what runs.
    Workers are reused, with the images they have prepared.

    Args:
        cpus: of a trial; also the number of torch's threads.
        gpus: of a trial: 0.5 puts two on a GPU. Default: 1 if the cluster has GPUs, else 0.
    """
    root = settings.data_root and settings.data_root.absolute()
    settings = replace(settings, output=settings.output.absolute(), data_root=root)  # workers start elsewhere
    with connected(address) as ray:
        gpus = float("GPU" in ray.cluster_resources()) if gpus is None else gpus
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
    """The event of a trial that has ended; it has failed if Ray lost it too often. Raises what the worker raised."""
    try:
        event: Event = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, ZooError) else error) from None
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
    show: Callable[[Iterable[Event], int], Iterable[Event]] = lambda events, total: events,
) -> dict[Trial, str]:
    """Run all trials that have not finished yet, by `run_in_process` or `sweep_on_ray`. `show` wraps the events
    to display them, given their number. Returns the trials that failed, with their error messages. ZooError for a
    folder in which another process sweeps, or of other settings."""
    plan.forget_images()
    shared_images.cache_clear()
    with alone_in(settings.output):
        todo = [trial for trial in trials if not store.finished(trial, settings)]
        events = show(run(todo, settings), len(todo))
        return {event.trial: event.message for event in events if event.state == "failed"}
