"""Any method as a head: what it learned as a `LinearHead`, which is saved, loaded, fused and exported like a DCP."""

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dcp_zoo.data import Item, Split, find_spec
from dcp_zoo.errors import ZooError
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.linear_head import TOWER, LinearHead
from dcp_zoo.training.evaluation import EVAL_BATCH, Evaluation, predict
from dcp_zoo.training.fit import warn_if_not_learnt
from dcp_zoo.training.methods.base import Task, plain_clip
from dcp_zoo.training.methods.table import METHODS
from dcp_zoo.training.recipes import TrainingRecipe
from dcp_zoo.training.run import Run, check_free, on_all_images
from dcp_zoo.training.sources import ImageSource, Progress, image_source, no_progress
from dcp_zoo.training.stage import fit_stage
from dcp_zoo.training.state import remove_state

ZERO_SHOT, GDA = "zero-shot", "gda"


def fit_head(method: str, task: Task) -> Any:
    """Train a method on a task -> a DCP or a `LinearHead` with its weights.

    GDA becomes zero-shot CLIP with a classifier stage, whose two weights are fitted as those of DCP's: see
    `dcp_zoo.training.stage`.

    Raises:
        ZooError: a method that is not linear in the image features, such as Tip-Adapter, or an error of the method.
    """
    if method == GDA:
        assert task.train is not None
        head = fit_head(ZERO_SHOT, task)
        head.method, head.template = GDA, task.template
        head.info = {"classifier": fit_stage(task.plain_train.for_model(head), task.val, task.progress, task.template)}
        return head
    if not METHODS[method].linear:
        raise ZooError(
            f"{METHODS[method].title} cannot become a head: its logits are not a linear function of the image "
            "features. Choose another method, such as gda, which also learns from the features alone."
        )
    classifier: Any = METHODS[method].fit(task)
    if method == "dcp":
        return classifier.model
    clip, (weight, bias) = classifier.clip, classifier.linear()
    tensors = {"weight": weight.detach().contiguous(), "bias": bias.detach()} | changed_tower(clip, task.clip)
    prompts: list[Tensor] = classifier.image_prompts() if hasattr(classifier, "image_prompts") else []
    if prompts:
        tensors["prompts"] = torch.stack(clip.entering(prompts))
    template = task.template if method == ZERO_SHOT else ""
    head = LinearHead(
        copy.deepcopy(task.clip.clip),
        task.classnames,
        tensors,
        method=method,
        template=template,
        tokenizer=clip.tokenizer,
    )
    head.pretrained_cfg, head.info = task.clip.pretrained_cfg, dict(classifier.info)
    head.architecture, head.clip_source = task.clip.architecture, task.clip.clip_source
    return head.to(task.clip.device)


def changed_tower(clip: FrozenCLIP, original: FrozenCLIP) -> dict[str, Tensor]:
    """The tensors of the image tower that a method changed."""
    before = original.visual.state_dict()
    after = {} if clip is original else clip.visual.state_dict()
    return {f"{TOWER}{name}": t for name, t in after.items() if not torch.equal(t, before[name])}


def train_method(
    method: str,
    run: Run,
    changes: Mapping[str, Any],
    output: Path | None,
    *,
    refit: bool = False,
    overwrite: bool = False,
    progress: Progress = no_progress,
    log: Callable[[str], object] = str,
    show: Callable[[Evaluation], object] = id,
) -> LinearHead:
    """Train a method other than DCP on a run's images, measure it on the test images, if there are any, and save it.

    Args:
        method: a name in `METHODS`.
        run: model, images, seed, device and precision; its recipe is not used.
        changes: to the method's recipe.
        output: folder of the checkpoint; None writes nothing.
        refit: after measuring, train again on all images, and save that, with the accuracy of the first.
        overwrite: replace an existing checkpoint.
        progress, log: progress bars and messages.
        show: receives the answers on the test images.

    Raises:
        ZooError: an existing checkpoint, unknown changes, or an error of `fit_head`.
    """
    if output:
        check_free(output, overwrite)
    head, measured, evaluation = _fitted(method, run, changes, progress, log), {}, None
    if run.split.test:
        logits = predict(
            image_source(head, run.split.test, "none", run.workers, progress), EVAL_BATCH, progress=progress
        )
        evaluation = Evaluation(head.classnames, run.split.test, logits)
        accuracy = round(evaluation.accuracy.percent, 2)
        measured = {"metrics": {"top1_stored": accuracy}, "test_images": len(run.split.test)}
    if refit:
        head = _fitted(method, on_all_images(run), changes, progress, log)
    head.info |= measured
    if output:
        head.save_pretrained(output)
        remove_state(output)
    if evaluation:  # last, as a report that cannot be written must not cost the head
        show(evaluation)
    return head


def _fitted(
    method: str, run: Run, changes: Mapping[str, Any], progress: Progress, log: Callable[[str], object]
) -> LinearHead:
    """A head of a run's images, and in its info how it was made."""
    if method == GDA and changes:
        raise ZooError(
            "The two weights of a gda head are fitted to its images, so it has no recipe to change: omit "
            f"{', '.join(changes)}."
        )
    started, subset = time.perf_counter(), run.subset()
    log(f"{METHODS[method].title} on {run.model}: {len(subset.train)} images of {len(subset.classnames)} classes")
    task = method_task(method, run, subset, changes, progress)
    head = fit_head(method, task)
    _check_learnt(head, task)
    recipe = {} if method == GDA else task.recipe.as_dict()
    head.info |= run.info(subset) | {"recipe": recipe | {"precision": run.precision}}
    head.info["train_seconds"] = round(time.perf_counter() - started, 1)
    return head


def _check_learnt(head: LinearHead, task: Task) -> None:
    """Warn if a method with a schedule has not learnt its training images, see `warn_if_not_learnt`."""
    length, recipe = next((name for name in ("steps", "epochs") if hasattr(task.recipe, name)), ""), task.recipe
    if not length or task.train is None:
        return
    train = task.plain_train
    if isinstance(recipe, TrainingRecipe):
        value = recipe.fitted(len(train.items), train.num_classes).num_epochs
    else:
        value = getattr(recipe, length)
    logits = predict(train.for_model(head), EVAL_BATCH, progress=task.progress)
    warn_if_not_learnt(F.cross_entropy(logits, train.labels).item(), train.num_classes, length, value)


def method_task(method: str, run: Run, subset: Split, changes: Mapping[str, Any], progress: Progress) -> Task:
    """The task of a method other than DCP on a run's `subset`, on a CLIP of its own."""
    clip = plain_clip(run.model, run.clip_pretrained).to(run.device)
    shots = run.shots or len(subset.train) // len(subset.classnames)
    recipe = METHODS[method].recipe(run.model, run.split.name, shots, "few-shot").updated(changes)

    def source(items: Sequence[Item], augment: str = "none") -> ImageSource:
        return image_source(clip, items, augment, run.workers, progress)

    return Task(
        clip,
        run.model,
        subset.classnames,
        run.descriptions or find_spec(run.split.name).template,
        source(subset.train, recipe.augment) if METHODS[method].trains else None,
        source(subset.val) if subset.val else None,
        recipe,
        run.seed,
        run.precision,
        progress,
    )
