"""One few-shot run, from its name to a measured checkpoint: shared by the command line, the demo and the heads."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dcp_zoo.data import (
    Split,
    all_for_training,
    check_images,
    few_shot,
    load_labelled,
    subset_sha256,
    training_split,
)
from dcp_zoo.data.splits import check_test_share
from dcp_zoo.errors import ZooError, cannot_write, check_choice
from dcp_zoo.model.checkpoint import WEIGHTS_NAME
from dcp_zoo.model.config_file import read_config
from dcp_zoo.model.dcp import DCP
from dcp_zoo.model.names import Descriptions, sentences_of
from dcp_zoo.training import distributed
from dcp_zoo.training.callbacks import Callback
from dcp_zoo.training.device import CHECKPOINTING, pick_device, seed_everything
from dcp_zoo.training.evaluation import Evaluation, measure
from dcp_zoo.training.fit import fit_dcp
from dcp_zoo.training.loop import open_log
from dcp_zoo.training.recipes import PRECISIONS, Recipe, default_recipe
from dcp_zoo.training.sources import Progress, image_source, no_progress
from dcp_zoo.training.stage import fit_stage
from dcp_zoo.training.state import SAVE_EVERY, STATE_NAME, TrainingState, never, remove_state
from dcp_zoo.zoo.factory import create_model

BEFORE_REFIT = "before_refit"  # folder of the head that is measured


@dataclass(frozen=True)
class Run:
    """One few-shot run.

    Attributes:
        model: name of a model, such as "dcp_vitb16".
        split: the full dataset, from which the few-shot subset is drawn.
        shots: training images per class; None uses all.
        seed: of the subset, the prompts and the order of the images.
        clip_pretrained: another open_clip tag for CLIP's weights.
        workers: processes that decode images.
        grad_checkpointing: "auto", "on" or "off", see `memory.needs_checkpointing`.
        descriptions: sentences of each class, in place of its name.
        test_share: share of images held out for the test, if not the default; for the record.
    """

    model: str
    split: Split
    shots: int | None
    seed: int
    recipe: Recipe
    device: torch.device
    precision: str = "float32"
    clip_pretrained: str | None = None
    workers: int = 0
    grad_checkpointing: str = "auto"
    descriptions: Descriptions | None = None
    test_share: float | None = None

    def subset(self) -> Split:
        """The split with the training images that are used: drawn by shots and seed, or all."""
        return self.split if self.shots is None else few_shot(self.split, self.shots, self.seed)

    def info(self, subset: Split) -> dict[str, Any]:
        """What a checkpoint stores about its images, of which `subset` trains."""
        stored: dict[str, Any] = {
            "dataset": self.split.name,
            "shots": self.shots,
            "seed": self.seed,
            "split_sha256": self.split.sha256,
            "subset_sha256": subset_sha256(subset.train),
        }
        return stored if self.test_share is None else stored | {"test_share": self.test_share}


def plan(
    model: str,
    dataset: str,
    data_root: str | Path | None,
    shots: int | None,
    seed: int,
    recipe: Recipe | None = None,
    device: str = "auto",
    test: float | None = None,
    **options: Any,
) -> Run:
    """A run from names, with all inputs checked before any work starts; `options` are further attributes of `Run`.

    `test` is the share of images held out for the test if they come without test images, see `training_split`.
    """
    check_choice("precision", options.get("precision", "float32"), PRECISIONS)
    check_choice("grad_checkpointing", options.get("grad_checkpointing", "auto"), CHECKPOINTING)
    images = load_labelled(dataset, data_root)
    check_test_share(images, test)
    if dataset == "folder":
        check_images(images.items)
    split, options["test_share"] = training_split(images, test), test
    return Run(model, split, shots, seed, recipe or default_recipe(model, dataset), pick_device(device), **options)


def train_head(
    run: Run,
    output: Path | None,
    *,
    test: bool = True,
    overwrite: bool = False,
    save_every: float = SAVE_EVERY,
    progress: Progress = no_progress,
    log: Callable[[str], object] = str,
    stop: Callable[[], bool] = never,
    show: Callable[[Evaluation], object] = id,
    measured: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    class_weight: torch.Tensor | None = None,
) -> tuple[DCP, dict[str, float]]:
    """Train, calibrate, measure and save one head.

    A run that was stopped or killed resumes from the last state in its output folder and ends with the same weights
    bit for bit, given the same machine and number of threads. With several processes, all call this function, and only
    the main process calibrates, measures and saves.

    Args:
        run: the run.
        output: folder for `model.safetensors`, `config.json` and `log.csv`, and until the run has finished its state.
            None writes nothing.
        test: whether to measure on the split's test images, if it has any.
        overwrite: start again, replacing an existing checkpoint or the state of a stopped run.
        save_every: seconds between two saves of the state; 0 saves after every step.
        progress, log: progress bars and messages.
        stop: called after every step, see `TrainingState`.
        show: receives the answers on the test images.
        measured: accuracies to store instead of measuring.
        callbacks, class_weight: see `loop.train`; the split's validation images are classified for the callbacks, and
            the classifier stage is fitted to them.

    Returns:
        The model, and its top-1 accuracies in percent.

    Raises:
        ZooError: bad input, an output folder that is not writable or belongs to another run, or an error of
            `loop.train`.
    """
    if output and distributed.is_main():
        if overwrite:
            remove_state(output)
        check_free(output, overwrite, resumes=True)
    started = time.perf_counter()
    subset = run.subset()
    seed_everything(run.seed)
    recipe = run.recipe.fitted(len(subset.train), len(subset.classnames))
    model = _new_model(run, subset.classnames)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    log(f"{run.model}: {trainable:,} trainable parameters; {len(subset.train)} images of {model.num_classes} classes")
    info = _info(run, subset, class_weight)
    state = TrainingState(output and output / STATE_NAME, _identity(run, model) | info, save_every, log, stop)
    earlier = state.seconds[-1] if state.seconds else 0.0
    source = image_source(model, subset.train, run.recipe.augment, run.workers, progress)
    log_file = output / "log.csv" if output and distributed.is_main() else None
    with _writing(output), open_log(log_file) if log_file else nullcontext() as step_log:
        fitted = fit_dcp(
            source,
            recipe,
            val=image_source(model, subset.val, "none", run.workers, progress) if subset.val else None,
            seed=run.seed,
            precision=run.precision,
            grad_checkpointing=run.grad_checkpointing,
            reload_clip=lambda: _new_model(run, subset.classnames).clip,
            step_log=step_log,
            progress=progress,
            state=state,
            callbacks=callbacks,
            class_weight=class_weight,
        )
    if stop():  # requested in the last step, or while calibrating
        raise KeyboardInterrupt
    metrics: dict[str, float] = {}
    evaluation = None
    if not distributed.is_main():
        return model, metrics
    info |= fitted
    info["train_seconds"] = round(earlier + time.perf_counter() - started, 1)
    if measured is not None:
        info |= measured
    elif test and run.split.test:
        source = image_source(model, run.split.test, "none", run.workers, progress)
        metrics, evaluation = measure(source, recipe, progress=progress)
        info |= {"metrics": metrics, "test_images": len(run.split.test)}
    model.info = info
    if output:
        model.save_pretrained(output)
        remove_state(output)
    if evaluation:  # last, as a report that cannot be written must not cost the head
        show(evaluation)
    return model, metrics


def train_and_refit(run: Run, output: Path, *, overwrite: bool = False, **options: Any) -> dict[str, float]:
    """`train_head`, and then once more on all images of the split, the test images included: that head is saved, with
    the accuracies of the first, if there were test images. `options` are those of `train_head`."""
    first, final = output / BEFORE_REFIT, on_all_images(run)
    if not run.split.test:
        return train_head(final, output, overwrite=overwrite, **options)[1]
    if distributed.is_main():
        check_free(output, overwrite, resumes=True)
    finished = distributed.from_main(lambda: _is_finished(first))
    if overwrite or not finished or not distributed.from_main(lambda: _is_head_of(first, run, **options)):
        train_head(run, first, overwrite=overwrite or finished, **options)
    info = distributed.from_main(lambda: read_config(first)["dcp"])
    measured = {name: info[name] for name in ("metrics", "test_images") if name in info}
    train_head(final, output, overwrite=overwrite, measured=measured, **options)
    if distributed.is_main():
        shutil.rmtree(first)
    return measured.get("metrics", {})


def on_all_images(run: Run) -> Run:
    """The same run on all images of the split, with nothing left for a test."""
    return replace(run, split=all_for_training(run.split), shots=None, test_share=0.0)


def fit_classifier(
    model: Any, split: Split, shots: int | None, seed: int, *, workers: int = 0, progress: Progress = no_progress
) -> dict[str, Any]:
    """Give a head a classifier stage, from few-shot images of its classes; one without a stored statistics gets that
    too.

    Args:
        model: a DCP or another head, on its device; its classes are put into the order of the split's.
        split: labelled images of its classes; the test images are not read.
        shots, seed: of the few-shot images; no shots for all.
        workers, progress: see `Run` and `train_head`.

    Returns:
        How the stage was fitted, see `fit_stage`; also stored in the model's info.
    """
    subset = split if shots is None else few_shot(split, shots, seed)
    model.set_classnames(subset.classnames)
    train = image_source(model, subset.train, "flip" if model.stem else "none", workers, progress)
    val = image_source(model, subset.val, "none", workers, progress) if subset.val else None
    if model.stats != "stored":
        model.store_stats(train.batches(64), train.patches)
    found = fit_stage(train, val, progress)
    found |= {"split_sha256": split.sha256, "subset_sha256": subset_sha256(subset.train)}
    model.info = {name: value for name, value in model.info.items() if name not in ("metrics", "test_images")}
    model.info["classifier"] = found
    return found


def _is_finished(folder: Path) -> bool:
    return (folder / WEIGHTS_NAME).exists() and not (folder / STATE_NAME).exists()


def check_free(output: Path, overwrite: bool, *, resumes: bool = False) -> None:
    """ZooError if the folder holds a finished checkpoint that may not be replaced; or, unless the caller `resumes` it,
    a DCP in training."""
    if overwrite:
        return
    if _is_finished(output):
        raise ZooError(f"{output} already holds a checkpoint: choose another --output, or pass --overwrite.")
    if not resumes and (output / STATE_NAME).exists():
        raise ZooError(
            f"{output} holds a DCP whose training was stopped, and can resume: choose another --output, or pass "
            "--overwrite."
        )


def _info(run: Run, subset: Split, class_weight: torch.Tensor | None = None) -> dict[str, Any]:
    """What a checkpoint stores about how it was trained."""
    recipe = run.recipe.fitted(len(subset.train), len(subset.classnames))
    info = run.info(subset) | {"recipe": recipe.training | {"precision": run.precision}}
    if class_weight is not None:
        info["class_weight"] = [round(weight, 4) for weight in class_weight.tolist()]
    return info


def _is_head_of(folder: Path, run: Run, class_weight: torch.Tensor | None = None, **options: Any) -> bool:
    """Whether the finished head in a folder is the one that this run would train."""
    config = read_config(folder)
    same_model = (config["architecture"], config["model_args"]) == (run.model, run.recipe.config.as_dict())
    texts = sentences_of(run.split.classnames, run.descriptions) if run.descriptions else None
    expected = _info(run, run.subset(), class_weight) | {"descriptions": texts}
    clip = {"clip": run.clip_pretrained} if run.clip_pretrained else {}
    return same_model and all(config["dcp"].get(name) == value for name, value in (expected | clip).items())


def _new_model(run: Run, classnames: Sequence[str]) -> DCP:
    """CLIP's weights and fresh prompts, on the run's device."""
    options = {"clip_pretrained": run.clip_pretrained, "descriptions": run.descriptions, **run.recipe.config.as_dict()}
    model = create_model(run.model, "clip", classnames=classnames, **options)
    return model.to(run.device)


def _identity(run: Run, model: DCP) -> dict[str, Any]:
    """What identifies a run in addition to its checkpoint's info: the state of another run is rejected."""
    return {
        "model": run.model,
        "clip": model.clip_source,
        "CLIP weights": _fingerprint(model.clip.parameters()),
        "options": run.recipe.config.as_dict(),
        **({"descriptions": run.descriptions} if run.descriptions else {}),
    }


def _fingerprint(tensors: Iterator[torch.Tensor]) -> str:
    """A fast fingerprint of weights: the sum of their 64-bit words, or of bytes if the size is not a multiple of 8."""
    total = 0
    for t in tensors:
        flat = t.detach().reshape(-1)
        in_words = flat.numel() * flat.element_size() % 8 == 0
        total += int(flat.view(torch.int64 if in_words else torch.uint8).sum(dtype=torch.int64))
    return f"{total % 2**64:016x}"


@contextmanager
def _writing(output: Path | None) -> Iterator[None]:
    """Create the folder, if there is one, and turn OSErrors inside the context into a ZooError."""
    if output is None:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise cannot_write(output, error, "choose another folder; the same command resumes the run") from error
