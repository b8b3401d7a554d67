"""The protocols, and the trials for a grid of choices: the cells of a sweep, and what they depend on.
Without torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import NamedTuple

from dcp_zoo.backbone import MINI_WEIGHTS
from dcp_zoo.data import Split, find_spec, list_datasets, load_labelled
from dcp_zoo.data.splits import image_hashes, split_images
from dcp_zoo.errors import ZooError, check_choice, check_range
from dcp_zoo.features import LIBRARIES
from dcp_zoo.fields import Values
from dcp_zoo.files import file_name, sha256_of, text_sha256
from dcp_zoo.progress import Progress, no_progress
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.recipes import BaseRecipe, check_seed
from dcp_zoo.zoo.registry import SEEDS, SHOTS
from dcp_zoo.zoo.specs import get_spec

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
        return safe if safe == name else f"{safe}-{text_sha256(name)[:8]}"

    @property
    def head(self) -> str:
        """The name in the zoo of the head that a trial of the few-shot protocol trains."""
        seed = "" if self.seed == 1 else f"-seed{self.seed}"
        return f"{self.model}.{self.dataset}-{self.shots}shot{seed}"

    @property
    def default_recipe(self) -> BaseRecipe:
        """The recipe before the options are applied."""
        return METHODS[self.method].recipe(self.model, self.dataset, self.shots, self.protocol)

    @property
    def recipe(self) -> BaseRecipe:
        return self.default_recipe.updated(dict(self.options), where="--set")


@dataclass(frozen=True)
class Settings:
    """Settings shared by all trials of a sweep; those without a comment are explained in `training.run`."""

    output: Path  # the sweep's folder
    data_root: Path | None = None  # see `dcp_zoo.data.load_split`
    device: str = "auto"
    precision: str = "float32"
    save_heads: str = ""  # the method whose heads are written to `output`/heads
    progress: Progress = no_progress

    def conditions(self, trial: Trial) -> Values:
        """What a trial's result depends on besides its seed: it is stored with the result, and a trial
        counts as finished only under the same conditions. ZooError as of `load_split`."""
        return {
            "images": {name: images_id(name, self.data_root) for name in (trial.dataset, *trial.targets)},
            "made_by": made_by(),
            "weights": weights_id(trial.model),
            "precision": self.precision,
            "recipe": trial.recipe.as_dict(),
        }


@cache
def read_split(dataset: str, data_root: Path | None) -> Split:
    """`load_split`, once for all trials of a sweep in this process. Of one's own images no group is in
    two parts."""
    images = load_labelled(dataset, data_root)
    if dataset == FOLDER and not images.has_parts:
        from dcp_zoo.features.cache import users_cache  # with torch: groups are found by features
        from dcp_zoo.features.groups import group_own_images

        with users_cache():
            images = replace(images, train=group_own_images(images.train))
    return split_images(images)


def forget_images() -> None:
    """Read all images again, as a sweep does first: folders may have changed since the one before."""
    read_split.cache_clear()
    images_id.cache_clear()


def check_data(trials: Sequence[Trial], data_root: Path | None) -> None:
    """ZooError for the first dataset that these trials train or test on and that cannot be read."""
    for trial in trials:
        for name in (trial.dataset, *trial.targets):
            read_split(name, data_root)


@cache
def images_id(dataset: str, data_root: Path | None) -> str:
    """A text that identifies what is trained and tested on. Of the user's own folder it is its name
    with a hash of the images and their classes, such as "photos (0f1e2d3c)"; of a dataset a hash of its
    split and the size of each file, as reading ImageNet's takes minutes."""
    split = read_split(dataset, data_root)
    if dataset == FOLDER:
        name = file_name(Path(data_root or "").expanduser().resolve().name)
        return f"{name} ({text_sha256(f'{split.sha256} {image_hashes(split.items)}')[:8]})"
    sizes = [Path(item.path).stat().st_size for item in split.items if item.is_file]
    return text_sha256(f"{split.sha256} {sizes}")[:16]


@cache
def made_by() -> Values:
    """The versions of this package and of what reads images, computes features and fits classifiers. Of
    the latter, without bug fixes."""
    made_by = {"dcp_zoo": version("dcp_zoo")}
    for library in (*LIBRARIES, "scikit-learn"):
        major, minor, *_ = version(library).split(".")
        made_by[library] = f"{major}.{minor}"
    return made_by


@cache
def weights_id(model: str) -> str:
    """Identifies the CLIP weights of a result: a hash of the miniature's file, or open_clip's tag and
    its pin."""
    spec = get_spec(model)
    if not spec.clip:
        return sha256_of(MINI_WEIGHTS)[:12]
    revision = f"@{spec.clip_revision[:12]}" if spec.clip_revision else ""
    return f"{spec.clip_pretrained}{revision}"


class Protocol(NamedTuple):
    """One of the paper's experiments."""

    datasets: tuple[str, ...]  # the default datasets
    shots: tuple[int, ...]  # the default numbers of training images per class
    parts: tuple[str, ...] = ("all",)  # of the classes: trained on the first, tested on each
    new_classes: bool = False  # whether the test classes differ from the training classes


PROTOCOLS = {
    # train on K images per class, test on the same classes
    "few-shot": Protocol(tuple(list_datasets()), SHOTS),
    # train on the first half of the classes, test on both halves
    "base-to-new": Protocol(tuple(list_datasets()), (16,), parts=("base", "new"), new_classes=True),
    # train on one dataset, test on the others with their class names
    "cross-dataset": Protocol(("imagenet",), (16,), new_classes=True),
    # train on photographs, test on other styles
    "domain-shift": Protocol(("imagenet",), (16,)),
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
    """All trials of a grid, without duplicates, ordered so that neighbours share their images.

    Args:
        protocol: a name in `PROTOCOLS`.
        models: of the zoo.
        methods: names in `METHODS`. Default: all that the protocol allows.
        datasets: to train on. Default: the protocol's, as of shots.
        shots: numbers of training images per class.
        seeds: of the draws. Default: the paper's.
        options: recipe fields and their values, such as {"depth": [1, 3, 5]}, for the methods that have
            that field.
        targets: some of the protocol's test datasets. Default: all.
    """
    check_choice("protocol", protocol, tuple(PROTOCOLS))
    chosen = PROTOCOLS[protocol]
    able = [name for name, method in METHODS.items() if method.abilities.transfers or not chosen.new_classes]
    for method in methods:
        check_choice(f"method for {protocol}", method, able)
    for dataset in datasets:
        find_spec(dataset)
    for k in shots:
        check_range("--shots", k, 1)
    for seed in seeds:
        check_seed(seed)
    models = [get_spec(model).name for model in models]
    methods = sorted(methods or able, key=list(METHODS).index)
    options = options or {}
    grid = [dict(zip(options, values, strict=True)) for values in product(*options.values())]  # of none: [{}]
    trials: dict[Trial, None] = {}  # in order, each once
    for model, dataset in product(models, datasets or chosen.datasets):
        tested = _chosen_targets(protocol, dataset, targets)
        for k, seed, method, changes in product(shots or chosen.shots, seeds or SEEDS, methods, grid):
            trial = _canonical(Trial(protocol, model, method, dataset, k, seed, tested), changes)
            trials[trial] = None
            if tested and not trial.targets:
                problem = f"{method} is limited to the classes of {dataset}, which no target has"
                raise ZooError(f"{problem}: choose other --targets or --methods.")
    fields = {field for trial in trials for field in trial.default_recipe.as_dict()}
    for name in options:
        check_choice("field of these methods' recipes", name, sorted(fields))
    return list(trials)


def _chosen_targets(protocol: str, dataset: str, targets: Sequence[str]) -> tuple[str, ...]:
    """The test datasets for a training dataset, which comes first: all of the protocol, or the given ones; ()
    if the protocol tests on that dataset only."""
    known: tuple[str, ...] = ()
    if protocol == "cross-dataset":
        known = tuple(dict.fromkeys((dataset, *list_datasets())))
    if protocol == "domain-shift":
        known = (dataset, *find_spec(dataset).shifts)
        if len(known) == 1:
            raise ZooError(f"{dataset} has no other styles to test on: choose imagenet or pacs_photo.")
    if targets and not known:
        raise ZooError(f"{protocol} tests on the dataset itself: omit --targets.")
    for name in targets:
        check_choice("target", name, known)
    return tuple(name for name in known if name in (targets or known))


def _canonical(trial: Trial, options: Mapping[str, object]) -> Trial:
    """The trial as all that do the same are written: without options that are the default or that the
    method does not have, such as a text probe after one that is fitted to features; without shots and
    seed if the method does not train; and without targets whose classes the method cannot handle."""
    method = METHODS[trial.method]
    default = trial.default_recipe
    fields = default.as_dict()
    if method.abilities.fitted:
        fields.pop("classifier", None)
    given = {name: value for name, value in options.items() if name in fields}
    recipe = default.updated(given, where=f"{trial.method}: --set")
    changes = sorted((name, value) for name, value in given.items() if getattr(default, name) != value)
    targets = trial.targets
    if not method.abilities.transfers:
        own = find_spec(trial.dataset).names
        targets = tuple(name for name in targets if name == trial.dataset or find_spec(name).names == own)
    trial = replace(trial, options=tuple(changes), targets=targets)
    return trial if method.needs_images(recipe) else replace(trial, shots=0, seed=0)
