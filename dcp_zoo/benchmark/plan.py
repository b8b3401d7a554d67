"""What the protocols are, and how a grid of choices becomes a list of trials."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from dcp_zoo.benchmark.trial import Trial, default_of
from dcp_zoo.data import DATASETS, list_datasets
from dcp_zoo.data.table import find_spec
from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.methods import METHODS
from dcp_zoo.zoo.registry import SHOTS, get_spec

SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Protocol:
    """One of the paper's experiments.

    Attributes:
        title: as a sentence, for help texts.
        datasets: the datasets it is usually run on.
        shots: the usual numbers of training images per class.
        targets: from a dataset that is trained on to all that are tested on; () is itself alone.
        new_classes: whether tests are about other class names than training was.
    """

    title: str
    datasets: tuple[str, ...]
    shots: tuple[int, ...]
    targets: Callable[[str], tuple[str, ...]]
    new_classes: bool = False


def _others(dataset: str) -> tuple[str, ...]:
    return (dataset, *(name for name in list_datasets() if name != dataset))


def _shifts(dataset: str) -> tuple[str, ...]:
    if not find_spec(dataset).shifts:
        known = [name for name, spec in DATASETS.items() if spec.shifts]
        raise ZooError(f"{dataset} has no other styles to be tested on: choose from {', '.join(known)}.")
    return (dataset, *find_spec(dataset).shifts)


PROTOCOLS = {
    "few-shot": Protocol(
        "train on K images of every class, test on the same classes", tuple(list_datasets()), SHOTS, lambda dataset: ()
    ),
    "base-to-new": Protocol(
        "train on the first half of the classes, test on both halves",
        tuple(list_datasets()),
        (16,),
        lambda dataset: (),
        new_classes=True,
    ),
    "cross-dataset": Protocol(
        "train on one dataset, test with the names of the others",
        ("imagenet",),
        (16,),
        _others,
        new_classes=True,
    ),
    "domain-shift": Protocol("train on photographs, test on other styles", ("imagenet",), (16,), _shifts),
}


def plan_trials(
    protocol: str,
    models: Sequence[str] = ("dcp_mini",),
    methods: Sequence[str] = (),
    datasets: Sequence[str] = (),
    shots: Sequence[int] = (),
    seeds: Sequence[int] = SEEDS,
    options: Mapping[str, Sequence[Any]] | None = None,
) -> list[Trial]:
    """All trials of a grid, each once, in an order in which neighbours share their images.

    Args:
        protocol: a name of `PROTOCOLS`.
        models, methods, datasets, shots, seeds: the grid. Default of methods: all that the protocol allows; of data
            sets and shots: the protocol's usual ones.
        options: parts of the recipe and the values that they take, such as {"depth": [1, 3, 5]}; each changes the
            methods whose recipe has that part.

    Raises:
        ZooError: unknown names, an option that no method's recipe has, a value that does not fit, or a method that
            cannot answer to new class names in a protocol that asks for it.
    """
    check_choice("protocol", protocol, tuple(PROTOCOLS))
    chosen = PROTOCOLS[protocol]
    _check_names(chosen, models, methods, datasets)
    methods = methods or [name for name, m in METHODS.items() if m.transfers or not chosen.new_classes]
    grid = [dict(zip(options, values, strict=True)) for values in product(*options.values())] if options else [{}]
    trials = [
        _trial(Trial(protocol, model, method, dataset, k, seed, chosen.targets(dataset)), changes)
        for model, dataset, k, seed in product(models, datasets or chosen.datasets, shots or chosen.shots, seeds)
        for method in sorted(methods, key=list(METHODS).index)
        for changes in grid
    ]
    _check_options(trials, grid[0])
    return _untrained_first(dict.fromkeys(trials))


def _check_names(protocol: Protocol, models: Sequence[str], methods: Sequence[str], datasets: Sequence[str]) -> None:
    for model in models:
        get_spec(model)
    for method in methods:
        check_choice("method", method, tuple(METHODS))
        if protocol.new_classes and not METHODS[method].transfers:
            able = ", ".join(name for name, m in METHODS.items() if m.transfers)
            raise ZooError(f"{method} knows only the classes that it was trained on; this protocol takes {able}.")
    for dataset in datasets:
        find_spec(dataset)


def _check_options(trials: Sequence[Trial], options: Mapping[str, Any]) -> None:
    """ZooError for an option that no method's recipe has."""
    recipes = {trial.method: default_of(trial).as_dict() for trial in trials}
    for name in options:
        if not any(name in recipe for recipe in recipes.values()):
            parts = "; ".join(f"{method} has {', '.join(recipe)}" for method, recipe in recipes.items())
            raise ZooError(f"None of the methods has a part {name!r} to set: {parts}.")


def _trial(trial: Trial, options: Mapping[str, Any]) -> Trial:
    """The trial as it is named: without options that change nothing, nor shots and seed where nothing is trained, nor
    targets that the method has no classes for."""
    method, default = METHODS[trial.method], default_of(trial)
    own = {name: value for name, value in options.items() if hasattr(default, name)}
    default.updated(own, where=f"{trial.method}: --set")
    trial = replace(trial, options=tuple(sorted((k, v) for k, v in own.items() if getattr(default, k) != v)))
    if not method.transfers:
        trial = replace(trial, targets=tuple(name for name in trial.targets if _same_classes(name, trial.dataset)))
    return trial if method.trains else replace(trial, shots=0, seed=0)


def _same_classes(one: str, other: str) -> bool:
    return one == other or (find_spec(one).names == find_spec(other).names is not None)


def _untrained_first(trials: Mapping[Trial, None]) -> list[Trial]:
    """What needs no training comes first in each dataset: it is quick, and shows early whether all is in place."""
    order = {key: i for i, key in enumerate(dict.fromkeys((t.model, t.dataset) for t in trials))}
    return sorted(trials, key=lambda t: (order[t.model, t.dataset], t.shots > 0))


def grid_rows(trials: Sequence[Trial]) -> Iterator[tuple[tuple[str, str, str, str], list[Trial]]]:
    """Trials of one model, dataset, method and options, which differ in shots and seed."""
    rows: dict[tuple[str, str, str, str], list[Trial]] = {}
    for trial in trials:
        rows.setdefault((trial.model, trial.dataset, trial.method, trial.changes), []).append(trial)
    yield from rows.items()
