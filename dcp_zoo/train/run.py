"""One few-shot run from its name to a measured checkpoint: what the command line and the benchmarks share."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dcp_zoo.data import Split, few_shot, load_split, subset_sha256
from dcp_zoo.errors import ZooError
from dcp_zoo.model._cache import fingerprint
from dcp_zoo.model.checkpoint import WEIGHTS_NAME, head_state, save_pretrained
from dcp_zoo.model.dcp import DCP, check_choice
from dcp_zoo.model.memory import MEMORIES
from dcp_zoo.train import distributed
from dcp_zoo.train.loop import cast_frozen, finish, measure, open_log, pick_device, seed_everything, train
from dcp_zoo.train.recipes import PRECISIONS, Recipe, read_recipe
from dcp_zoo.train.sources import Progress, Source, image_source, no_progress, plain_view
from dcp_zoo.train.state import SAVE_EVERY, STATE_NAME, TrainingState, remove_state
from dcp_zoo.zoo.factory import create_model
from dcp_zoo.zoo.registry import get_spec

HEAD_RECIPES = Path(__file__).parent / "head_recipes"  # a YAML file for each data set that needs something else


@dataclass(frozen=True)
class Run:
    """One few-shot run.

    Attributes:
        model: name of a model, such as "dcp_vitb16".
        split: the whole data set; the few-shot subset is drawn from it.
        shots: training images a class.
        seed: of the subset, the prompts and the order of the images.
        clip_pretrained: another open_clip tag for CLIP's weights.
        workers: processes that decode images.
        memory: "auto", "fast" or "low", see `DCP.memory`.
    """

    model: str
    split: Split
    shots: int
    seed: int
    recipe: Recipe
    device: torch.device
    precision: str = "float32"
    clip_pretrained: str | None = None
    workers: int = 0
    memory: str = "auto"


def default_recipe(model: str, dataset: str | None = None) -> Recipe:
    """The release's recipe, with what the model's row in the table and then `head_recipes/DATASET.yaml` change."""
    recipe = Recipe(**get_spec(model).recipe)
    changes = HEAD_RECIPES / f"{dataset}.yaml"
    return read_recipe(changes, recipe) if changes.is_file() else recipe


def plan(
    model: str,
    dataset: str,
    data_root: str | Path | None,
    shots: int,
    seed: int,
    recipe: Recipe | None = None,
    device: str = "auto",
    **options: Any,
) -> Run:
    """A run from names, everything checked before any work starts."""
    check_choice("precision", options.get("precision", "float32"), tuple(PRECISIONS))
    check_choice("memory", options.get("memory", "auto"), MEMORIES)
    split = load_split(dataset, data_root)
    return Run(model, split, shots, seed, recipe or default_recipe(model, dataset), pick_device(device), **options)


def train_head(
    run: Run,
    output: Path,
    *,
    test: Source | None = None,
    overwrite: bool = False,
    save_every: float = SAVE_EVERY,
    progress: Progress = no_progress,
    say: Callable[[str], object] = str,
) -> tuple[DCP, dict[str, float]]:
    """Train, calibrate, save and measure one head.

    A run that was stopped, killed even, goes on from the last state that is in its output folder, and ends with the
    same weights bit for bit, if the machine and its number of threads are the same.

    Args:
        run: what to do.
        output: folder for `model.safetensors`, `config.json` and `log.csv`; until all is done also for the state.
        test: the test images, if a caller has them ready.
        overwrite: replace what is there, a checkpoint or the state of a stopped run, and start again.
        save_every: seconds between two saved states; 0 saves after every step.
        progress, say: progress bars and messages.

    Returns:
        The model, and its top-1 accuracies in percent.

    Raises:
        ZooError: bad input, an output folder that cannot be written to or belongs to another run, or what `train`
            raises.
    """
    if overwrite:
        remove_state(output)
    elif (output / WEIGHTS_NAME).exists() and not (output / STATE_NAME).exists():
        raise ZooError(f"{output} already holds a checkpoint: choose another --output, or pass --overwrite.")
    info = fit_head(run, output, save_every=save_every, keep_state=True, progress=progress, say=say)
    model = create_model(f"local-dir:{output}", True).to(run.device)  # measured as it will be used, in float32
    test = replace(test, model=model) if test else image_source(model, run.split.test, "none", run.workers, progress)
    metrics = measure(test, run.recipe, progress=progress)
    model.info = info | {"metrics": metrics}
    save_pretrained(model, output)
    remove_state(output)
    return model, metrics


def fit_head(
    run: Run,
    output: Path,
    *,
    save_every: float = SAVE_EVERY,
    keep_state: bool = False,
    progress: Progress = no_progress,
    say: Callable[[str], object] = str,
) -> dict[str, Any]:
    """Train, calibrate and save one head, without measuring it; `train_head` measures too.

    Of several processes that train together, the main one calls either, and the others this one: they only train.

    Args:
        run, output, save_every, progress, say: see `train_head`. The run's split needs no test images.
        keep_state: leave the state in the folder, for a caller that has more to do before the run counts as finished.

    Returns:
        What the checkpoint says of the run, the `dcp` block of its `config.json`.

    Raises:
        ZooError: bad input, or diverged training.
    """
    started = time.perf_counter()
    subset = few_shot(run.split, run.shots, run.seed)
    seed_everything(run.seed)
    model = _new_model(run, subset.classnames)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{run.model}: {trainable:,} trainable parameters; {len(subset.train)} images of {model.num_classes} classes")
    info: dict[str, Any] = {
        "dataset": run.split.name,
        "shots": run.shots,
        "seed": run.seed,
        "recipe": run.recipe.as_dict() | {"precision": run.precision},
        "split_sha256": run.split.sha256,
        "subset_sha256": subset_sha256(subset.train),
    }
    state = TrainingState(output / STATE_NAME, _identity(run, model) | info, save_every, say)
    earlier = state.seconds[-1] if state.seconds else 0.0
    source = image_source(model, subset.train, run.recipe.augment, run.workers, progress)
    cast_frozen(model, run.precision)
    with _writing(output), open_log(output / "log.csv") if distributed.is_main() else nullcontext() as log:
        train(source, run.recipe, seed=run.seed, precision=run.precision, log=log, progress=progress, state=state)
    if not distributed.is_main():
        return info
    if run.precision != "float32":  # a checkpoint is calibrated as it will be used: with CLIP's weights in float32
        trained, model = head_state(model), _new_model(run, subset.classnames)
        model.load_state_dict(trained, strict=False)
        source = source.for_model(model)
    finish(plain_view(source, progress))
    info["train_seconds"] = round(earlier + time.perf_counter() - started, 1)
    save_pretrained(model, output, **info)
    if not keep_state:
        remove_state(output)
    return info


def _new_model(run: Run, classnames: Sequence[str]) -> DCP:
    """CLIP's weights and fresh prompts, on the run's device."""
    args = run.recipe.model_args
    model = create_model(run.model, "clip", classnames=classnames, clip_pretrained=run.clip_pretrained, **args)
    model.memory = run.memory
    return model.to(run.device)


def _identity(run: Run, model: DCP) -> dict[str, Any]:
    """What makes a run what it is, beside what its checkpoint says: a state of another one is not gone on from."""
    _, sums = fingerprint(model.clip.parameters())
    return {"model": run.model, "clip": model.clip_source, "CLIP weights": f"{sum(sums) % 2**64:016x}"}


@contextmanager
def _writing(output: Path) -> Iterator[None]:
    """Make the folder; what the system has against writing into it becomes a ZooError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise ZooError(
            f"Cannot write into {output}: {error}. Make room and run the same command again, or choose another folder."
        ) from error
