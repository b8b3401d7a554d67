"""The published hyperparameters of every method, from `methods.yaml`; without torch, as plans read them."""

from dataclasses import fields, make_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from dcp_zoo.fields import option
from dcp_zoo.training.recipes import BaseRecipe, Recipe, TrainingRecipe, default_recipe
from dcp_zoo.zoo.registry import get_spec

ROWS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "methods.yaml").read_text("utf-8"))
RULES = ("recipe", "base", "by_shots", "per_shot", "over_shots", "by_dataset", "by_protocol")  # of the recipe in a row
TRANSFER = 4  # times DCP's clip_reg, for what it was not trained on
IMAGENET_EPOCHS = 5  # of DCP's schedule of 20, which its script of tests on other datasets loads


def recipe_class(method: str, row: dict[str, Any]) -> type[BaseRecipe]:
    """The recipe of a row: its fields are added to those of `BaseRecipe`, or of `TrainingRecipe` if prompts are trained
    or batches of features are. An integer is at least 1."""
    base: type[BaseRecipe] = TrainingRecipe if "base" in row else BaseRecipe
    parts = []
    for name, given in row.get("recipe", {}).items():
        settings: dict[str, Any] = given if isinstance(given, dict) else {"default": given}
        kind: Any = float | None if settings["default"] is None else type(settings["default"])
        limits: Any = {"help": "", "min": 1} if kind is int else {"help": ""}
        if known := base.__dataclass_fields__.get(name):
            kind, limits = known.type, known.metadata
        parts.append((name, kind, option(**limits | settings)))
    own = {"is_trained": row.get("base") == "prompts", "__module__": __name__}
    return make_dataclass(f"{method.title().replace('-', '')}Recipe", parts, bases=(base,), frozen=True, namespace=own)


RECIPES = {name: recipe_class(name, row) for name, row in ROWS.items() if not name.startswith(".")} | {"dcp": Recipe}
globals().update({kind.__name__: kind for kind in RECIPES.values()})  # where pickle looks for them


def published(method: str, model: str, dataset: str, shots: int, protocol: str) -> BaseRecipe:
    """The defaults of a method's recipe and what its row changes for this task, with the model's budget if it trains
    prompts, and otherwise its augmentation: random crops and flips, as published, unless it needs another. The model's
    row in the registry may change both rules and values."""
    own, kind, shots = get_spec(model).baseline_recipes.get(method, {}), RECIPES[method], max(shots, 1)
    row = ROWS[method] | own
    if kind is Recipe:
        return dcp(model, dataset, protocol)
    values: dict[str, Any] = {}
    for name, known in row.get("by_shots", {}).items():
        values[name] = known[max(least for least in known if least <= shots)]
    for name, number in row.get("per_shot", {}).items():
        values[name] = number * shots
    for name, number in row.get("over_shots", {}).items():
        values[name] = number / shots
    values |= row.get("by_dataset", {}).get(dataset, {}) | row.get("by_protocol", {}).get(protocol, {})
    recipe, budget = kind(**values), dict[str, Any]()
    if get_spec(model).recipe:  # it needs another optimizer, schedule, batch size and augmentation than CLIP
        dcps = default_recipe(model, dataset)
        budget = {part.name: getattr(dcps, part.name) for part in fields(TrainingRecipe) if part.name != "classifier"}
    if recipe.is_trained:
        recipe = recipe.updated(budget)
    elif recipe.augment != "none":
        recipe = replace(recipe, augment=budget.get("augment", recipe.augment))
    return recipe.updated({name: value for name, value in own.items() if name not in RULES})


def dcp(model: str, dataset: str, protocol: str) -> Recipe:
    """The default recipe; where it agrees with zero-shot CLIP, more so for classes and styles that it was not trained
    on, and without a text probe for other styles, which it would judge by photographs. From ImageNet, transfer is
    measured after `IMAGENET_EPOCHS`: this reads the authors' scripts, which disagree on it."""
    default = default_recipe(model, dataset)
    if protocol == "few-shot":
        return default
    classifier = "none" if protocol == "domain-shift" else default.classifier
    stop = IMAGENET_EPOCHS if dataset == "imagenet" and default.epochs else None
    return replace(default, clip_reg=TRANSFER * default.clip_reg, classifier=classifier, stop_epoch=stop)
