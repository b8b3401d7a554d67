"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer


def head_name(head: str) -> str:
    """What `create_model` takes for a --head: a checkpoint folder is named with `local-dir:`."""
    return f"local-dir:{head}" if Path(head).is_dir() else head


Model = Annotated[str, typer.Option(help="A model, such as dcp_vitb16 or dcp_mini; see `dcp-zoo list`.")]
Dataset = Annotated[str, typer.Option(help="One of the 11 data sets, `folder` (a folder per class) or `digits`.")]
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
