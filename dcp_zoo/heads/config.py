"""The options of a DCP, what the `config.json` of a checkpoint says, and its files: all without torch."""

import json
import math
import os.path
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, NamedTuple, TypedDict

from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.fields import Checked, Values, check, count, option, problems
from dcp_zoo.files import read_plain

COUPLINGS = {"bidirectional": "the paper's", "text_to_vision": "that of the authors' released code"}
PHRASE = "a photo of a"  # the authors' `ctx_init`
POOLINGS = ("mean", "max", "first")
STATS = ("batch", "stored")
WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"  # the files of a checkpoint
STATE_NAME = "training.state"  # of a training that was stopped
NO_CLASSIFIER = "no_classifier"  # results of a head with its stored statistics, but without its text probe
ACCEPTED = ("like_accepted", "others_accepted")  # what a head's `ProbeInfo` says of images of no class


@dataclass(frozen=True)
class DCPConfig(Checked):
    """The options of a DCP: the single source of their names, defaults, choices and help texts. Raises ZooError for a
    value of another type, an unknown choice, or a number below 1."""

    n_ctx: int = count(16, "prompt tokens in each tower")
    depth: int = count(9, "coupled blocks; at most one less than the blocks of the shorter tower")
    pooling: str = option("mean", "how vision prompts are pooled over the batch", choices=POOLINGS)
    share_cmpa: bool = option(True, "one CMPA for all coupled blocks instead of one per block")
    coupling: str = option(
        "bidirectional", "the paper's, or what the authors' release computes", choices=tuple(COUPLINGS)
    )
    ctx_init: str | None = option(
        None, "phrase that initialises the text prompts if n_ctx is at most 4; further words stay before the name"
    )

    @classmethod
    def from_options(cls, options: Values) -> "DCPConfig":
        """A config from keyword options; ZooError lists the valid ones if one is unknown."""
        check(cls.__name__, problems(options, cls))
        return cls(**options)


@dataclass(frozen=True)
class Abilities(Checked):
    """What the heads of a method can do: one record, of the method and of each head's `config.json`."""

    linear: bool = option(True, "its logits are a linear function of image features: it can be fused and exported")
    fitted: bool = option(False, "its classifier is fitted to features of training images: no text probe can follow")
    coupled: bool = option(False, "the prompts of both towers rewrite each other")
    transfers: bool = option(True, "it can classify into classes that it was not trained on")


FORMAT_VERSION = 4  # the only one that is read
HEADS = ("linear", "prompts", "cache", "dcp")  # kinds of heads, see `dcp_zoo.zoo.build.KINDS`
COUNT, PERCENT = {"min": 0}, {"min": 0, "max": 100}


class ProbeInfo(TypedDict, total=False):
    """How the text probe of a head was fitted."""

    thresholds: dict[str, float]  # by the share of refused images, such as "0.05"
    like_accepted: dict[str, Annotated[float | None, PERCENT]]  # by the same shares, things much like the classes
    others_accepted: dict[str, Annotated[float, PERCENT]]  # and everyday pictures
    split_sha256: str


class RecipeInfo(TypedDict, total=False):
    eval_batch_size: Annotated[int, {"min": 1}]


class _Identity(TypedDict):
    format_version: Annotated[int, {"choices": (FORMAT_VERSION,)}]
    clip: str  # open_clip's tag of its weights
    method: str
    head: Annotated[str, {"choices": HEADS}]
    abilities: Abilities
    texts: str | list[str] | dict[str, list[str]]  # a template or several, or sentences of each class; "" for none


class HeadInfo(_Identity, total=False):
    """The `dcp` block of a `config.json`, as far as this package reads it: how a head was made and measured."""

    clip_fingerprint: str  # of all of CLIP's weights, see `Frozen.fingerprint`; none where they were not in float32
    encoders: list[dict[str, str]]  # beside CLIP: "name", timm's, and "fingerprint"
    reads: list[list[str]]  # of each reading of its text probe, see `Reading.parts`
    rest: str  # of a phrase, see `PromptHead`
    named: list[str]  # classes of the method's own classifier, where a layer of `reset_classifier` has others
    dataset: str | None
    shots: Annotated[int | None, COUNT]
    seed: int
    split_sha256: str
    subset_sha256: str
    image_hashes: dict[str, str]  # of own training images, see `splits.image_hashes`
    test_share: Annotated[float, {"min": 0, "max": 1}]
    recipe: RecipeInfo
    class_images: dict[str, Annotated[int, COUNT]]
    labels: list[tuple[str, str | int | float | bool]]  # of class names, those of a `FewShotClassifier`
    text_probe: ProbeInfo
    metrics: dict[str, Annotated[float, PERCENT]]  # top-1 by its name
    test_images: Annotated[int, COUNT]


class HeadConfig(TypedDict):
    """A `config.json`, as far as this package reads it."""

    weights_sha256: str  # of `model.safetensors`
    dcp: HeadInfo
    architecture: str
    label_names: list[str]
    pretrained_cfg: Values  # timm's
    model_args: Values  # of `DCPConfig`; empty for other methods


def checkpoint_folder(place: str | Path) -> Path:
    """The folder of a checkpoint, given by its own path or by that of one of its two files."""
    path = Path(place)
    return path.parent if path.name in (WEIGHTS_NAME, CONFIG_NAME) and path.is_file() else path


def is_checkpoint(place: str | Path) -> bool:
    """Whether a checkpoint is at this path; False for a name that no path can have."""
    return os.path.isfile(checkpoint_folder(place) / CONFIG_NAME)  # noqa: PTH113  Path would raise


def read_config(directory: str | Path) -> HeadConfig:
    """The checked `config.json` of a checkpoint directory; ZooError if it is missing, damaged, or of another format."""
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise ZooError(f"{directory} is not a checkpoint: it has no {CONFIG_NAME}. Pass a folder written by training.")
    with as_zoo_error(f"{path} is damaged: invalid JSON ({{}}). Train or download it again."):
        config = json.loads(read_plain(path))
    advice = "It is damaged, or of another version: train or download the head again, or upgrade dcp_zoo."
    check(path, problems(config, HeadConfig), advice)
    names = own_names(config)
    check(path, [] if names and config["label_names"] else ["label_names is empty"], advice)
    if config["dcp"]["head"] == "dcp":
        options = dict.fromkeys(DCPConfig.__dataclass_fields__) | config["model_args"]
        check(path, problems(options, DCPConfig, "model_args"), advice)
    return config


def own_names(config: HeadConfig) -> list[str]:
    """The names of the classes that the method's own classifier has."""
    return config["dcp"].get("named", config["label_names"])


def made(config: HeadConfig) -> Values:
    """What a checkpoint says about how its head was made: dataset, shots, seed, recipe, metrics, ..."""
    omitted = {*_Identity.__annotations__, "clip_fingerprint", "encoders", "named", "reads", "rest", "versions"}
    return {name: value for name, value in config["dcp"].items() if name not in omitted}


class Accuracy(NamedTuple):
    """How many of the images of a class are classified correctly; `name` is "" for all classes together. Images that
    come in groups, see `dcp_zoo.data.groups`, say as much as so many `independent` ones: (sum m)^2 / sum m^2, of groups
    of m images. Default: as many as the images. It is here, as `dcp-zoo info` shows it without torch."""

    name: str
    correct: int
    images: int
    independent: float | None = None

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % Wilson interval in percent: what the accuracy on many more images of this kind may be."""
        z, p, n = NormalDist().inv_cdf(0.975), self.correct / self.images, self.independent or self.images
        half = z * math.sqrt(p * (1 - p) / n + (z / n / 2) ** 2)
        centre, scale = p + z**2 / n / 2, 100 / (1 + z**2 / n)
        return scale * (centre - half), scale * (centre + half)

    def __str__(self) -> str:
        (low, high), n = self.interval, self.independent
        grouped = "" if n is None or n > self.images - 0.5 else f", in groups, which count as {n:.0f}"
        return f"{self.percent:.1f} % ({self.correct} of {self.images}{grouped}; 95 % interval {low:.0f} to {high:.0f})"


def alone_and_probed(metrics: Mapping[str, float]) -> tuple[float | None, float | None]:
    """Top-1 accuracy in percent of the method alone, and of the head with its text probe; None if not measured, or
    without one. `metrics` are those of a config.json or the manifest."""
    stored, alone = metrics.get("top1_stored"), metrics.get(f"top1_{NO_CLASSIFIER}")
    return (stored, None) if alone is None else (alone, stored)


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a checkpoint whose training is over."""
    any_file = (folder / WEIGHTS_NAME).exists() or (folder / CONFIG_NAME).exists()
    return any_file and not (folder / STATE_NAME).exists()


def check_free(output: Path, overwrite: bool, *, resumes: bool = False) -> None:
    """ZooError if the folder holds a finished checkpoint, or, unless the caller `resumes` it, a stopped training."""
    if overwrite:
        return
    if is_finished(output):
        raise ZooError(f"{output} already holds a checkpoint: choose another --output, or pass --overwrite.")
    if not resumes and (output / STATE_NAME).exists():
        raise ZooError(f"{output} holds a stopped training, which can resume: choose another --output, or --overwrite.")
