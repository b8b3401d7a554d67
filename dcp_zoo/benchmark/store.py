"""The folder of a sweep: one file per finished trial and failure; see docs/benchmarks.md."""

import json
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dcp_zoo.benchmark.plan import FOLDER, Settings, Trial
from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.fields import Values
from dcp_zoo.files import read_plain, write_file

if TYPE_CHECKING:
    import pandas as pd

IDENTITY = "protocol,model,weights,method,options,dataset,shots,seed,target,classes,stats".split(",")  # of an accuracy
COLUMNS = [*IDENTITY, "top1", "ece", "nll", "images", "train_seconds", "selection"]


def save_result(output: Path, result: Values) -> None:
    """Write a finished trial's file; remove an earlier failure, and what it had computed before."""
    key = Trial(**result["trial"]).key
    write_json(output / "results" / f"{key}.json", result)
    shutil.rmtree(output / "unfinished" / key, ignore_errors=True)
    (output / "failed" / f"{key}.json").unlink(missing_ok=True)


def save_failure(output: Path, trial: Trial, message: str, traceback: str) -> None:
    failure = {"trial": asdict(trial), "error": message, "traceback": traceback}
    write_json(output / "failed" / f"{trial.key}.json", failure)


def write_json(path: Path, content: Values) -> None:
    write_file(path, json.dumps(content, indent=1) + "\n", "choose another --output; finished trials are kept")


def results(output: Path) -> dict[str, Values]:
    """The results of all finished trials by key."""
    return read_folder(output / "results")


def done(output: Path) -> set[str]:
    """Keys of the finished trials."""
    return {path.stem for path in (output / "results").glob("*.json")}


def failures(output: Path) -> dict[str, str]:
    """The error message of every trial that failed and has not succeeded since, by key."""
    return {key: failure["error"] for key, failure in read_folder(output / "failed").items()}


def finished(trial: Trial, settings: Settings) -> bool:
    """Whether the trial has a result, and its head if that is saved. ZooError if its result was made
    under other conditions, such as other images, weights or another recipe."""
    path = settings.output / "results" / f"{trial.key}.json"
    if not path.is_file():
        return False
    result = _read_checked(path, settings.conditions(trial))
    untested = [name for name in trial.targets if name not in result["trial"]["targets"]]
    if untested:
        raise ZooError(f"{path} has no test on {', '.join(untested)}: choose another --output, or omit these.")
    return trial.method != settings.save_heads or "head_sha256" in result


def _read_checked(path: Path, conditions: Values) -> Values:
    """The content of a trial's file; ZooError if it was made under other conditions."""
    content = _read_json(path)
    with _reading(path):
        before = _by_name(content)
    now = _by_name(conditions)
    differ = [name for name in now if before.get(name, now[name]) != now[name]]  # a target may still come
    if differ:
        raise ZooError(f"{path} was made with other {', '.join(differ)}: choose another --output.")
    return content


def _by_name(conditions: Values) -> Values:
    """Each of `Settings.conditions`, by what it is called."""
    images = {f"images of {name}": content for name, content in conditions["images"].items()}
    return images | conditions["made_by"] | {name: conditions[name] for name in ("weights", "precision", "recipe")}


class Unfinished:
    """What a trial has computed, from which it resumes after a kill or an error. ZooError if that was
    made under other conditions than the settings', or the file is damaged.

    Attributes:
        head: the folder for a training, its checkpoint and its state.
        conditions: those of the settings.
        results: of the targets that were tested.
    """

    def __init__(self, trial: Trial, settings: Settings) -> None:
        folder = settings.output / "unfinished" / trial.key
        self.head = folder / "head"
        self.conditions = settings.conditions(trial)
        self.results: list[Values] = []
        self._file = folder / "results.json"
        if self._file.is_file():
            self.results = _read_checked(self._file, self.conditions)["results"]

    def keep(self) -> None:
        """Write the results so far, and their conditions; before a training there are none."""
        write_json(self._file, self.conditions | {"results": self.results})


def read_folder(folder: Path) -> Values:
    """The contents of the files in a folder by their names without suffix."""
    return {path.stem: _read_json(path) for path in sorted(folder.glob("*.json"))}


def _read_json(path: Path) -> Values:
    with _reading(path):
        content: Values = json.loads(read_plain(path))
    return content


def _reading(path: Path) -> AbstractContextManager[None]:
    """Raise what is wrong with a file, also one that is JSON and not of a trial, as a ZooError that names it."""
    return as_zoo_error(f"{path} cannot be read ({{}}). Delete it and run the trial again.")


def gather(outputs: Path | Sequence[Path]) -> "pd.DataFrame":
    """The results of one or several folders, one row per accuracy."""
    import pandas as pd  # slow to import

    if isinstance(outputs, (str, Path)):
        outputs = [outputs]
    rows = []
    first: dict[str, tuple[object, Path]] = {}  # what all results must share: its value, and the file that has it
    for folder in outputs:
        for path in sorted(Path(folder, "results").glob("*.json")):
            result = _read_json(path)
            with _reading(path):
                trial = Trial(**result["trial"])
                dataset = _shown(trial.dataset, result)
                for entry in result["results"]:
                    shown = {"options": trial.changes, "dataset": dataset, "target": _shown(entry["target"], result)}
                    row = result | result["trial"] | entry | shown  # whose other fields are no columns
                    rows.append([row[name] for name in COLUMNS])
                images = f"the images of {dataset} for {result['weights']}"
                # no column tells these apart
                shared = {"--precision": result["precision"], images: result["split_sha256"]}
            for name, value in shared.items():
                before, other = first.setdefault(name, (value, path))
                if value != before:
                    raise ZooError(f"{other} and {path} differ in {name}: report them apart, from two folders.")
    return pd.DataFrame(rows, columns=COLUMNS)


def _shown(dataset: str, result: Values) -> str:
    """A dataset's name in tables; for the user's own folder that of this folder, so that no mean is
    over several."""
    return result["images"][FOLDER] if dataset == FOLDER else dataset
