"""Results of others for the leaderboard: what they must say, and what of it can be measured here. Needs pydantic."""

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dcp_zoo.data import list_datasets, packaged
from dcp_zoo.errors import ZooError
from dcp_zoo.model.config import is_checkpoint
from dcp_zoo.release.publish import Claim, measured
from dcp_zoo.zoo.factory import create_model

SUBMISSION = "submission.yaml"
Text = Annotated[str, Field(min_length=1)]
Percent = Annotated[float, Field(ge=0, le=100)]


class Submission(BaseModel):
    """One accuracy on one dataset. Fields that nobody defined are an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    by: Text = Field(description="who submits it")
    where: Text = Field(description="where the head or the code is: a Hub repo or a page")
    method: Text = Field(description="its name")
    reference: Text = Field(description="the paper or page that describes it")
    model: Text = Field(description="the CLIP, such as ViT-B-16 openai")
    pretraining_data: Text = Field(description="what data CLIP saw, and whether it may contain the dataset's images")
    dataset: Text = Field(description="one of the 11")
    shots: int = Field(ge=1, description="training images per class")
    seeds: list[int] = Field(min_length=1, description="of the few-shot draws")
    split_sha256: str = Field(pattern="^[0-9a-f]{64}$", description="of the split, as dcp-zoo data check shows")
    recipe: dict[str, Any] = Field(description="hyperparameters")
    selection: Literal["none", "few-shot validation", "cross-validation"] = Field(
        description="what hyperparameters were chosen on"
    )
    test_images_used: Literal[False] = Field(description="test images, or their statistics, in training or selection")
    test_time_optimisation: Literal[False] = Field(description="any change of weights while testing")
    deterministic: Literal[True] = Field(description="the same images give the same answers")
    license: Text = Field(description="of the weights or the code")
    reported: Percent = Field(description="top-1 in percent, as its source states it")
    measured: Percent | None = Field(default=None, description="top-1 as dcp-zoo submit measured it")


def read_submission(folder: Path) -> Submission:
    """The submission in a folder's `submission.yaml`; ZooError names every field that is wrong."""
    path = folder / SUBMISSION
    try:
        found = Submission.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError) as error:
        names = ", ".join(Submission.model_fields)
        raise ZooError(f"{path} cannot be read ({error}). It needs the fields {names}.") from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or SUBMISSION}: {e['msg']}" for e in error.errors()]
        raise ZooError(f"{path} is not a submission. {'; '.join(problems)}.") from error
    if found.dataset not in list_datasets():
        raise ZooError(f"{path}: the dataset {found.dataset!r} is none of {', '.join(list_datasets())}.")
    return found


def check_submission(folder: Path, data_root: Path | None, **options: Any) -> Submission:
    """The submission, with `measured` if the folder holds a checkpoint; ZooError if that is not what is reported."""
    submission = read_submission(folder)
    if submission.measured is not None:
        raise ZooError(f"{folder / SUBMISSION} must not state `measured`: dcp-zoo submit measures it.")
    if submission.split_sha256 != (packaged.split_sha256(submission.dataset) or submission.split_sha256):
        raise ZooError(f"{folder / SUBMISSION}: split_sha256 does not match CoOp's split of {submission.dataset}.")
    if not is_checkpoint(folder):
        return submission
    name = f"local-dir:{folder}"
    found = measured(name, create_model(name, True), data_root, **options)["stored"]
    if not Claim(name, "stored", submission.reported, found).holds:
        raise ZooError(f"{folder} reports {submission.reported:.2f} %, but {found:.2f} % was measured here.")
    return submission.model_copy(update={"measured": found})
