"""The protocols, and the trials for a grid of choices: the cells of a sweep, and what they depend on. Without torch."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.data import DATASETS, Split, list_datasets, load_labelled
from dcp_zoo.data.packaged import find_spec
from dcp_zoo.data.splits import image_hashes, split_images
from dcp_zoo.errors import ZooError, attempted, check_choice
from dcp_zoo.fields import Values
from dcp_zoo.files import file_name, sha256_of
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.recipes import BaseRecipe, check_seed
from dcp_zoo.zoo.registry import SHOTS, get_spec

SAVED_HEADS = "heads"  # folder of the heads that a sweep saves
FOLDER = "folder"  # the dataset whose images are those of any folder


@dataclass(frozen=True)
class Trial:
    """One cell of a sweep."""

    protocol: str  # a name in `PROTOCOLS`
    model: str  # of the zoo
    method: str  # a name in `METHODS`
    dataset: str  # for training; for methods that do not train, for the test
    shots: int  # of the few-shot subset; like its seed, 0 for methods that do not train
    seed: int
    targets: tuple[str, ...] = ()  # the test datasets; empty: `dataset`
    options: tuple[tuple[str, object], ...] = ()  # changes to the method's recipe, sorted by name

    @property
    def changes(self) -> str:
        """What differs from the method alone, as text: "coupling=text_to_vision,depth=3"."""
        return ",".join(f"{name}={value}" for name, value in self.options)

    @property
    def key(self) -> str:
        """A unique, readable name that is valid as a file name."""
        data = f"{self.dataset}-{self.shots}shot-seed{self.seed}" if self.shots else self.dataset
        name = ".".join(filter(None, (self.protocol, self.model, data, self.method, self.changes)))
        safe = file_name(name)[:200]
        return safe if safe == name else f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"

    @property
    def head(self) -> str:
        """The name in the zoo of the head that a trial of the few-shot protocol trains."""
        return f"{self.model}.{self.dataset}-{self.shots}shot" + (f"-seed{self.seed}" if self.seed != 1 else "")

    @property
    def default_recipe(self) -> BaseRecipe:
        """The recipe before the options are applied."""
        return METHODS[self.method].recipe(self.model, self.dataset, self.shots, self.protocol)

    @property
    def recipe(self) -> BaseRecipe:
        return self.default_recipe.updated(dict(self.options), where="--set")

    @classmethod
    def from_dict(cls, fields: Values) -> "Trial":
        """A trial from its `asdict`, after a round trip through JSON."""
        return cls(**fields | {"targets": tuple(fields["targets"]), "options": tuple(map(tuple, fields["options"]))})


@dataclass(frozen=True)
class Settings:
    """Settings shared by all trials of a sweep; those without a comment are explained in `training.run`."""

    output: Path  # the sweep's folder
    data_root: Path | None = None  # see `dcp_zoo.data.load_split`
    device: str = "auto"
    precision: str = "float32"
    save_heads: str = ""  # the method whose heads are written to `output`/heads

    def conditions(self, trial: Trial) -> Values:
        """What a trial's result depends on besides its seed: it is stored with the result, and a trial counts as
        finished only under the same conditions. ZooError as of `load_split`."""
        if trial.dataset == FOLDER:
            images = {FOLDER: folder_label(self.data_root)}
        else:
            images = {"split_sha256": read_split(trial.dataset, self.data_root).sha256}
        return images | {
            "weights": weights_id(trial.model),
            "precision": self.precision,
            "recipe": trial.recipe.as_dict(),
        }


@cache
def read_split(dataset: str, data_root: Path | None) -> Split:
    """`load_split`, once for all trials of a sweep in this process. Of one's own images no group is in two parts."""
    images = load_labelled(dataset, data_root)
    if dataset == FOLDER and not images.has_parts:
        from dcp_zoo.training.sources import with_own_groups  # with torch: groups are found by features

        images = replace(images, train=with_own_groups(images.train))
    return split_images(images)


def forget_images() -> None:
    """Read all images again, as a sweep does first: folders may have changed since the one before."""
    read_split.cache_clear()
    folder_label.cache_clear()


def check_data(trials: Sequence[Trial], data_root: Path | None) -> None:
    """One ZooError for all datasets that these trials train or test on and that cannot be read."""
    names = dict.fromkeys(name for trial in trials for name in (trial.dataset, *trial.targets))
    read = [attempted(read_split, name, data_root) for name in names]
    if problems := [f"- {error}" for error in read if isinstance(error, ZooError)]:
        few = "Get what is missing, or choose others by --datasets and --targets."
        raise ZooError("\n".join(["These trials need images that cannot be read:", *problems, few]))


@cache
def folder_label(root: Path | None) -> str:
    """The user's own folder, such as "photos (0f1e2d3c)": its name, and a hash of the images and their classes."""
    split, name = read_split(FOLDER, root), Path(root or "").expanduser().resolve().name
    content = f"{split.sha256} {image_hashes(split.items)}"
    return f"{file_name(name)} ({hashlib.sha256(content.encode()).hexdigest()[:8]})"


@cache
def weights_id(model: str) -> str:
    """Identifies the CLIP weights of a result: a hash of the miniature's file, or open_clip's tag and its pin."""
    spec = get_spec(model)
    pin = f"@{spec.clip_revision[:12]}" if spec.clip_revision else ""
    return f"{spec.clip_pretrained}{pin}" if spec.clip else sha256_of(MINI_WEIGHTS)[:12]


SEEDS = (1, 2, 3)


class Protocol(NamedTuple):
    """One of the paper's experiments."""

    datasets: tuple[str, ...]  # the default datasets
    shots: tuple[int, ...]  # the default numbers of training images per class
    targets: Callable[[str], tuple[str, ...]] = lambda dataset: ()  # the test datasets; () means only itself
    parts: tuple[str, ...] = ("all",)  # of the classes: trained on the first, tested on each
    new_classes: bool = False  # whether the test classes differ from the training classes


def _shifts(dataset: str) -> tuple[str, ...]:
    if shifts := find_spec(dataset).shifts:
        return (dataset, *shifts)
    known = [name for name, spec in DATASETS.items() if spec.shifts]
    raise ZooError(f"{dataset} has no other styles to test on: choose from {', '.join(known)}.")


PROTOCOLS = {
    # train on K images per class, test on the same classes
    "few-shot": Protocol(tuple(list_datasets()), SHOTS),
    # train on the first half of the classes, test on both halves
    "base-to-new": Protocol(tuple(list_datasets()), (16,), parts=("base", "new"), new_classes=True),
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
    options: Mapping[str, Sequence[object]] | None = None,
    targets: Sequence[str] = (),
) -> list[Trial]:
    """All trials of a grid, without duplicates, ordered so that neighbours share their images. Of each dataset, methods
    without training come first: they are fast and reveal missing files early.

    By default the grid has all methods that the protocol allows, its default datasets and shots, and the paper's seeds.
    `options` are recipe fields and their values, such as {"depth": [1, 3, 5]}, for the methods that have that field;
    `targets` are some of the protocol's."""
    check_choice("protocol", protocol, tuple(PROTOCOLS))
    chosen = PROTOCOLS[protocol]
    models = [get_spec(model).name for model in models]
    for method in methods:
        check_choice("method", method, tuple(METHODS))
        if chosen.new_classes and not METHODS[method].abilities.transfers:
            able = ", ".join(name for name, m in METHODS.items() if m.abilities.transfers)
            raise ZooError(f"{method} is limited to the classes it was trained on; this protocol supports {able}.")
    for dataset in datasets:
        find_spec(dataset)
    for seed in seeds:
        check_seed(seed)
    methods = methods or [name for name, m in METHODS.items() if m.abilities.transfers or not chosen.new_classes]
    methods = sorted(methods, key=list(METHODS).index)
    options = options or {}
    grid = [dict(zip(options, values, strict=True)) for values in product(*options.values())]  # of none: [{}]
    trials: dict[Trial, None] = {}
    for model, dataset in product(models, datasets or chosen.datasets):
        tested, of_dataset = _chosen_targets(protocol, dataset, targets), []
        for k, seed, method, changes in product(shots or chosen.shots, seeds or SEEDS, methods, grid):
            of_dataset.append(_trial(Trial(protocol, model, method, dataset, k, seed, tested), changes))
            if tested and not of_dataset[-1].targets:
                problem = f"{method} is limited to the classes of {dataset}, and {', '.join(tested)} has others"
                raise ZooError(f"{problem}: choose other --targets or --methods.")
        trials |= dict.fromkeys(sorted(of_dataset, key=lambda trial: trial.shots > 0))
    recipes = {trial.method: trial.default_recipe.as_dict() for trial in trials}
    for name in options:
        if not any(name in recipe for recipe in recipes.values()):
            valid = "; ".join(f"{method} has {', '.join(recipe)}" for method, recipe in recipes.items())
            raise ZooError(f"No method's recipe has a field {name!r}: {valid}.")
    return list(trials)


def _chosen_targets(protocol: str, dataset: str, targets: Sequence[str]) -> tuple[str, ...]:
    """The test datasets for a training dataset: all of the protocol, or the given ones."""
    known = PROTOCOLS[protocol].targets(dataset)
    if targets and not known:
        raise ZooError(f"{protocol} tests on the dataset itself: omit --targets.")
    for name in targets:
        check_choice("target", name, known)
    return tuple(name for name in known if name in (targets or known))


def _trial(trial: Trial, options: Mapping[str, object]) -> Trial:
    """The trial in canonical form: without options equal to the default or that the method does not have, as a text
    probe after one that is fitted to features; without shots and seed if the method does not train, and without targets
    whose classes the method cannot handle."""
    method, default = METHODS[trial.method], trial.default_recipe
    known = default.as_dict().keys() - ({"classifier"} if method.abilities.fitted else set())
    valid = {name: value for name, value in options.items() if name in known}
    recipe = default.updated(valid, where=f"{trial.method}: --set")
    trial = replace(trial, options=tuple(sorted((k, v) for k, v in valid.items() if getattr(default, k) != v)))
    if not method.abilities.transfers:
        names = find_spec(trial.dataset).names
        same = (name for name in trial.targets if name == trial.dataset or find_spec(name).names == names is not None)
        trial = replace(trial, targets=tuple(same))
    return trial if method.needs_images(recipe) else replace(trial, shots=0, seed=0)
