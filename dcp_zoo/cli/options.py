"""Options that several commands share, and the one way to change a recipe: --set."""

import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from typer.core import TyperCommand

from dcp_zoo.errors import ZooError, nearest
from dcp_zoo.model.config import CONFIG_NAME
from dcp_zoo.training.recipes import Recipe
from dcp_zoo.zoo.registry import is_model, list_models, list_pretrained

Model = Annotated[str, typer.Option(help="A model, such as dcp_vitb16 or dcp_mini; see `dcp-zoo list`.")]
Dataset = Annotated[
    str,
    typer.Option(
        help="One of the 11 datasets, `folder` (one folder per class), `digits`, hf://datasets/ORG/NAME or wds://PATH."
    ),
]
DataRoot = Annotated[
    Path | None, typer.Option(help="Folder that holds the datasets in CoOp's layout, or the folder dataset itself.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")]
Precision = Annotated[str, typer.Option(help="float32, bfloat16 or float16 (autocast over float32 parameters).")]
Workers = Annotated[int, typer.Option(help="Processes that decode images; 0 decodes in this one.")]
BatchSize = Annotated[int, typer.Option(help="Images per batch. With --context batch it changes the answers.")]
Context = Annotated[
    str | None,
    typer.Option(help="calibrated (the default where a head has it), batch (as in the paper) or sample (each alone)."),
]


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
        hint = nearest_hint(head, [*folders, *list_pretrained(), *list_models()])
        raise ZooError(f"{head!r} is no checkpoint folder here and no head of the zoo.{hint} All: dcp-zoo list.")
    return head


def nearest_hint(name: str, valid: Iterable[str]) -> str:
    """The part of an error message that names what `name` may have been meant for."""
    close = nearest(name, valid)
    return f" Nearest: {', '.join(close)}." if close else ""


def class_list(classes: str | None) -> list[str] | None:
    """The names of a --classes with commas; None, the head's own, where it is not given."""
    return [name.strip() for name in classes.split(",")] if classes else None


# -------------------------------------------------------------------------------------------------- changes of a recipe

FREE_TEXT = {  # parts whose values may have commas in them
    part.name
    for part in fields(Recipe)
    if str in (kind := get_type_hints(Recipe)[part.name], *get_args(kind)) and not part.metadata["choices"]
}


def parse_changes(settings: Iterable[str]) -> dict[str, list[Any]]:
    """The values of all `--set NAME=VALUE[,VALUE]`: JSON, or else text. The option given again adds values."""
    changes: dict[str, list[Any]] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if not (name and text):
            raise ZooError(f"--set takes NAME=VALUE, such as depth=3; not {setting!r}.")
        values = [text] if name in FREE_TEXT else text.split(",")
        changes.setdefault(name, []).extend(_value(value.strip()) for value in values)
    return changes


def single_values(changes: dict[str, list[Any]]) -> dict[str, Any]:
    """The changes of one run; ZooError where a part has several values."""
    for name, values in changes.items():
        if len(values) > 1:
            raise ZooError(f"--set {name} has {len(values)} values: one run takes one, dcp-zoo benchmark runs a grid.")
    return {name: value for name, (value,) in changes.items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def as_text(value: Any) -> str:
    """A value as --set and YAML take it."""
    return value if isinstance(value, str) else json.dumps(value)


def recipe_parts() -> str:
    """DCP's recipe for a help text: each part with its default, its help and its choices."""
    lines = []
    for part in fields(Recipe):
        choices = f"; one of {', '.join(part.metadata['choices'])}" if part.metadata["choices"] else ""
        lines.append(f"- [bold]{part.name}[/] ({as_text(part.default)}): {part.metadata['help']}{choices}")
    title = "Parts of the recipe and their defaults; dcp-zoo info MODEL shows what a model changes of them:"
    return "\n\n".join([title, "\n".join(lines)])


class RecipeCommand(TyperCommand):
    """A command with --set: an option such as --epochs 50 gets told how a part of the recipe is set."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for arg, following in zip(args, [*args[1:], "--"], strict=True):
            option, _, value = arg.partition("=")
            part = option.removeprefix("--").replace("-", "_")
            if option.startswith("--") and part in Recipe.__dataclass_fields__:
                value = value or ("VALUE" if following.startswith("--") else following)
                raise ZooError(f"There is no option {option}: it is a part of the recipe, use --set {part}={value}")
        return super().parse_args(ctx, args)
