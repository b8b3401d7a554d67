"""The options of a DCP, the schema of a checkpoint's `config.json`, and where its files are. Does not import
torch."""

import json
import os.path
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, TypedDict

from dcp_zoo.accuracy import Accuracy
from dcp_zoo.backbone.preprocessing import Preprocessing
from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.fields import Checked, Values, check, count, option, problems
from dcp_zoo.files import read_plain

COUPLINGS = {
    "bidirectional": "the paper's",
    "text_to_vision": "that of the authors' released code",
    "vision_to_text": "in which only the text prompts are rewritten",
    "self": "in which each tower's prompts are rewritten from its own, without any exchange",
    "none": "in which no prompts are rewritten",
}
PHRASE = "a photo of a"  # the authors' `ctx_init`
POOLINGS = ("mean", "max", "first")
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
NO_CLASSIFIER = "no_classifier"  # results of a head with its stored statistics, but without its text probe
# results of the test in a head's `info`
MEASURED = ("metrics", "test_images", "independent_images", "at_most", "balanced_top1", "untested", "refused")
ACCEPTED = ("like_accepted", "others_accepted")  # false acceptance of images of no class, in `ProbeInfo`
PROMISES = "promises"  # in `ProbeInfo`
REFITTED = "measured before training on all images"


@dataclass(frozen=True)
class DCPConfig(Checked):
    """The options of a DCP: the single source of their names, defaults, choices and help texts. Raises
    ZooError for a value of another type, an unknown choice, or a number below 1."""

    n_ctx: int = count(16, "prompt tokens in each tower")
    depth: int = count(9, "coupled blocks; at most one less than the blocks of the shorter tower")
    pooling: str = option("mean", "how vision prompts are pooled over the batch", choices=POOLINGS)
    share_cmpa: bool = option(True, "one CMPA for all coupled blocks instead of one per block")
    coupling: str = option(
        "bidirectional",
        "the paper's, what the authors' release computes (text_to_vision), or one to compare these with",
        choices=tuple(COUPLINGS),
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

    linear: bool = option(True, "its logits are a linear function of image features, as explanations need it")
    fitted: bool = option(False, "its classifier is fitted to features of training images: no text probe can follow")
    coupled: bool = option(False, "the prompts of both towers rewrite each other")
    transfers: bool = option(True, "it can classify into classes that it was not trained on")


FORMAT_VERSION = 4  # the only one that is read
HEADS = ("linear", "adapter", "prompts", "conditional", "cache", "dcp")  # kinds of heads, see `dcp_zoo.zoo.build.KINDS`
COUNT = {"min": 0}
PERCENT = {"min": 0, "max": 100}
PROBABILITY = {"min": 0, "max": 1}


class PromisesInfo(TypedDict, total=False):
    """What holds of images like those of training, see `dcp_zoo.probe.threshold.promises_of`."""

    images: float
    sets: dict[str, Annotated[float, PROBABILITY]]
    trusted: dict[str, Annotated[float, PROBABILITY]]
    share: Annotated[float | None, PERCENT]


class ProbeInfo(TypedDict, total=False):
    """How the text probe of a head was fitted."""

    thresholds: dict[str, float]  # by the share of rejected images of the classes, such as "0.05"
    like_accepted: dict[str, Annotated[float | None, PERCENT]]  # by the same shares: near OOD images that are accepted
    others_accepted: dict[str, Annotated[float, PERCENT]]  # and everyday pictures, far OOD
    promises: PromisesInfo
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
    """The `dcp` block of a `config.json`: how a head was made and measured. Others may be there that nothing
    reads."""

    clip_fingerprint: str  # of all of CLIP's weights, see `Frozen.fingerprint`; "" where they were not in float32
    encoders: list[dict[str, str]]  # beside CLIP: "name", timm's, and "fingerprint"
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
    untested: list[str]  # classes without a test image


# of the `dcp` block, what describes the head itself, and not how it was made
OWN = {*_Identity.__annotations__, "clip_fingerprint", "encoders", "named", "rest", "versions"}


class HeadConfig(TypedDict):
    """A `config.json`. Others may be there that nothing reads."""

    weights_sha256: str  # of `model.safetensors`
    dcp: HeadInfo
    architecture: str
    label_names: list[str]
    pretrained_cfg: Preprocessing
    model_args: Values  # of `DCPConfig`; empty for other methods


def checkpoint_folder(place: str | Path) -> Path:
    """The folder of a checkpoint, given by its own path or by that of one of its two files."""
    path = Path(place)
    return path.parent if path.name in (WEIGHTS_NAME, CONFIG_NAME) and path.is_file() else path


def is_checkpoint(place: str | Path) -> bool:
    """Whether a checkpoint is at this path; False for a name that no path can have."""
    return os.path.isfile(checkpoint_folder(place) / CONFIG_NAME)  # noqa: PTH113  Path would raise


def waiting_file(directory: str | Path, sha256: str) -> Path:
    """Where weights are saved before `config.json` names them by this hash, and while others are in their
    place."""
    return Path(directory) / f".{WEIGHTS_NAME}.{sha256}"


def weights_file(directory: Path) -> Path:
    """The file with the tensors of a checkpoint: where a save was killed, that which waits. Raises ZooError
    like `read_config`."""
    waiting = waiting_file(directory, read_config(directory)["weights_sha256"])
    return waiting if os.path.isfile(waiting) else directory / WEIGHTS_NAME  # noqa: PTH113  Path would raise


def read_config(directory: str | Path) -> HeadConfig:
    """The checked `config.json` of a checkpoint directory; ZooError if it is missing, damaged, or of another
    format."""
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise ZooError(f"{directory} is not a checkpoint: it has no {CONFIG_NAME}. Pass a folder written by training.")
    with as_zoo_error(f"{path} is damaged: invalid JSON ({{}}). Train or download it again."):
        config = json.loads(read_plain(path))
    advice = "It is damaged, or of another version: train or download the head again, or upgrade dcp_zoo."
    check(path, problems(config, HeadConfig), advice)
    if not (own_names(config) and config["label_names"]):
        check(path, ["label_names is empty"], advice)
    if config["dcp"]["head"] == "dcp":
        options = dict.fromkeys(DCPConfig.__dataclass_fields__) | config["model_args"]
        check(path, problems(options, DCPConfig, "model_args"), advice)
    return config


def own_names(config: HeadConfig) -> list[str]:
    """The names of the classes that the method's own classifier has."""
    return config["dcp"].get("named", config["label_names"])


def without(values: Mapping[str, Any], names: Collection[str]) -> Values:
    """A copy of the values without those of these names."""
    return {name: value for name, value in values.items() if name not in names}


def library_versions() -> dict[str, str]:
    """Versions of the libraries that affect results."""
    return {name: version(name) for name in ("torch", "timm", "open_clip_torch")}


def alone_and_probed(metrics: Mapping[str, float]) -> tuple[float | None, float | None]:
    """Top-1 accuracy in percent of the method alone, and of the head with its text probe; None if not
    measured, or without one. `metrics` are those of a config.json or the manifest."""
    stored = metrics.get("top1_stored")
    alone = metrics.get(f"top1_{NO_CLASSIFIER}")
    return (stored, None) if alone is None else (alone, stored)


def accuracy_text(info: Mapping[str, Any]) -> str:
    """Such as "at least 59 % (97.5 % sure); estimate 90.0 % (9 of 10; 95 % interval 59 to 99) with the text
    probe; 85.0 % without", and whether it was trained on the tested images afterwards."""
    metrics = info.get("metrics")
    if not metrics:
        return ""
    top1 = metrics.get("top1_stored", next(iter(metrics.values())))
    images = info.get("test_images")
    text = f"{top1:.1f} %"
    if images:
        correct = round(top1 * images / 100)
        counted = info.get("independent_images"), info.get("untested", ()), info.get("at_most")
        text = str(Accuracy("", correct, images, *counted))
    alone, with_probe = alone_and_probed(metrics)
    if with_probe is not None:
        text += f" with the text probe; {alone:.1f} % without"
    return f"{text}; {REFITTED}" if info.get("test_share") == 0 else text
