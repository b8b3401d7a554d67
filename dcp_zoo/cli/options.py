"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from dcp_zoo.errors import ZooError, nearest
from dcp_zoo.model.checkpoint import CONFIG_NAME
from dcp_zoo.zoo.registry import is_model, list_models, list_pretrained


def head_name(head: str) -> str:
    """What `create_model` takes for a --head: a checkpoint folder is named with `local-dir:`.

    Raises:
        ZooError: no folder, no model or head of the zoo, and no place such as hf-hub:ORG/REPO.
    """
    path = Path(head)
    if path.is_dir():
        return f"local-dir:{head}"
    if ":" not in head and not is_model(head):
        folders = [str(config.parent) for config in path.parent.glob(f"*/{CONFIG_NAME}")]
        close = nearest(head, [*folders, *list_pretrained(), *list_models()])
        hint = f" Nearest: {', '.join(close)}." if close else ""
        raise ZooError(f"{head!r} is no checkpoint folder here and no head of the zoo.{hint} All: dcp-zoo list.")
    return head


def class_list(classes: str | None) -> list[str] | None:
    """The names of a --classes with commas; None, the head's own, where it is not given."""
    return [name.strip() for name in classes.split(",")] if classes else None


Model = Annotated[str, typer.Option(help="A model, such as dcp_vitb16 or dcp_mini; see `dcp-zoo list`.")]
Dataset = Annotated[
    str,
    typer.Option(
        help="One of the 11 data sets, `folder` (one a class), `digits`, hf://datasets/ORG/NAME or wds://PATH."
    ),
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Folder that holds the data sets in CoOp's layout, or the folder data set itself.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Precision = Annotated[str, typer.Option(help="float32, bfloat16 or float16 (autocast over float32 parameters).")]
Workers = Annotated[int, typer.Option(help="Processes that decode images; 0 decodes in this one.")]
BatchSize = Annotated[int, typer.Option(help="Images at once. With --context batch it changes the answers.")]
Context = Annotated[
    str | None,
    typer.Option(help="calibrated (the default where a head has it), batch (as in the paper) or sample (each alone)."),
]
