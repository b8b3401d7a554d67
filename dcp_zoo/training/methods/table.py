"""The table of methods: the names of all, each of which is imported on first use, as it needs torch.

Other packages add methods by the entry-point group `dcp_zoo.methods`, see docs/baselines.md.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from dcp_zoo.errors import ZooError, as_zoo_error, check_choice, warn
from dcp_zoo.training.recipes import AUTHORS, EXAMPLES_UNUSED, BaseRecipe, Recipe

if TYPE_CHECKING:
    from dcp_zoo.heads.head import Head
    from dcp_zoo.training.methods.base import Method, Task

DCP_METHOD = "dcp"  # that of the zoo's heads
DEFAULT_METHOD = "text-probe"  # of `train`: on the miniature no head with prompts is more accurate, see docs/results.md
RecipeLike = BaseRecipe | Mapping[str, object] | str | None
GROUP = "dcp_zoo.methods"
OWN = {  # module and object in this package, in the order of tables
    "zero-shot": "zero_shot:ZERO_SHOT",
    "zero-shot-ensemble": "zero_shot:ZERO_SHOT_ENSEMBLE",
    "linear-probe": "linear_probe:LINEAR_PROBE",
    "tip-adapter": "caches:TIP_ADAPTER",
    "tip-adapter-f": "caches:TIP_ADAPTER_F",
    "proker": "caches:PROKER",
    "ss-text": "zero_shot:SS_TEXT",
    "gda": "gda:GDA",
    "lp-plus-plus": "linear_probe:LP_PLUS_PLUS",
    "text-probe": "text_probe:TEXT_PROBE",
    "clap": "clap:CLAP",
    "prolip": "clip_weights:PROLIP",
    "coop": "prompts:COOP",
    "vpt-deep": "prompts:VPT_DEEP",
    "maple": "prompts:MAPLE",
    "promptsrc": "promptsrc:PROMPTSRC",
    "clip-lora": "clip_weights:CLIP_LORA",
    "clip-svd": "clip_weights:CLIP_SVD",
    "2sfs": "clip_weights:TWO_SFS",
    "dcp": "dcp:DCP_METHOD",
}


class Methods(Mapping[str, "Method"]):
    """Methods by name, imported when they are looked up: this package's, then those of other packages. ZooError for one
    that cannot be imported."""

    def __init__(self) -> None:
        self.places: dict[str, EntryPoint] = {}
        own = [EntryPoint(name, f"{__package__}.{place}", GROUP) for name, place in OWN.items()]
        for place in (*own, *entry_points(group=GROUP)):
            if self.places.setdefault(place.name, place) is not place:
                text = f"The method {place.name!r} of {_package(place)} is left out: there is one of that name already."
                warn(text)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, name: str) -> "Method":
        from dcp_zoo.training.methods.base import Method

        place = self.places[name]
        failed = f"The method {name!r} of {_package(place)} cannot be used: {{}}. Repair or uninstall that package."
        with as_zoo_error(failed, Exception):
            method = place.load()  # which Python imports once
            if not (isinstance(method, Method) and method.name == name):
                raise TypeError(f"{place.value} is not a dcp_zoo.training.Method of that name")
        return method


def _package(place: EntryPoint) -> str:
    return place.dist.name if place.dist else place.module


METHODS = Methods()


def fit_head(name: str, task: "Task") -> "Head":
    """Turn a task into a head by a method, followed by the text probe if the recipe names one; draws follow the task's
    seed. A recipe without a number of epochs gets that for the task's images."""
    from dcp_zoo.training.methods.text_probe import fit_probe
    from dcp_zoo.training.sources import seeded

    method = METHODS[name]
    if task.train is not None:
        task = replace(task, recipe=task.recipe.fitted(len(task.train.items), len(task.classnames)))
    with seeded(task.seed, task.clip.device):
        head = method.fit(task)
    head.method, head.abilities = name, method.abilities
    head.to(task.clip.device).eval()
    if task.recipe.classifier != "none":
        head.image_encoders.extend(task.encoders)
        info = fit_probe(head, task.plain_train, task.progress, task.probe_weights, task.none, task.checks)
        head.info = head.info | {"text_probe": info}
    elif task.none is not None:
        why = f"only a text probe learns from them, and {name} is trained without one"
        warn(EXAMPLES_UNUSED.format(len(task.none.items), why))
    return head


def chosen_recipe(
    method: str, model: str, dataset: str, shots: int, recipe: RecipeLike = None, classifier: str | None = None
) -> BaseRecipe:
    """The recipe of a run on a dataset; ZooError for an unknown method or classifier, or a recipe that does not fit.
    `recipe` is a name, see `AUTHORS`, changes such as {"lr": 0.001}, or a recipe, by default the method's own;
    `classifier` "none" or "text-probe", by default the recipe's."""
    check_choice("method", method, tuple(METHODS))
    base = METHODS[method].recipe(model, dataset, shots, "few-shot")
    if isinstance(recipe, str):
        check_choice("recipe", recipe, tuple(AUTHORS))
        if not isinstance(base, Recipe):
            raise ZooError(f"The recipe {recipe} is for DCP: omit it, or use --method {DCP_METHOD}.")
        base = Recipe(**AUTHORS[recipe])
    elif isinstance(recipe, Mapping):
        base = base.updated(recipe, where="recipe")
    elif isinstance(recipe, BaseRecipe):
        if type(recipe) is not type(base):
            raise ZooError(f"The recipe of {method} takes changes, such as {{'augment': 'none'}}.")
        base = recipe
    return base if classifier is None else base.updated({"classifier": classifier}, where="classifier")
