"""Options shared by several commands, and --set, which changes a recipe."""

import ast
import json
import os.path
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option
from typer.core import TyperCommand

from dcp_zoo.data import DATASETS
from dcp_zoo.data.readers import read_classnames
from dcp_zoo.errors import ZooError, check_choice, nearest_hint
from dcp_zoo.fields import Values
from dcp_zoo.tables import split_list
from dcp_zoo.training.methods.table import DCP_METHOD, METHODS
from dcp_zoo.training.recipes import BaseRecipe, Recipe
from dcp_zoo.zoo.registry import list_models, trained_heads
from dcp_zoo.zoo.specs import SIZES

Text = str | None
MODEL = "small, medium or large, or a model's name; see `dcp-zoo list`."
HEAD = "A head (dcp_mini.caltech101-16shot), a checkpoint folder, or hf-hub:ORG/REPO."


def model_names() -> list[str]:
    """For shell completion."""
    return [*SIZES, *list_models()]


Model = Annotated[str, Option(help=MODEL, autocompletion=model_names)]
HeadName = Annotated[str, Option("--head", help=HEAD, autocompletion=trained_heads)]
HeadNames = Annotated[
    list[str], Option("--head", help=f"{HEAD} A second one is compared.", autocompletion=trained_heads)
]
Photos = Annotated[Text, Argument(metavar="PHOTOS", help="Your images: a folder per class.")]
Labels = Annotated[
    list[Path] | None,
    Option(
        metavar="FILE",
        help="A CSV file with the columns file and class, in place of class folders. The images are in PHOTOS, next "
        "to this file, or in the current folder. May be repeated, as for corrections: of several classes of an "
        "image, the last one counts.",
    ),
]
GroupBy = Annotated[
    Text,
    Option(
        "--group-by",
        metavar="folder|REGEX",
        help="Which photographs were taken together: those in a folder below that of the class, or with the same match "
        "in their path. Default: near copies, and those of one camera within seconds.",
    ),
]
Images = Annotated[Text, Argument(metavar="PHOTOS", help="Your images: a folder per class. Or a dataset's name.")]
DataRoot = Annotated[Path | None, Option(help="Folder with the datasets; for `folder`, the dataset itself.")]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Precision = Annotated[
    str,
    Option(
        help="auto (bfloat16 for a full-size model on devices with native bfloat16, else float32), float32 (the "
        "reference), bfloat16, or float16.",
    ),
]
Classes = Annotated[Text, Option("--classes", help='Other names: cat,dog,"dandelion, yellow"; or a file of them.')]
Report = Annotated[
    Path | None, Option(help="Write a page that shows the mistakes.", metavar="FILE.html", dir_okay=False)
]
Agree = Annotated[bool, Option("--agree", help="Agree to the datasets' terms without being asked.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace existing output.")]
AsJson = Annotated[bool, Option("--json", help="Print JSON.")]
Port = Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")]
Host = Annotated[str, Option(help="Address to listen on; 0.0.0.0 accepts connections from other machines.")]


def class_list(classes: str | None) -> list[str] | None:
    """The names of a --classes, in a file or a list, see `split_list`; None, the head's, if it is not
    given."""
    if classes is None:
        return None
    if os.path.isfile(classes):  # noqa: PTH113  Path would raise for long texts
        return read_classnames(classes)
    if classes.lower().endswith((".txt", ".json")):
        raise ZooError(f"There is no file {classes}. --classes takes a file, or names separated by commas.")
    return split_list(classes)


def data_source(
    images: str | None, data_root: Path | None, labels: Sequence[Path] | None = None
) -> tuple[str | None, Path | None]:
    """The dataset that IMAGES name, `folder` for your own, and where it is: there, or in the data root.
    Without IMAGES those of the first labels file's folder, if any."""
    if images is None and labels:
        return "folder", data_root or labels[0].parent
    if images is None:
        return None, data_root
    is_folder = Path(images).is_dir()
    if images in DATASETS and (data_root or not is_folder):
        if labels:
            raise ZooError(f"--labels is for your own images: omit it, or {images}.")
        return images, data_root
    if is_folder and data_root:
        raise ZooError(f"{images} has your own images: omit --data-root, which is for datasets.")
    if is_folder:
        return "folder", Path(images)
    others = [name for name in DATASETS if name != "folder"]  # which stands for any folder
    raise ZooError(
        f"There is no folder {images}, and no dataset of this name.{nearest_hint(images, others)} Pass a folder with a "
        "folder per class, or a dataset."
    )


def parse_changes(settings: Iterable[str]) -> dict[str, list[Any]]:
    """The values of all `--set NAME=VALUE[,VALUE]`, see `parse_value`. Repeated names add values."""
    changes: dict[str, list[Any]] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if not (name and text):
            raise ZooError(f"--set takes NAME=VALUE, such as depth=3, not {setting!r}.")
        texts = [text] if name == "ctx_init" else text.split(",")  # a phrase may have commas
        changes.setdefault(name, []).extend(parse_value(value.strip()) for value in texts)
    return changes


def parse_value(text: str) -> Any:
    """A value as JSON or Python has it, or else the text."""
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError):
            return parse(text)
    return text


def single_values(changes: Mapping[str, Sequence[Any]]) -> Values:
    """The changes of a recipe; ZooError if one has several values."""
    for name, values in changes.items():
        if len(values) > 1:
            raise ZooError(f"--set {name} has {len(values)} values: pass one, or run a grid with dcp-zoo benchmark.")
    return {name: values[0] for name, values in changes.items()}


def as_text(value: object) -> str:
    """A value as accepted by --set."""
    return value if isinstance(value, str) else json.dumps(value)


def recipe_help(method: str = "") -> str:
    """The recipe of a method, by default DCP's, for a help text: each field with its default, help and
    limits."""
    recipe: type[BaseRecipe] = Recipe
    if method:
        check_choice("method", method, tuple(METHODS))
        recipe = METHODS[method].config
    lines = [f"Fields of the recipe of {method or DCP_METHOD} and their defaults:\n"]
    for field in fields(recipe):
        about = [field.metadata.get("help", "")]
        if field.metadata.get("choices"):
            about.append(f"one of {', '.join(field.metadata['choices'])}")
        for limit, words in {"min": "at least", "max": "at most"}.items():
            if limit in field.metadata:
                about.append(f"{words} {field.metadata[limit]}")
        lines.append(f"- [bold]{field.name}[/] ({as_text(field.default)}): {'; '.join(about)}")
    return "\n".join(lines)


class Command(TyperCommand):
    """A command whose help shows flags without Typer's <bool>, as they take no value, and of one with --method and
    --set the recipe of the method. One with --set answers --epochs with a hint to --set epochs=VALUE."""

    def get_params(self, ctx: Any) -> list[Any]:
        parameters: list[Any] = super().get_params(ctx)
        for parameter in parameters:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return parameters

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        declared = {name for parameter in self.params for name in parameter.opts}
        for arg in args:
            name = arg.partition("=")[0]
            field = name.removeprefix("--").replace("-", "_")
            is_option = name.startswith("--") and name not in declared
            if is_option and "--set" in declared and field in Recipe.__dataclass_fields__:
                raise ZooError(f"There is no option {name}, but a field of the recipe: --set {field}=VALUE.")
        if "--help" in args and {"--method", "--set"} <= declared:
            given, _, _ = self.make_parser(ctx).parse_args(list(args))
            self.epilog = recipe_help(given.get("method", ""))
        return super().parse_args(ctx, args)
