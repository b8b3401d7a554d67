"""The table of methods: the names of all, each of which is imported on first use, as it needs torch; and from a
task to a head, by any method.

Other packages add methods by the entry-point group `dcp_zoo.methods`, see docs/baselines.md.
"""

from collections import UserDict
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from dcp_zoo.errors import ZooError, as_zoo_error, check_choice, warn
from dcp_zoo.training.recipes import AUTHORS, EXAMPLES_UNUSED, BaseRecipe, Recipe

if TYPE_CHECKING:
    from dcp_zoo.heads.head import Head
    from dcp_zoo.training.methods.base import Method
    from dcp_zoo.training.task import Task

DCP_METHOD = "dcp"  # that of the zoo's heads
DEFAULT_METHOD = "text-probe"  # of `train`: on the miniature no head with prompts is more accurate, see docs/results.md
RecipeLike = BaseRecipe | Mapping[str, object] | str | None
GROUP = "dcp_zoo.methods"
OWN = {  # module and object in this package, in the order of tables
    "zero-shot": "linear:ZERO_SHOT",
    "zero-shot-ensemble": "linear:ZERO_SHOT_ENSEMBLE",
    "linear-probe": "linear:LINEAR_PROBE",
    "tip-adapter": "caches:TIP_ADAPTER",
    "tip-adapter-f": "caches:TIP_ADAPTER_F",
    "proker": "caches:PROKER",
    "ss-text": "linear:SS_TEXT",
    "gda": "linear:GDA",
    "lp-plus-plus": "linear:LP_PLUS_PLUS",
    "text-probe": "text_probe:TEXT_PROBE",
    "clap": "adapters:CLAP",
    "taskres": "adapters:TASKRES",
    "clip-adapter": "adapters:CLIP_ADAPTER",
    "prolip": "clip_weights:PROLIP",
    "coop": "prompts:COOP",
    "cocoop": "prompts:COCOOP",
    "kgcoop": "prompts:KGCOOP",
    "prograd": "prompts:PROGRAD",
    "vpt-deep": "prompts:VPT_DEEP",
    "ivlp": "prompts:IVLP",
    "maple": "prompts:MAPLE",
    "promptsrc": "prompts:PROMPTSRC",
    "clip-lora": "clip_weights:CLIP_LORA",
    "clip-svd": "clip_weights:CLIP_SVD",
    "2sfs": "clip_weights:TWO_SFS",
    "dcp": "dcp:DCP_METHOD",
}


class Methods(UserDict[str, Any]):
    """Methods by name, imported when they are looked up: this package's, then those of other packages.
    ZooError for one that cannot be imported."""

    def __init__(self) -> None:
        super().__init__({name: EntryPoint(name, f"{__package__}.{value}", GROUP) for name, value in OWN.items()})
        for entry in entry_points(group=GROUP):
            if self.data.setdefault(entry.name, entry) is not entry:
                warn(f"The method {entry.name!r} of {_package(entry)} is left out: there is one of that name already.")

    def __getitem__(self, name: str) -> "Method":
        from dcp_zoo.training.methods.base import Method

        entry = self.data[name]
        failed = f"The method {name!r} of {_package(entry)} cannot be used: {{}}. Repair or uninstall that package."
        with as_zoo_error(failed, Exception):
            method = entry.load()  # which Python imports once
            if not (isinstance(method, Method) and method.name == name):
                raise TypeError(f"{entry.value} is not a dcp_zoo.training.Method of that name")
        return method


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else entry.module


METHODS = Methods()


def chosen_recipe(
    method: str, model: str, dataset: str, shots: int, recipe: RecipeLike = None, classifier: str | None = None
) -> BaseRecipe:
    """The recipe of a run on a dataset; ZooError for an unknown method or classifier, or a recipe that does
    not fit. `recipe` is a name, see `AUTHORS`, changes such as {"lr": 0.001}, or a recipe, by default the
    method's own; `classifier` "none" or "text-probe", by default the recipe's."""
    check_choice("method", method, tuple(METHODS))
    base = METHODS[method].recipe(model, dataset, shots, "few-shot")
    if isinstance(recipe, str):
        check_choice("recipe", recipe, tuple(AUTHORS))
        if not isinstance(base, Recipe):
            raise ZooError(f"The recipe {recipe} is for DCP: omit it, or use --method {DCP_METHOD}.")
        base = Recipe(**AUTHORS[recipe])
    elif recipe:
        changes = recipe.as_dict() if isinstance(recipe, BaseRecipe) else recipe
        base = base.updated(changes, where="recipe")
    return base if classifier is None else base.updated({"classifier": classifier}, where="classifier")


def fit_head(name: str, task: "Task") -> "Head":
    """The head of a task by a method, with a text probe on top if the recipe names one. All random numbers
    are drawn from the task's seed. A recipe without a number of epochs gets that for the task's images."""
    from dcp_zoo.backbone._torch import seeded
    from dcp_zoo.backbone.classes import check_classnames
    from dcp_zoo.training.methods.text_probe import fit_probe

    method = METHODS[name]
    recipe = task.recipe.with_epochs(task.images.total, len(task.classnames))
    task = replace(task, classnames=check_classnames(task.classnames), recipe=recipe)
    if method.trains and method.features is not None:
        task.train = task.images.table(views=method.features(task)).embeddings
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
