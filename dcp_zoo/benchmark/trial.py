"""One cell of a sweep, and what its result depends on. Without torch, which only `run` needs."""

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
from dcp_zoo.training.recipes import BaseRecipe
from dcp_zoo.zoo.registry import get_spec

if TYPE_CHECKING:
    from dcp_zoo.model.names import Texts

SAVED_HEADS = "heads"  # folder of the heads that a sweep saves


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
    def default_recipe(self) -> BaseRecipe:
        """The recipe before the options are applied."""
        return METHODS[self.method].recipe(self.model, self.dataset, self.shots, self.protocol)

    @property
    def recipe(self) -> BaseRecipe:
        """The recipe with the options."""
        return self.default_recipe.updated(dict(self.options), where="--set")

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
        device, precision, workers: see `dcp_zoo.training.plan`.
        features: folder of given image features that replace images and CLIP, see `features`.
        per_class, confusion: whether results include the accuracy of every class and the confusion matrix.
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

    def conditions(self, trial: Trial) -> dict[str, Any]:
        """What a trial's result depends on besides images and seed: it is stored with the result, and a trial counts as
        finished only under the same conditions."""
        return {
            "weights": f"features of {trial.model}" if self.features else weights_id(trial.model),
            "precision": self.precision,
            "descriptions": sha256_of(self.descriptions)[:16] if self.descriptions else "",
            "features": sha256_of(self.features / f"{trial.dataset}.npz")[:16] if self.features else "",
            "recipe": trial.recipe.as_dict(),
        }

    def command(self, trial: Trial) -> str:
        """The command that runs only this trial, with those of these settings that change its result."""
        words = [f"dcp-zoo benchmark {trial.protocol} --models {trial.model} --methods {trial.method}"]
        words += [f"--datasets {trial.dataset}"]
        words += [f"--shots {trial.shots} --seeds {trial.seed}"] if trial.shots else []
        words += [f"--set {name}={json.dumps(value)}" for name, value in trial.options]
        words += ["--data-root DIR --output DIR"]
        words += [f"--descriptions {self.descriptions}"] if self.descriptions else []
        words += [f"--features {self.features}"] if self.features else []
        words += [f"--precision {self.precision}"] if self.precision != "float32" else []
        return " ".join(words)


@cache
def weights_id(model: str) -> str:
    """Identifies the CLIP weights of a result: a hash of the miniature's file, or open_clip's tag."""
    spec = get_spec(model)
    return spec.clip_pretrained if spec.clip else sha256_of(MINI_WEIGHTS)[:12]
