"""A checkpoint of the DCP authors' released code (CMPA) to a checkpoint folder, see `python hub/convert.py --help`."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from dcp_zoo.cli import main
from dcp_zoo.cli.console import output, progress_bar
from dcp_zoo.cli.options import Command, Device, Output, Overwrite
from dcp_zoo.data import Item
from dcp_zoo.data.find import find_images
from dcp_zoo.data.readers import read_classnames
from dcp_zoo.training.device import pick_device
from dcp_zoo.training.methods.dcp import round_and_store_stats
from dcp_zoo.training.run import check_free
from dcp_zoo.training.sources import image_source
from dcp_zoo.zoo.convert import convert_cmpa_checkpoint

app = Typer(rich_markup_mode="rich", pretty_exceptions_enable=False)


@app.command(cls=Command)
def convert(
    path: Annotated[Path, Argument(metavar="FILE", help="A file model.pth.tar-N of the authors' code (CMPA).")],
    output_dir: Output,
    model: Annotated[str, Option(help="The model whose CLIP it was trained on, such as dcp_vitb16.")],
    classnames: Annotated[Path, Option(help="Names in label order: one per line, `wnid name` lines or a JSON list.")],
    images: Annotated[
        Path | None, Option(help="Folder of the training images, for the stored prompt statistics.")
    ] = None,
    depth: Annotated[int, Option(help="Coupled blocks it was trained with; not stored in the file.")] = 9,
    pooling: Annotated[str, Option(help="Pooling it was trained with: mean, max or first.")] = "mean",
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint of the DCP authors' released code (CMPA). No code in the file is executed.

    [dim]python hub/convert.py model.pth.tar-20 --model dcp_vitb16 --classnames names.txt --output my_head[/]
    """
    check_free(output_dir, overwrite)
    names = read_classnames(classnames)
    dcp = convert_cmpa_checkpoint(path, classnames=names, model=model, depth=depth, pooling=pooling)
    dcp.to(pick_device(device))
    if images is not None:
        items = [Item(image.path, image.name, 0) for image in find_images([str(images)])]
        round_and_store_stats(dcp, image_source(dcp.encoder, items, progress=progress_bar))
    dcp.save_pretrained(output_dir)
    hint = "" if images else " It has no stored statistics: logits depend on the batch. Pass --images to store them."
    output.print(f"Saved in {output_dir}.{hint}")


if __name__ == "__main__":
    main(app)
