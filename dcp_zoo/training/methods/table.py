"""The table of methods, `methods.yaml`: one row each, naming the module that implements it, imported on first use.

Other packages add rows by the entry-point group `dcp_zoo.methods`, see docs/own_method.md.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.model.config import Abilities
from dcp_zoo.training.methods.published import ROWS, RULES, published
from dcp_zoo.training.recipes import AUTHORS, FAST, FITTED, BaseRecipe, Recipe, named_recipe, read_recipe

if TYPE_CHECKING:
    from dcp_zoo.model.head import Head
    from dcp_zoo.training.methods.base import Task

DCP_METHOD = "dcp"  # that of the zoo's heads
DEFAULT_METHOD = "text-probe"  # of `train`: as accurate on the miniature in a fraction of the time, see docs/results.md
RecipeLike = BaseRecipe | Mapping[str, Any] | str | Path | None


ABLE = Abilities()


@dataclass(frozen=True)
class Method:
    """One way to adapt CLIP to a task.

    Attributes:
        name: in results and on the command line.
        title: in tables and figures.
        reference: the paper.
        module: with the function `fit`: of this package, whose recipe is in `methods.yaml`, or, with a dot, of another
            package, with the function `recipe` as well.
        variant: suffix of both names, if a module has several methods.
        trains: whether it uses training images, besides those of a text probe after it.
        abilities: of its heads.
        chooses: whether it always chooses hyperparameters on few-shot validation images, if there are any.
        features: whether it needs nothing but image features and text features of the names in one template.
        text: whether it needs text.
    """

    name: str
    title: str
    reference: str
    module: str
    variant: str = ""
    trains: bool = True
    abilities: Abilities = ABLE
    chooses: bool = False
    features: bool = False
    text: bool = True

    def recipe(self, model: str, dataset: str, shots: int, protocol: str) -> BaseRecipe:
        """The published hyperparameters, with the changes of the model's row in the registry."""
        if "." in self.module:
            return resolve_name(f"{self.module}:recipe{self.variant}")(model, dataset, shots, protocol)
        return published(self.name, model, dataset, shots, protocol)

    def needs_images(self, recipe: BaseRecipe) -> bool:
        """Whether it needs training images with this recipe, for itself or for the classifier after it."""
        return self.trains or recipe.classifier != "none"

    def fit(self, task: "Task") -> "Head":
        """Turn a task into a head, followed by the text probe if the recipe names one; draws follow the task's seed. A
        recipe without a number of epochs gets that for the task's images."""
        from dcp_zoo.data.dataset import seeded
        from dcp_zoo.training.fit_probe import fit_probe
        from dcp_zoo.zoo.factory import told_timm

        if task.train is not None:
            task = replace(task, recipe=task.recipe.fitted(len(task.train.items), len(task.classnames)))
        probed = task.recipe.classifier != "none"
        if probed and self.abilities.fitted:
            raise ZooError(FITTED.format(self.name))
        module = self.module if "." in self.module else f"dcp_zoo.training.methods.{self.module}"
        with seeded(task.seed, task.clip.device):
            head: Head = resolve_name(f"{module}:fit{self.variant}")(task)
        head.method, head.abilities = self.name, self.abilities
        told_timm(head)
        head.to(task.clip.device).eval()
        if probed:
            images = task.probe_images or task.plain_train
            found = fit_probe(head, images, task.progress, task.probe_weights)
            head.info = head.info | {"text_probe": found}
        return head


def _of_row(name: str, row: Mapping[str, Any]) -> Method:
    abilities = Abilities(**row.get("abilities", {}))
    return Method(name, **{k: v for k, v in row.items() if k not in RULES} | {"abilities": abilities})


METHODS = {name: _of_row(name, row) for name, row in ROWS.items() if not name.startswith(".")}


def installed() -> dict[str, Method]:
    """The methods of other packages, without those that cannot be loaded: every command reads this table."""
    found: dict[str, Method] = {}
    for entry in entry_points(group="dcp_zoo.methods"):
        try:
            method = entry.load()
            if not isinstance(method, Method):
                raise TypeError(f"{entry.value} is not a dcp_zoo.training.Method")
            if method.name in METHODS or method.name in found:
                raise ValueError(f"there is a method {method.name!r} already")
        except Exception as error:
            package = entry.dist.name if entry.dist else "an unknown package"
            warnings.warn(f"The method {entry.name!r} of {package} is left out: {error}", stacklevel=2)
        else:
            found[method.name] = method
    return found


METHODS |= installed()


def chosen_recipe(
    method: str, model: str, dataset: str, shots: int, recipe: RecipeLike = None, classifier: str | None = None
) -> BaseRecipe:
    """The recipe of a run on a dataset; ZooError for an unknown method or classifier, or a recipe that does not fit.
    `recipe` is a name, see `named_recipe`, a YAML file, changes such as {"lr": 0.001}, or a recipe, by default the
    method's own; `classifier` "none" or "text-probe", by default the recipe's."""
    check_choice("method", method, tuple(METHODS))
    base = METHODS[method].recipe(model, dataset, shots, "few-shot")
    if isinstance(recipe, str) and recipe in (*AUTHORS, FAST):
        if not isinstance(base, Recipe):
            raise ZooError(f"The recipe {recipe} is for DCP: omit it, or use --method {DCP_METHOD}.")
        base = named_recipe(recipe, model)
    elif isinstance(recipe, Mapping):
        base = base.updated(recipe, where="recipe")
    elif isinstance(recipe, (str, Path)):
        base = read_recipe(recipe, base)
    elif isinstance(recipe, BaseRecipe):
        if not isinstance(recipe, type(base)):
            raise ZooError(f"The recipe of {method} takes changes, such as {{'augment': 'none'}}.")
        base = recipe
    return base if classifier is None else base.updated({"classifier": classifier}, where="classifier")
