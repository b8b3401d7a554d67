"""`dcp-zoo classes add`, `rename` and `remove`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dcp_zoo.cli.console import output
from dcp_zoo.cli.options import Device, HeadName, Output, Overwrite, check_output, head_name
from dcp_zoo.data.find import find_images
from dcp_zoo.errors import ZooError

if TYPE_CHECKING:
    from dcp_zoo.model.head import Head

commands = typer.Typer(help="Add, rename and remove classes of a head, without training.", no_args_is_help=True)
Class = Annotated[str, typer.Argument(metavar="CLASS", help="The name of a class.")]
LOST = (
    "Its accuracy was measured and its threshold for --reject was set without this change, so both are gone. dcp-zoo "
    "fit-classifier PHOTOS --head {0} --output OTHER sets them again, from a folder with images of all its classes."
)


@commands.command()
def add(
    name: Class,
    images: Annotated[list[str], typer.Argument(metavar="IMAGES", help="Images of the class: files or folders.")],
    head: HeadName,
    output_dir: Output,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Add a class from a few images, or more images to a class that the head has.

    The scores of the other classes stay as they are. Accuracy and rejection threshold are lost; the command says how to
    get them back.

    [dim]dcp-zoo classes add zebra ZEBRAS --head my_head --output bigger_head[/]
    """
    found = find_images(images)
    model = _load(head, output_dir, overwrite, device)
    import torch

    from dcp_zoo.data import load_image
    from dcp_zoo.zoo.factory import create_transform

    exists = name in model.classnames
    counts: dict[str, Any] = model.info.get("class_images") or dict.fromkeys(model.classnames, model.info.get("shots"))
    if exists and not counts.get(name):
        raise ZooError(
            f"{head} does not store how many images of {name} it has seen, so that more cannot be added. With all "
            f"images of all classes: dcp-zoo fit-classifier PHOTOS --head {head} --output {output_dir}"
        )
    known, transform = counts[name] if exists else 0, create_transform(model)
    model.add_class(name, torch.stack([transform(load_image(image.path)) for image in found]), known)
    model.info["class_images"] = counts | {name: known + len(found)}
    done = f"{len(found)} images added to the {known} of {name}" if exists else f"{name} added, by {len(found)} images"
    _save(model, output_dir, done, LOST)


@commands.command()
def rename(
    name: Class,
    new: Annotated[str, typer.Argument(metavar="NEW_NAME", help="Its new name.")],
    head: HeadName,
    output_dir: Output,
    overwrite: Overwrite = False,
) -> None:
    """Rename a class. CLIP goes on reading the old name, so that every answer, the accuracy and the rejection threshold
    stay as they are.

    [dim]dcp-zoo classes rename tulipe tulip --head my_head --output english_head[/]
    """
    model = _load(head, output_dir, overwrite)
    model.rename_class(name, new)
    for key in ("class_images", "labels"):  # labels: pairs, those of a FewShotClassifier
        if stored := dict(model.info.get(key) or ()):
            changed = {new if known == name else known: value for known, value in stored.items()}
            model.info[key] = changed if key == "class_images" else [list(pair) for pair in changed.items()]
    kept = "CLIP goes on reading the old name: the answers, the accuracy and the rejection threshold stay."
    _save(model, output_dir, f"{name} is now {new}", kept)


@commands.command()
def remove(name: Class, head: HeadName, output_dir: Output, overwrite: Overwrite = False) -> None:
    """Remove a class. Accuracy and rejection threshold are lost; the command says how to get them back.

    [dim]dcp-zoo classes remove tulip --head my_head --output smaller_head[/]
    """
    model = _load(head, output_dir, overwrite)
    model.remove_class(name)
    (model.info.get("class_images") or {}).pop(name, None)
    _save(model, output_dir, f"{name} removed", LOST)


def _load(head: str, output_dir: Path, overwrite: bool, device: str = "cpu") -> "Head":
    """The head, once it is clear that the output can be written."""
    name = head_name(head)
    check_output(output_dir)
    from dcp_zoo.api.functions import as_model
    from dcp_zoo.training.run import check_free

    check_free(output_dir, overwrite)
    return as_model(name, device)


def _save(model: "Head", output_dir: Path, done: str, note: str) -> None:
    model.save_pretrained(output_dir)
    output.print(f"{done}: {model.num_classes} classes. {note.format(output_dir)}", soft_wrap=True)
    output.print(f"Saved in {output_dir}.")
