"""From a task to a head, by any method."""

from dataclasses import replace
from typing import TYPE_CHECKING

from dcp_zoo.errors import warn
from dcp_zoo.training.methods.table import DCP_METHOD, METHODS
from dcp_zoo.training.recipes import EXAMPLES_UNUSED

if TYPE_CHECKING:
    from dcp_zoo.heads.head import Head
    from dcp_zoo.training.task import Task


def fit_head(name: str, task: "Task") -> "Head":
    """The head of a task by a method, with a text probe on top if the recipe names one. All random numbers
    are drawn from the task's seed. A recipe without a number of epochs gets that for the task's images."""
    from dcp_zoo.backbone._torch import seeded
    from dcp_zoo.backbone.classes import check_classnames
    from dcp_zoo.training.methods.text_probe import fit_probe

    method = METHODS[name]
    task = replace(task, classnames=check_classnames(task.classnames))
    if method.needs_images(task.recipe):
        task.recipe = task.recipe.fitted(task.images.whole, len(task.classnames))
    if method.trains and method.features is not None:
        task.train = task.images.table(views=method.features(task)).first_parts(1)
    with seeded(task.seed, task.clip.device):
        head = method.fit(task)
    head.method = name
    head.abilities = method.abilities
    head.to(task.clip.device).eval()
    if name != DCP_METHOD:  # whose prompts can be trained on
        head.requires_grad_(False)
    if task.recipe.classifier != "none":
        info = fit_probe(head, task.images, task.probe)
        head.info = head.info | {"text_probe": info}
    elif task.probe.none is not None:
        why = f"only a text probe learns from them, and {name} is trained without one"
        warn(EXAMPLES_UNUSED.format(len(task.probe.none), why))
    return head
