"""Given image features in place of images and CLIP, for methods that need nothing else: the files, and the trials that
they allow. Without torch, as all plans; `images` reads the features.

A folder holds one file DATASET.npz per dataset:

    classnames         (C,)
    test_vector        (n, E) image features, test_label (n,)
    trainK_vector      (m, E), trainK_label (m,) for each number K of shots
    valK_vector, valK_label     optional: few-shot validation images
    text_vector        optional: (C, E) text features of the class names in the dataset's template
    logit_scale        optional: exp(logit_scale) of the CLIP, by default 100
"""

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dcp_zoo.benchmark.plan import SEEDS, plan_trials
from dcp_zoo.benchmark.trial import Trial
from dcp_zoo.data.table import DATASETS
from dcp_zoo.errors import ZooError
from dcp_zoo.training.methods import METHODS

DRAW = 1  # the seed of the trials: the files hold one draw of the training images
TEXT_ARRAY = "text_vector"


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
    """The trials of a grid that the files allow, and what was left out, "" if nothing.

    Args:
        folder: with the files.
        protocol, models, methods, datasets, shots, seeds, options: see `plan_trials`.

    Raises:
        ZooError: a file that cannot be read, something that no file allows, or no trial is left.
    """
    able = [name for name, method in METHODS.items() if method.features]
    _check_grid(protocol, models, methods, seeds, able)
    found = sorted(path.stem for path in folder.glob("*.npz"))
    names = datasets or [name for name in DATASETS if name in found]
    if not names:
        has = ", ".join(found) or "no .npz files"
        raise ZooError(f"There is no file that is named after a dataset, such as caltech101.npz: {folder} has {has}.")
    files = {name: array_names(folder, name) for name in names}
    matches = (re.fullmatch(r"train(\d+)_vector", array) for arrays in files.values() for array in arrays)
    shots_found = sorted({int(match[1]) for match in matches if match})
    trials = plan_trials(protocol, models, methods or able, names, shots or shots_found, [DRAW], options)
    lacking = {trial: array for trial in trials if (array := lacking_array(trial, files[trial.dataset]))}
    kept = [trial for trial in trials if trial not in lacking]
    left_out = [f"{name}.npz has no {a}" for name, a in dict.fromkeys((t.dataset, a) for t, a in lacking.items())]
    if not kept:
        raise ZooError(
            f"The files in {folder} allow none of these trials: {'; '.join(left_out)}. Methods that read images alone, "
            f"such as linear-probe, or gda with --set text=false, need no {TEXT_ARRAY}."
        )
    if not datasets and (others := [f"{name}.npz" for name in found if name not in files]):
        left_out.append(f"{', '.join(others)} (not named after a dataset)")
    if not methods:
        left_out.append(f"{', '.join(name for name in METHODS if name not in able)} (they need images)")
    if not seeds:
        left_out.append(f"seeds {', '.join(str(s) for s in SEEDS if s != DRAW)} (the features are of one draw)")
    return kept, "; ".join(left_out)


def _check_grid(
    protocol: str, models: Sequence[str], methods: Sequence[str], seeds: Sequence[int], able: list[str]
) -> None:
    """ZooError for what no file allows."""
    if protocol != "few-shot":
        raise ZooError("--features runs the few-shot protocol only.")
    if not models:
        raise ZooError("--features needs the model whose CLIP made them, such as --models dcp_vitb32.")
    for method in methods:
        if method in METHODS and method not in able:
            raise ZooError(f"{method} needs images, not only features: with --features choose from {', '.join(able)}.")
    if set(seeds) - {DRAW}:
        raise ZooError(f"The features are of one draw of the training images: pass --seeds {DRAW}, or omit --seeds.")


def array_names(folder: Path, dataset: str) -> set[str]:
    """The names of the arrays of a dataset; ZooError for a file that is missing, cannot be read or lacks the test."""
    path = folder / f"{dataset}.npz"
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in folder.glob("*.npz"))) or "no .npz files"
        raise ZooError(f"There is no file {path}: {folder} has {found}.")
    try:
        with zipfile.ZipFile(path) as file:
            names = {name.removesuffix(".npy") for name in file.namelist()}
    except (OSError, zipfile.BadZipFile) as error:
        raise ZooError(f"{path} cannot be read: {error}.") from error
    for name in ("classnames", "test_vector", "test_label"):
        if name not in names:
            raise ZooError(f"{path} has no {name}: it has {', '.join(sorted(names))}.")
    return names


def lacking_array(trial: Trial, names: set[str]) -> str:
    """An array that a trial needs and does not have, or ""."""
    reads_names = METHODS[trial.method].text and getattr(trial.recipe, "text", True)
    needed = [TEXT_ARRAY] if reads_names else []
    needed += [f"train{trial.shots}_{kind}" for kind in ("vector", "label")] if trial.shots else []
    return next((name for name in needed if name not in names), "")
