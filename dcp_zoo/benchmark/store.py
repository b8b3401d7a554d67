"""The folder of a sweep: one file per finished trial, failure, plan and lock, all written atomically.

OUTPUT/results/KEY.json   a finished trial
OUTPUT/failed/KEY.json    a trial that failed, until it succeeds
OUTPUT/plans/HASH.json    the trials of one command
OUTPUT/heads/HEAD         a trained head, if heads are saved
OUTPUT/locks/KEY.lock     locked while a process runs the trial; the system releases the lock with the process
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcp_zoo.benchmark.trial import FORMAT_VERSION, Settings, Trial, default_of, selection, weights_id
from dcp_zoo.errors import ZooError, cannot_write, import_extra
from dcp_zoo.files import locked, write_atomically
from dcp_zoo.training.methods import METHODS

if TYPE_CHECKING:
    import pandas as pd

TRIAL_COLUMNS = ("protocol", "model", "method", "dataset", "shots", "seed")
RESULT_COLUMNS = ("target", "classes", "stats", "top1", "ece", "nll", "images")
COLUMNS = (
    *("protocol", "model", "weights", "method", "options", "dataset", "shots", "seed"),
    *(*RESULT_COLUMNS, "train_seconds", "selection"),
)


def save(output: Path, result: dict[str, Any]) -> None:
    """Write a finished trial's file and remove an earlier failure."""
    key = Trial.from_dict(result["trial"]).key
    write(output / "results" / f"{key}.json", result)
    (output / "failed" / f"{key}.json").unlink(missing_ok=True)


def save_failure(output: Path, trial: Trial, command: str, message: str, traceback: str) -> None:
    """Record why a trial failed, and the command that repeats it."""
    failure = {"format": FORMAT_VERSION, "trial": asdict(trial), "error": message, "traceback": traceback}
    write(output / "failed" / f"{trial.key}.json", failure | {"command": command})


def save_plan(output: Path, trials: Sequence[Trial]) -> None:
    """Write the planned trials; the same plan gives the same file."""
    trials = sorted(trials, key=lambda trial: trial.key)
    name = hashlib.sha256("\n".join(trial.key for trial in trials).encode()).hexdigest()[:16]
    write(output / "plans" / f"{name}.json", [asdict(trial) for trial in trials])


def write(path: Path, content: Any, advice: str = "choose another --output; finished trials are kept") -> None:
    """Write JSON atomically, into a folder that is created if needed; the ZooError of a failure ends with `advice`."""
    text = json.dumps(content, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: Path(temporary).write_text(text))
    except OSError as error:
        raise cannot_write(path, error, advice) from error


# ------------------------------------------------------------------------------------------------------------- reading


def results(output: Path) -> dict[str, dict[str, Any]]:
    """The results of all finished trials by key."""
    return _read_all(output / "results")


def done(output: Path) -> set[str]:
    """Keys of the finished trials."""
    return {path.stem for path in _files(output / "results")}


def failures(output: Path) -> dict[str, str]:
    """The error message of every trial that failed and has not succeeded since, by key."""
    return {key: failure["error"] for key, failure in _read_all(output / "failed").items()}


def planned(output: Path) -> dict[str, Trial]:
    """All planned trials by key."""
    trials = (Trial.from_dict(fields) for plan in _read_all(output / "plans").values() for fields in plan)
    return {trial.key: trial for trial in trials}


def finished(output: Path, trial: Trial, settings: Settings) -> bool:
    """Whether the trial has a result with all metrics that the settings request, and its head if that is saved.

    Raises:
        ZooError: its result was made with other weights, another precision or another recipe, or is damaged.
    """
    path = output / "results" / f"{trial.key}.json"
    if not path.is_file():
        return False
    result = _read(path)
    expected = {"weights": weights_id(trial.model, settings.features), "precision": settings.precision}
    differ = [f"{name} {result[name]}, not {value}" for name, value in expected.items() if result[name] != value]
    if result.get("descriptions", "") != settings.descriptions_id:
        differ.append("other --descriptions")
    if settings.features and result["split_sha256"] != settings.features_id(trial.dataset):
        differ.append("other --features")
    recipe = default_of(trial).updated(dict(trial.options)).as_dict()
    if result.get("recipe", recipe) != recipe:
        differ.append("another recipe, such as that of an earlier version")
    if differ:
        raise ZooError(f"{path} was made with {' and '.join(differ)}: choose another --output.")
    if settings.save_heads and trial.method == "dcp" and "head_sha256" not in result:
        return False
    requested = [name for name in ("per_class", "confusion") if getattr(settings, name)]
    return all(name in entry for entry in result["results"] for name in requested)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))


def _read_all(folder: Path) -> dict[str, Any]:
    return {path.stem: _read(path) for path in _files(folder)}


def _read(path: Path) -> Any:
    try:
        content = json.loads(path.read_bytes())
        return _upgrade(content) if isinstance(content, dict) and "results" in content else content
    except (OSError, ValueError) as error:
        raise ZooError(f"{path} cannot be read ({error}). Delete it and run the trial again.") from error


def _upgrade(result: dict[str, Any]) -> dict[str, Any]:
    """A result of format 1, which did not say what hyperparameters were chosen on."""
    if "selection" not in result:
        trial = result["trial"]
        known = trial["method"] in METHODS and bool(trial["shots"])
        return result | {"selection": selection(trial["method"], {}, True) if known else "none"}
    return result


# -------------------------------------------------------------------------------------------------------------- locks


@contextmanager
def lock(output: Path, key: str) -> Iterator[bool]:
    """Whether this process may run a trial; if so, no other may until the context or the process ends."""
    with ExitStack() as stack:
        try:
            acquired = stack.enter_context(locked(output / "locks" / f"{key}.lock"))
        except OSError as error:
            raise cannot_write(output, error) from error
        yield acquired


# ----------------------------------------------------------------------------------------------------------- gathering


def rows(found: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The tidy table of results: one row per entry of each finished trial."""
    for result in found:
        trial = result["trial"]
        row = {name: trial[name] for name in TRIAL_COLUMNS}
        row |= {name: result[name] for name in ("weights", "train_seconds", "selection")}
        row["options"] = Trial.from_dict(trial).changes
        for entry in result["results"]:
            yield row | {name: entry.get(name) for name in RESULT_COLUMNS}  # format 1 had no nll


def gather(outputs: Path | Sequence[Path]) -> "pd.DataFrame":
    """The results of one or several folders, one row per accuracy. Needs the extra `plots`."""
    pandas = import_extra("pandas", "plots")
    folders = [outputs] if isinstance(outputs, (str, Path)) else outputs
    found = [(folder, result) for folder in folders for result in results(Path(folder)).values()]
    _check_comparable(found)
    return pandas.DataFrame(rows(result for _, result in found), columns=list(COLUMNS))


def _check_comparable(found: Sequence[tuple[Path, dict[str, Any]]]) -> None:
    """ZooError for results with different --descriptions or --precision, which no column tells apart."""
    for name, default in (("descriptions", ""), ("precision", "float32")):
        places = {result.get(name, default): folder for folder, result in found}
        if len(places) > 1:
            raise ZooError(f"The results differ in --{name}: report {' and '.join(map(str, places.values()))} apart.")


def write_csv(output: Path) -> Path:
    """Gather a folder into its `results.csv`."""
    path, table = output / "results.csv", gather(output)
    try:
        write_atomically(path, lambda temporary: table.to_csv(temporary, index=False))
    except OSError as error:
        raise cannot_write(path, error, "run the same command again") from error
    return path
