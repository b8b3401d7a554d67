"""One cell of a sweep, and what identifies its result. Without torch, which only `run` needs."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcp_zoo.data.class_file import read_descriptions
from dcp_zoo.data.table import find_spec
from dcp_zoo.files import file_name, sha256_of
from dcp_zoo.model.config import MINI_WEIGHTS
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.recipes import VALIDATION, BaseRecipe
from dcp_zoo.zoo.registry import get_spec

if TYPE_CHECKING:
    from dcp_zoo.model.names import Texts

FORMAT_VERSION = 2
HEADS = "heads"  # folder of the heads that a sweep saves


@dataclass(frozen=True)
class Trial:
    """One cell of a sweep.

    Attributes:
        protocol: a name in `PROTOCOLS`.
        model: a model of the zoo.
        method: a name in `METHODS`.
        dataset: the training dataset; for methods that do not train, the test dataset.
        shots, seed: of the few-shot subset; 0 for methods that do not train.
        targets: the test datasets; empty: `dataset`.
        options: changes to the method's recipe, sorted by name.
    """

    protocol: str
    model: str
    method: str
    dataset: str
    shots: int
    seed: int
    targets: tuple[str, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def changes(self) -> str:
        """The options as text: "coupling=text_to_vision,depth=3"."""
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
        """The name of the head that a DCP trial of the few-shot protocol trains."""
        return f"{self.model}.{self.dataset}-{self.shots}shot" + (f"-seed{self.seed}" if self.seed != 1 else "")

    @property
    def command(self) -> str:
        """The command that runs only this trial."""
        words = [f"dcp-zoo benchmark {self.protocol} --models {self.model} --methods {self.method}"]
        words += [f"--datasets {self.dataset}"]
        words += [f"--shots {self.shots} --seeds {self.seed}"] if self.shots else []
        words += [f"--set {name}={json.dumps(value)}" for name, value in self.options]
        return " ".join([*words, "--data-root DIR --output DIR"])

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Trial":
        """A trial from its `asdict`, after a round trip through JSON."""
        options = tuple((name, value) for name, value in fields["options"])
        return cls(**{**fields, "targets": tuple(fields["targets"]), "options": options})


@dataclass(frozen=True)
class Settings:
    """Settings shared by all trials of a sweep.

    Attributes:
        output: the sweep's folder.
        data_root: see `dcp_zoo.data.load_split`.
        device, precision, workers: see `dcp_zoo.training.run.plan`.
        features: folder of given image features that replace images and CLIP, see `features`.
        per_class, confusion: whether results include the accuracy of every class and the confusion counts.
        descriptions: file with sentences of each class, in place of its name.
        save_heads: whether trained DCPs are written to `output`/heads.
    """

    output: Path
    data_root: Path | None = None
    device: str = "auto"
    precision: str = "float32"
    workers: int = 0
    per_class: bool = False
    confusion: bool = False
    features: Path | None = None
    descriptions: Path | None = None
    save_heads: bool = False

    def texts(self, dataset: str) -> "Texts":
        """What methods read of a dataset's classes: its template, or the sentences of each class."""
        return read_descriptions(self.descriptions) if self.descriptions else find_spec(dataset).template

    def command(self, trial: Trial) -> str:
        """The command that runs only this trial, with those of these settings that change its result."""
        options: dict[str, Any] = {"--descriptions": self.descriptions, "--features": self.features}
        options |= {"--precision": self.precision if self.precision != "float32" else None}
        return " ".join([trial.command, *(f"{name} {value}" for name, value in options.items() if value)])

    def features_id(self, dataset: str) -> str:
        """A hash of a dataset's given features, "" if there are none."""
        return sha256_of(self.features / f"{dataset}.npz") if self.features else ""

    @property
    def descriptions_id(self) -> str:
        """A hash of the descriptions, "" if there are none."""
        return sha256_of(self.descriptions)[:16] if self.descriptions else ""


def default_of(trial: Trial) -> BaseRecipe:
    """The trial's recipe before its options are applied."""
    return METHODS[trial.method].recipe(trial.model, trial.dataset, trial.shots, trial.protocol)


@cache
def weights_id(model: str, features: Path | None = None) -> str:
    """Identifies the CLIP weights of a result: a hash of the miniature's file, open_clip's tag, or given features."""
    if features:
        return f"features of {model}"
    spec = get_spec(model)
    return spec.clip_pretrained if spec.clip else sha256_of(MINI_WEIGHTS)[:12]


def selection(method: str, info: dict[str, Any], has_val: bool) -> str:
    """What hyperparameters were chosen on: "none", few-shot validation images, or the training images, by
    cross-validation; never test images."""
    info = info.get("classifier", info)
    return info.get("selection") or (VALIDATION if METHODS[method].chooses and has_val else "none")
