"""`dcp-zoo fit-text-probe` and `dcp-zoo classes`."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Context, Option

from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import log, output, progress_bar
from dcp_zoo.cli.evaluate import TEST, UNKNOWN, new_images, trained_on
from dcp_zoo.data import Item, check_images, is_own, load_image, load_labelled, training_split
from dcp_zoo.data.find import Found, find_images
from dcp_zoo.data.seen import note_images
from dcp_zoo.data.splits import all_for_training, check_same_classes
from dcp_zoo.errors import ZooError
from dcp_zoo.fields import Values
from dcp_zoo.model.config import alone_in, check_free
from dcp_zoo.threads import use_threads
from dcp_zoo.training.methods.table import METHODS
from dcp_zoo.zoo.resolve import name_of

if TYPE_CHECKING:
    from dcp_zoo.model.head import Head

HeadToChange = Annotated[str, Argument(metavar="HEAD", help=opt.HEAD, autocompletion=opt.heads_like)]
Images = Annotated[list[str] | None, Argument(metavar="IMAGES", help="With --add: images, files or folders.")]
LOST = "The stored accuracy no longer applies: dcp-zoo fit-text-probe PHOTOS --head {0} --output OTHER measures it."
KEPT = "CLIP goes on reading the old name: the predictions, the accuracy and the rejection threshold stay."


def fit_text_probe(
    command: Context,
    head: opt.HeadName,
    output_dir: opt.Output,
    photos: opt.Photos = None,
    labels: opt.Labels = None,
    dataset: opt.Dataset = None,
    data_root: opt.DataRoot = None,
    shots: int | None = Option(None, min=1, help="Images per class, at most. Default: all of your own, or the head's."),
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    overwrite: opt.Overwrite = False,
) -> None:
    """Give a head a text probe, a classifier on its image features. Prompts are not trained.

    It needs labelled images of the head's classes, by default those that it was trained on. Some of your own are held
    out to measure the accuracy; then the probe is refitted on all, unless you pass --shots. It calibrates the
    probabilities, sets the threshold for `predict --reject`, and, with most methods, allows new classes by images.

    [dim]dcp-zoo fit-text-probe --head dcp_mini.caltech101-16shot --data-root DATA --output better[/]
    [dim]dcp-zoo fit-text-probe MY_PHOTOS --head converted --output better[/]
    """
    dataset, data_root = opt.data_source(photos, dataset, data_root, labels)
    model = _load(command, head, output_dir, overwrite, device)
    from dcp_zoo.training import run
    from dcp_zoo.training.evaluation import measure, measurement
    from dcp_zoo.training.sources import image_source
    from dcp_zoo.training.state import remove_state

    use_threads(threads)
    dataset = dataset or trained_on(head, model, data_root)
    share, alone = model.info.get("test_share"), model.method in METHODS and not METHODS[model.method].trains
    if alone:  # nothing of it but its text probe has seen images
        share = share or None
    split = training_split(load_labelled(dataset, data_root, labels), share)
    check_same_classes(str(data_root or dataset), split.classnames, head, model.classnames)
    own, seed, names = is_own(dataset), model.info.get("seed", 1), model.classnames
    if own:
        check_images(split.items)
        if split.note:
            log(split.note)
    refit = own and split.held_out and shots is None
    shots = shots or (None if own else model.info.get("shots"))
    run.add_probe(model, split, shots, seed, progress_bar)
    result: Values = {}
    if own and (test := new_images(split.test, model.info, head)):
        metrics, evaluation = measure(model, image_source(model.frozen, test, progress=progress_bar))
        result = measurement(metrics, evaluation)
        output.print(f"[bold]{TEST}: {evaluation.accuracy}[/]")
        if not alone and not model.info.get("image_hashes") and model.info.get("split_sha256") != split.sha256:
            log(UNKNOWN.format(head))
    if refit:
        split = all_for_training(split)
        run.add_probe(model, split, None, seed, progress_bar)
        model.info["test_share"] = 0.0
    if own:
        counts = Counter(item.label for item in split.train)
        model.info["class_images"] = {split.classnames[i]: min(shots or n, n) for i, n in counts.items()}
    model.info |= result
    model.set_classnames(names)  # in their order, which is that of a FewShotClassifier's labels
    model.save_pretrained(output_dir)
    remove_state(output_dir)
    log(f"Fitted on {len(split.train):,} images of {model.num_classes} classes.")
    where = f" --data-root {data_root}" if data_root else ""
    hint = "" if result else f" Measure it: dcp-zoo eval --head {name_of(output_dir)}{where}"
    output.print(f"Saved in {output_dir}.{hint}")


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
    model = _load(command, head, output_dir, overwrite, "cpu" if added is None else "auto")
    if added is not None:
        done, note = _add(model, added, found, head, output_dir), LOST
    elif renamed is not None:
        done, note = _rename(model, *renamed), KEPT
    else:
        model.remove_class(str(removed))
        (model.info.get("class_images") or {}).pop(removed, None)
        done, note = f"{removed} removed", LOST
    model.save_pretrained(output_dir)
    output.print(f"{done}: {model.num_classes} classes. {note.format(output_dir)}", soft_wrap=True)
    output.print(f"Saved in {output_dir}.")


def _add(model: "Head", name: str, found: Sequence[Found], head: str, output_dir: Path) -> str:
    import torch

    from dcp_zoo.zoo.factory import create_transform

    exists = name in model.classnames
    counts: Values = model.info.get("class_images") or dict.fromkeys(model.classnames, model.info.get("shots"))
    if exists and not counts.get(name):
        instead = f"with images of all classes: dcp-zoo fit-text-probe PHOTOS --head {head} --output {output_dir}"
        raise ZooError(f"{head} does not store how many images of {name} it has seen, to add some. Instead, {instead}")
    known, transform = counts[name] if exists else 0, create_transform(model)
    model.add_class(name, torch.stack([transform(load_image(image.path)) for image in found]), known)
    model.info["class_images"] = counts | {name: known + len(found)}
    note_images(model.info, [Item(image.path, image.name, 0) for image in found])
    return f"{len(found)} images added to the {known} of {name}" if exists else f"{name} added, by {len(found)} images"


def _rename(model: "Head", name: str, new: str) -> str:
    model.rename_class(name, new)
    for key in ("class_images", "labels"):  # labels: pairs, those of a FewShotClassifier
        if stored := dict(model.info.get(key) or ()):
            changed = {new if known == name else known: value for known, value in stored.items()}
            model.info[key] = changed if key == "class_images" else [list(pair) for pair in changed.items()]
    return f"{name} is now {new}"


def _load(command: Context, head: str, output_dir: Path, overwrite: bool, device: str) -> "Head":
    """The head, once it is clear that the output can be written: until the command ends, others are kept from its
    folder, as what the command reads there and changes is the same head."""
    from dcp_zoo.api.functions import as_model

    name = opt.head_name(head)
    command.with_resource(alone_in(output_dir))
    check_free(output_dir, overwrite)
    return as_model(name, device)
