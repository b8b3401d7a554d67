"""`dcp-zoo classes`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import output
from dcp_zoo.data import Item, check_images, load_image
from dcp_zoo.data.find import Found, find_images
from dcp_zoo.data.seen import note_images
from dcp_zoo.data.unreadable import LEAVE_OUT
from dcp_zoo.errors import ZooError
from dcp_zoo.model.config import alone_in, check_free

if TYPE_CHECKING:
    from dcp_zoo.model.head import Head

HeadToChange = Annotated[str, Argument(metavar="HEAD", help=opt.HEAD, autocompletion=opt.heads_like)]
Images = Annotated[list[str] | None, Argument(metavar="IMAGES", help="With --add: images, files or folders.")]
LOST = "The stored accuracy no longer applies: dcp-zoo eval PHOTOS --head {0} measures it."
KEPT = "CLIP goes on reading the old name: the predictions, the accuracy and the rejection threshold stay."


def classes(
    command: Context,
    head: HeadToChange,
    output_dir: opt.Output,
    images: Images = None,
    added: str | None = Option(None, "--add", metavar="NAME", help="Add a class, or more IMAGES to one it has."),
    renamed: tuple[str, str] | None = Option(None, "--rename", metavar="OLD NEW", help="Rename a class."),
    removed: str | None = Option(None, "--remove", metavar="NAME", help="Remove a class."),
    overwrite: opt.Overwrite = False,
) -> None:
    """Add a class by a few images, rename or remove one, without training.

    Other logits and the rejection threshold stay. After --rename so does the accuracy, as CLIP goes on reading
    the old name; otherwise it is removed, and the command says how to measure it.

    [dim]dcp-zoo classes my_head --add zebra ZEBRAS --output bigger_head[/]
    [dim]dcp-zoo classes my_head --rename tulipe tulip --output english_head[/]
    [dim]dcp-zoo classes my_head --remove tulip --output smaller_head[/]
    """
    if sum(change is not None for change in (added, renamed, removed)) != 1:
        raise ZooError("Pass one change: --add NAME IMAGES, --rename OLD NEW, or --remove NAME.")
    if bool(images) != (added is not None):
        raise ZooError("--add needs images of the class, files or folders; --rename and --remove take none.")
    found = find_images(images) if images else []
    name = opt.head_name(head)
    command.with_resource(alone_in(output_dir))  # until the command ends: what it reads there and changes is one head
    check_free(output_dir, overwrite)
    from dcp_zoo.api.functions import as_model

    model = as_model(name, "cpu" if added is None else "auto")
    if added is not None:
        done, note = _add(model, added, found, head, output_dir), LOST
    elif renamed is not None:
        model.rename_class(_of(model, renamed[0]), renamed[1])
        done, note = "{} is now {}".format(*renamed), KEPT
    else:
        model.remove_class(_of(model, str(removed)))
        done, note = f"{removed} removed", LOST
    model.save_pretrained(output_dir)
    output.print(f"{done}: {model.num_classes} classes. {note.format(output_dir)}", soft_wrap=True, markup=False)
    output.print(f"Saved in {output_dir}.", markup=False)


def _of(model: "Head", name: str) -> str | int:
    """A class by its name, or if none has this name by a position."""
    return int(name) if name.isdecimal() and name not in model.classnames else name


def _add(model: "Head", name: str, found: Sequence[Found], head: str, output_dir: Path) -> str:
    from dcp_zoo.api.functions import pixels_of

    exists = name in model.classnames
    known = model.class_images.get(name) if exists else 0
    if exists and not known:
        instead = f"train one on images of all classes: dcp-zoo train PHOTOS --output {output_dir}"
        raise ZooError(f"{head} does not store how many images of {name} it has seen, to add some. Instead, {instead}")
    items = [Item(image.path, image.name, 0) for image in found]
    check_images(items, advice=LEAVE_OUT, read=load_image)
    model.add_class(name, pixels_of(model, items), known or 0)
    note_images(model.info, items)
    return f"{len(found)} images added to the {known} of {name}" if exists else f"{name} added, by {len(found)} images"
