"""The folder that a training writes to: what is there already. Here without torch."""

from pathlib import Path

from dcp_zoo.errors import ZooError
from dcp_zoo.heads.config import CONFIG_NAME, WEIGHTS_NAME

STATE_NAME = "training.state"  # of a training that was stopped


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a checkpoint whose training is over."""
    any_file = (folder / WEIGHTS_NAME).exists() or (folder / CONFIG_NAME).exists()
    return any_file and not (folder / STATE_NAME).exists()


def check_free(output: Path, overwrite: bool, *, resumes: bool = False) -> None:
    """ZooError if the folder holds a finished checkpoint, or, unless the caller `resumes` it, a stopped
    training."""
    if overwrite:
        return
    advice = "choose another --output, or pass --overwrite"
    if is_finished(output):
        raise ZooError(f"{output} already holds a checkpoint: {advice}.")
    if not resumes and (output / STATE_NAME).exists():
        raise ZooError(f"{output} holds a stopped training, which can resume: {advice}.")
