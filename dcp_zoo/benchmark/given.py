"""The trials that a folder of given image features allows, see `features`. Without torch, as all plans."""

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dcp_zoo.benchmark.plan import SEEDS, plan_trials
from dcp_zoo.benchmark.trial import Trial, default_of
from dcp_zoo.data.table import DATASETS
from dcp_zoo.errors import ZooError
from dcp_zoo.training.methods import METHODS

SEED = 1  # the files hold one draw of the training images
TEXT = "text_vector"
NEEDED = ("classnames", "test_vector", "test_label")


def plan_given(
    folder: Path,
    protocol: str,
    models: Sequence[str],
    methods: Sequence[str] = (),
    datasets: Sequence[str] = (),
    shots: Sequence[int] = (),
    seeds: Sequence[int] = (),
    options: Mapping[str, Sequence[Any]] | None = None,
) -> tuple[list[Trial], str]:
    """The trials of a grid, by default all that the files allow, and what was left out of the defaults, "" if nothing.

    Args:
        folder: with the files.
        protocol, models, methods, datasets, shots, seeds, options: see `plan_trials`.

    Raises:
        ZooError: a file that cannot be read, or something that was asked for and is impossible.
    """
    able = [name for name, method in METHODS.items() if method.features]
    _check(protocol, models, methods, seeds, able)
    files = _files(folder, datasets)
    trials = plan_trials(protocol, models, methods or able, list(files), shots or _shots(files), [SEED], options)
    lacking = {trial: lack for trial in trials if (lack := _lacking(trial, files[trial.dataset]))}
    kept = [trial for trial in trials if trial not in lacking]
    asked = {"dataset": datasets, "method": methods, "shots": shots}
    refused = [trial for trial, array in lacking.items() if _is_asked(trial, array, kept, asked)]
    for trial in refused or ([] if kept else list(lacking)):
        raise ZooError(_refusal(trial, lacking[trial], folder, files[trial.dataset]))
    left_out = [*_by_array(lacking)]
    if not datasets and (others := [f"{name}.npz" for name in _names(folder) if name not in files]):
        left_out.append(f"{', '.join(others)} (not named after a dataset)")
    if not methods:
        left_out.append(f"{', '.join(name for name in METHODS if name not in able)} (they need images)")
    if not seeds:
        left_out.append(f"seeds {', '.join(str(s) for s in SEEDS if s != SEED)} (the features are of one draw)")
    return kept, "; ".join(left_out)


def _check(protocol: str, models: Sequence[str], methods: Sequence[str], seeds: Sequence[int], able: list[str]) -> None:
    """ZooError for what no file allows."""
    if protocol != "few-shot":
        raise ZooError("--features runs the few-shot protocol only.")
    if not models:
        raise ZooError("--features needs the model whose CLIP made them, such as --models dcp_vitb32.")
    for method in methods:
        if method in METHODS and method not in able:
            raise ZooError(f"{method} needs images, not only features: with --features choose from {', '.join(able)}.")
    if set(seeds) - {SEED}:
        raise ZooError(f"The features are of one draw of the training images: pass --seeds {SEED}, or omit --seeds.")


# --------------------------------------------------------------------------------------------------------------- files


def _names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.npz"))


def _files(folder: Path, datasets: Sequence[str]) -> dict[str, set[str]]:
    """The names of the arrays of these datasets, by default of all in the folder."""
    found = _names(folder)
    has = f"{folder} has {', '.join(found) or 'no .npz files'}."
    for name in datasets:
        if name not in found:
            raise ZooError(f"There is no file {folder}/{name}.npz: {has}")
    chosen = datasets or [name for name in DATASETS if name in found]
    if not chosen:
        raise ZooError(f"There is no file that is named after a dataset, such as caltech101.npz: {has}")
    return {name: _arrays(folder / f"{name}.npz") for name in chosen}


def _arrays(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as file:
            found = {name.removesuffix(".npy") for name in file.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ZooError(f"{path} cannot be read: {error}.") from error
    for name in NEEDED:
        if name not in found:
            raise ZooError(f"{path} has no {name}: it has {', '.join(sorted(found))}.")
    return found


def _shots(files: Mapping[str, set[str]]) -> list[int]:
    """All numbers of shots in the files."""
    matches = (re.fullmatch(r"train(\d+)_vector", name) for arrays in files.values() for name in arrays)
    return sorted({int(match[1]) for match in matches if match})


# -------------------------------------------------------------------------------------------------------------- trials


def _lacking(trial: Trial, arrays: set[str]) -> str:
    """An array that a trial needs and does not have, or ""."""
    reads_names = METHODS[trial.method].text and getattr(default_of(trial).updated(dict(trial.options)), "text", True)
    needed = [TEXT] if reads_names else []
    needed += [f"train{trial.shots}_vector"] if trial.shots else []
    return next((name for name in needed if name not in arrays), "")


def _is_asked(trial: Trial, array: str, kept: Sequence[Trial], asked: Mapping[str, Sequence[Any]]) -> bool:
    """Whether both choices that made an impossible trial were asked for, or one of them and no trial is left for it."""
    explicit = [name for name in ("dataset", "method" if array == TEXT else "shots") if asked[name]]
    lost = (all(getattr(other, name) != getattr(trial, name) for other in kept) for name in explicit)
    return len(explicit) == 2 or any(lost)


def _refusal(trial: Trial, array: str, folder: Path, arrays: set[str]) -> str:
    lack = f"{folder}/{trial.dataset}.npz has no {array}"
    if array != TEXT:
        return f"{lack}: it has {', '.join(sorted(arrays))}."
    return (
        f"{lack}, which {trial.method} needs: choose a method that reads images alone, such as linear-probe, or gda "
        "with --set text=false."
    )


def _by_array(lacking: Mapping[Trial, str]) -> Iterator[str]:
    """What impossible trials have in common, for each array that they lack."""
    for array in dict.fromkeys(lacking.values()):
        trials = [trial for trial, lack in lacking.items() if lack == array]
        datasets = ", ".join(dict.fromkeys(trial.dataset for trial in trials))
        methods = ", ".join(dict.fromkeys(trial.method for trial in trials))
        what = f"{methods} on {datasets}" if array == TEXT else f"{datasets} with --shots {trials[0].shots}"
        yield f"{what} (no {array})"
