"""The protocols, and the list of trials for a grid of choices."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from dcp_zoo.benchmark.trial import Trial
from dcp_zoo.data import DATASETS, list_datasets
from dcp_zoo.data.table import find_spec
from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.training.methods import METHODS
from dcp_zoo.zoo.registry import SHOTS, get_spec

SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Protocol:
    """One of the paper's experiments.

    Attributes:
        datasets: the default datasets.
        shots: the default numbers of training images per class.
        targets: maps the training dataset to all test datasets; () means only itself.
        new_classes: whether the test classes differ from the training classes.
    """

    datasets: tuple[str, ...]
    shots: tuple[int, ...]
    targets: Callable[[str], tuple[str, ...]] = lambda dataset: ()
    new_classes: bool = False


def _shifts(dataset: str) -> tuple[str, ...]:
    if not find_spec(dataset).shifts:
        known = [name for name, spec in DATASETS.items() if spec.shifts]
        raise ZooError(f"{dataset} has no other styles to test on: choose from {', '.join(known)}.")
    return (dataset, *find_spec(dataset).shifts)


PROTOCOLS = {
    # train on K images per class, test on the same classes
    "few-shot": Protocol(tuple(list_datasets()), SHOTS),
    # train on the first half of the classes, test on both halves
    "base-to-new": Protocol(tuple(list_datasets()), (16,), new_classes=True),
    # train on one dataset, test on the others with their class names
    "cross-dataset": Protocol(
        ("imagenet",), (16,), lambda dataset: (dataset, *(n for n in list_datasets() if n != dataset)), new_classes=True
    ),
    # train on photographs, test on other styles
    "domain-shift": Protocol(("imagenet",), (16,), _shifts),
}


def plan_trials(
    protocol: str,
    models: Sequence[str] = ("dcp_mini",),
    methods: Sequence[str] = (),
    datasets: Sequence[str] = (),
    shots: Sequence[int] = (),
    seeds: Sequence[int] = (),
    options: Mapping[str, Sequence[Any]] | None = None,
) -> list[Trial]:
    """All trials of a grid, without duplicates, ordered so that neighbours share their images. Of each dataset, methods
    without training come first: they are fast and reveal missing files early.

    Args:
        protocol: a name of `PROTOCOLS`.
        models, methods, datasets, shots, seeds: the grid. By default all methods that the protocol allows, its
            default datasets and shots, and the paper's seeds.
        options: recipe fields and their values, such as {"depth": [1, 3, 5]}; each applies to the methods whose recipe
            has that field.

    Raises:
        ZooError: unknown names, an option that no method's recipe has, an invalid value, or a method that cannot
            handle new class names in a protocol that requires it.
    """
    check_choice("protocol", protocol, tuple(PROTOCOLS))
    chosen = PROTOCOLS[protocol]
    _check_names(chosen, models, methods, datasets)
    methods = methods or [name for name, m in METHODS.items() if m.transfers or not chosen.new_classes]
    methods = sorted(methods, key=list(METHODS).index)
    grid = [dict(zip(options, values, strict=True)) for values in product(*options.values())] if options else [{}]
    trials: dict[Trial, None] = {}
    for model, dataset in product(models, datasets or chosen.datasets):
        cells = product(shots or chosen.shots, seeds or SEEDS, methods, grid)
        targets = chosen.targets(dataset)
        found = [
            _trial(Trial(protocol, model, method, dataset, k, seed, targets), changes)
            for k, seed, method, changes in cells
        ]
        trials |= dict.fromkeys(sorted(found, key=lambda trial: trial.shots > 0))
    _check_options(trials, grid[0])
    return list(trials)


def _check_names(protocol: Protocol, models: Sequence[str], methods: Sequence[str], datasets: Sequence[str]) -> None:
    for model in models:
        get_spec(model)
    for method in methods:
        check_choice("method", method, tuple(METHODS))
        if protocol.new_classes and not METHODS[method].transfers:
            able = ", ".join(name for name, m in METHODS.items() if m.transfers)
            raise ZooError(f"{method} is limited to the classes it was trained on; this protocol supports {able}.")
    for dataset in datasets:
        find_spec(dataset)


def _check_options(trials: Iterable[Trial], options: Mapping[str, Any]) -> None:
    """ZooError for an option that no method's recipe has."""
    recipes = {trial.method: trial.default_recipe.as_dict() for trial in trials}
    for name in options:
        if not any(name in recipe for recipe in recipes.values()):
            valid = "; ".join(f"{method} has {', '.join(recipe)}" for method, recipe in recipes.items())
            raise ZooError(f"No method's recipe has a field {name!r}: {valid}.")


def _trial(trial: Trial, options: Mapping[str, Any]) -> Trial:
    """The trial in canonical form: without options equal to the default, without shots and seed if the method does not
    train, and without targets whose classes the method cannot handle."""
    method, default = METHODS[trial.method], trial.default_recipe
    valid = {name: value for name, value in options.items() if name in default.as_dict()}
    recipe = default.updated(valid, where=f"{trial.method}: --set")
    trial = replace(trial, options=tuple(sorted((k, v) for k, v in valid.items() if getattr(default, k) != v)))
    if not method.transfers:
        own = find_spec(trial.dataset).names
        same = (name for name in trial.targets if name == trial.dataset or find_spec(name).names == own is not None)
        trial = replace(trial, targets=tuple(same))
    return trial if method.needs_images(recipe) else replace(trial, shots=0, seed=0)


def grid_rows(trials: Sequence[Trial]) -> Iterator[tuple[tuple[str, str, str, str], list[Trial]]]:
    """Trials grouped by model, dataset, method and options; those of a group differ in shots and seed."""
    rows: dict[tuple[str, str, str, str], list[Trial]] = {}
    for trial in trials:
        rows.setdefault((trial.model, trial.dataset, trial.method, trial.changes), []).append(trial)
    yield from rows.items()
