"""`dcp-zoo train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dcp_zoo.cli.console import log, output, progress_bar
from dcp_zoo.cli.interrupt import stop_after_step
from dcp_zoo.cli.options import DataRoot, Dataset, Device, Model, Precision, Workers, parse_changes, single_values
from dcp_zoo.errors import ZooError
from dcp_zoo.training.recipes import default_recipe, read_recipe
from dcp_zoo.zoo.registry import Head, get_head

RECIPE = "Recipe (default: the model's own)"


def train(
    ctx: typer.Context,
    output_dir: Annotated[
        Path | None, typer.Option("--output", help="Folder for the checkpoint; made if needed. Default: --head's name.")
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="A head of the zoo, such as dcp_vitb16.dtd-4shot: says model, dataset, shots and seed."),
    ] = None,
    model: Model = "dcp_mini",
    dataset: Dataset = "digits",
    data_root: DataRoot = None,
    shots: Annotated[int, typer.Option(min=1, help="Training images per class.")] = 16,
    seed: Annotated[
        int, typer.Option(help="Draws the images, the prompts and their order. The paper uses 1, 2, 3.")
    ] = 1,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Workers = 0,
    grad_checkpointing: Annotated[
        str,
        typer.Option(
            help="on recomputes activations in the backward pass, which saves memory and costs time; off keeps them; "
            "auto decides by their size."
        ),
    ] = "auto",
    clip_pretrained: Annotated[str | None, typer.Option(help="Another open_clip tag for CLIP's weights.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again, and replace what is in the output folder.")
    ] = False,
    save_every: Annotated[
        float, typer.Option(min=0, help="Seconds between two saved states, from which a stopped run resumes.")
    ] = 60,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with lines such as `epochs: 50`.", rich_help_panel=RECIPE)
    ] = None,
    changes: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change one part, listed below; may be repeated.",
            rich_help_panel=RECIPE,
        ),
    ] = [],  # noqa: B006
) -> None:
    """Train a head on a few images per class, test it, and save it with its calibrated context.

    The same command resumes a run that was stopped or killed.
    [bold]torchrun --nproc-per-node 2 -m dcp_zoo train ...[/] shares every batch between two processes or GPUs.

    [dim]dcp-zoo train --dataset folder --data-root MY_PHOTOS --output my_head[/]
    [dim]dcp-zoo train --head dcp_vitb16.imagenet-16shot --data-root DATA[/]
    [dim]dcp-zoo train --model dcp_vitb16 --dataset caltech101 --data-root DATA --output head --set epochs=50[/]
    """
    if head:
        chosen = _head_alone(ctx, head)
        model, dataset, shots, seed = chosen.model, chosen.dataset, chosen.shots, chosen.seed
    output_dir = output_dir or (Path(head) if head else None)
    if output_dir is None:
        raise ZooError("Say where the checkpoint goes: --output DIR.")
    base = default_recipe(model, dataset)
    base = base if recipe is None else read_recipe(recipe, base)
    numbers = base.updated(single_values(parse_changes(changes)), where="--set")
    from dcp_zoo.training.distributed import is_main, process_group
    from dcp_zoo.training.run import plan, train_head

    options = {"precision": precision, "clip_pretrained": clip_pretrained, "workers": workers}
    options |= {"grad_checkpointing": grad_checkpointing}
    with process_group(device) as device, stop_after_step(log) as stop:
        run = plan(model, dataset, data_root, shots, seed, numbers, device, **options)
        shown: dict[str, Any] = {"progress": progress_bar, "log": log} if is_main() else {}
        if is_main() and run.split.note:
            log(run.split.note)
        _, metrics = train_head(run, output_dir, overwrite=overwrite, save_every=save_every, stop=stop, **shown)
        if is_main():
            _show(metrics, output_dir)


def _show(metrics: dict[str, float], output_dir: Path) -> None:
    for name, value in metrics.items():
        context = name.removeprefix("top1_")
        output.print(f"test top-1, {context} context: {value:.2f} %", highlight=False)
    output.print(f"Saved in {output_dir}. Try it: dcp-zoo predict IMAGE --head {output_dir}", highlight=False)


def _head_alone(ctx: typer.Context, head: str) -> Head:
    """The head of a name; ZooError if the command line also says part of what the name says."""
    given = [
        f"--{name}"
        for name in ("model", "dataset", "shots", "seed")
        if getattr(ctx.get_parameter_source(name), "name", None) == "COMMANDLINE"
    ]
    if given:
        raise ZooError(f"--head {head} already says {', '.join(given)}: leave them out, or leave out --head.")
    return get_head(head)
