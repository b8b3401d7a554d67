"""Results of others for the leaderboard: what they must say, and what of it can be measured here. See
`python benchmarks/submit.py --help`."""

import csv
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from typer import Argument, Typer

from dcp_zoo.cli import main
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import output, progress_bar
from dcp_zoo.cli.heads import test_images, trained_on
from dcp_zoo.data import list_datasets, load_labelled
from dcp_zoo.data.splits import split_sha256
from dcp_zoo.errors import ZooError, as_zoo_error
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.loader import ImageLoader
from dcp_zoo.features.photos import Photos
from dcp_zoo.fields import Checked, Values, check, problems
from dcp_zoo.files import read_plain
from dcp_zoo.heads.config import PERCENT, is_checkpoint
from dcp_zoo.prediction.heads import loaded, outputs_of_loader
from dcp_zoo.release import holds
from dcp_zoo.training.evaluation import top1
from dcp_zoo.training.recipes import CROSS_VALIDATION, VALIDATION

app = Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)
SUBMISSION = "submission.yaml"


@dataclass(frozen=True)
class Submission(Checked):
    """One accuracy on one dataset."""

    by: str  # who submits it
    where: str  # where the head or the code is: a Hub repo or a page
    method: str
    reference: str  # the paper or page that describes it
    model: str  # the CLIP, such as ViT-B-16 openai
    pretraining_data: str  # what data CLIP saw, and whether it may contain the dataset's images
    dataset: Annotated[str, {"choices": list_datasets()}]
    shots: Annotated[int, {"min": 1}]
    seeds: list[int]  # of the few-shot draws
    split_sha256: str  # as dcp-zoo data check shows
    recipe: dict[str, Any]
    selection: Annotated[str, {"choices": ("none", VALIDATION, CROSS_VALIDATION)}]
    test_images_used: Annotated[bool, {"choices": (False,)}]  # or their statistics, in training or selection
    test_time_optimisation: Annotated[bool, {"choices": (False,)}]  # any change of weights while testing
    deterministic: Annotated[bool, {"choices": (True,)}]  # the same images give the same answers
    license: str  # of the weights or the code
    reported: Annotated[float, PERCENT]  # top-1, as its source states it
    measured: Annotated[float | None, PERCENT] = None  # top-1, as this script measured it


def read_submissions(path: Path) -> list[Submission]:
    """Those of a `submission.yaml`, or of a .csv with a row for each and values as JSON, as `real_table.py`
    writes it. ZooError for fields that are missing, unknown or wrong."""
    names = [part.name for part in fields(Submission)]
    with as_zoo_error(f"{path} cannot be read ({{}}). It needs the fields {', '.join(names)}.", Exception):
        if path.suffix == ".csv":
            rows = csv.DictReader(read_plain(path, 1_000_000).decode().splitlines())
            found = [{name: json.loads(value) for name, value in row.items()} for row in rows] or [{}]
        else:
            found = [yaml.safe_load(read_plain(path, 100_000))]
    return [_checked(f"{path}, row {i}" if len(found) > 1 else str(path), values) for i, values in enumerate(found, 1)]


def _checked(where: str, values: Any) -> Submission:
    if isinstance(values, dict):  # empty ones are missing
        names = [part.name for part in fields(Submission)]
        values = dict.fromkeys(names) | {name: value for name, value in values.items() if value not in ("", [])}
    check(where, problems(values, Submission))
    submission = Submission(**values)
    if not re.fullmatch("[0-9a-f]{64}", submission.split_sha256):
        raise ZooError(f"{where}: split_sha256 must be 64 hexadecimal digits, as dcp-zoo data check shows them.")
    if submission.measured is not None:
        raise ZooError(f"{where} must not state `measured`: this command measures it.")
    if submission.split_sha256 != (split_sha256(submission.dataset) or submission.split_sha256):
        raise ZooError(f"{where}: split_sha256 does not match CoOp's split of {submission.dataset}.")
    return submission


def check_submission(folder: Path, data_root: Path | None, device: str = "auto") -> Submission:
    """The submission in a folder's `submission.yaml`, with `measured` if the folder holds a checkpoint.
    ZooError as of `read_submissions`, and for an accuracy that is not what is reported."""
    (submission,) = read_submissions(folder / SUBMISSION)
    if not is_checkpoint(folder):
        return submission
    model = loaded(f"local-dir:{folder}", device)
    name = str(folder)
    check_same(submission, model.info, folder)
    split = load_labelled(trained_on(name, model, data_root), data_root)
    items = test_images(split, model, name, True)
    images = ImageLoader(Photos(items), FeatureExtractor(model.frozen, progress=progress_bar))
    measured = top1(torch.from_numpy(outputs_of_loader(model, images, 1).logits), images.labels)
    if not holds(submission.reported, measured):
        raise ZooError(f"{folder} reports {submission.reported:.2f} %, but {measured:.2f} % was measured here.")
    return replace(submission, measured=measured)


def check_same(submission: Submission, info: Values, folder: Path) -> None:
    """ZooError unless the head was trained as the submission says."""
    said = {name: [getattr(submission, name)] for name in ("dataset", "shots", "split_sha256")}
    for name, values in (said | {"seed": submission.seeds}).items():
        if info.get(name) not in values:
            listed = ", ".join(map(str, values))
            raise ZooError(f"{SUBMISSION} says {name}: {listed}, but the head in {folder} has {info.get(name)}.")


@app.command(cls=opt.Command)
def submit(
    folder: Annotated[
        Path, Argument(metavar="FOLDER", help="With submission.yaml, and the head if there is one; or a .csv file.")
    ],
    data_root: opt.DataRoot = None,
    device: opt.Device = "auto",
) -> None:
    """Check a leaderboard submission against the rules, measure its head, and print the row to add.

    [dim]python benchmarks/submit.py MY_RESULT --data-root DATA[/]
    """
    from_table = folder.suffix == ".csv"
    rows = read_submissions(folder) if from_table else [check_submission(folder, data_root, device)]
    print(json.dumps([asdict(row) for row in rows] if from_table else asdict(rows[0]), indent=1))
    here = any(row.measured is not None for row in rows)
    state = "was measured here" if here else f"was not measured here: {folder} has no checkpoint"
    output.print(f"Admitted, {len(rows)}; accuracy {state}. Add to benchmarks/leaderboard in a pull request.")


if __name__ == "__main__":
    main(app)
