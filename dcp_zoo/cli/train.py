"""`dcp-zoo train`."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from dcp_zoo.cli.console import log, output, progress_bar, stop_after_step
from dcp_zoo.cli.options import (
    DataRoot,
    Dataset,
    DescriptionsFile,
    Device,
    Model,
    Photos,
    Precision,
    Report,
    Threads,
    Workers,
    check_output,
    check_report,
    data_source,
    parse_changes,
    single_values,
)
from dcp_zoo.cli.results import show_evaluation
from dcp_zoo.cli.threads import use_threads
from dcp_zoo.data import is_own
from dcp_zoo.data.class_file import read_descriptions
from dcp_zoo.errors import ZooError, check_choice
from dcp_zoo.training.methods.table import METHODS
from dcp_zoo.training.recipes import chosen_recipe
from dcp_zoo.zoo.registry import HeadEntry, get_head, is_model

DATASET_SHOTS = 16  # training images per class of a dataset
HEADS = tuple(name for name, method in METHODS.items() if method.linear)  # methods that can be a head
RECIPE = "Recipe (default: the model's)"


def train(
    ctx: typer.Context,
    photos: Photos = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output",
            help="Folder for the checkpoint; created if needed. Default: the name of --head, or of PHOTOS and _head.",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(help="A head of the zoo, such as dcp_vitb16.dtd-4shot; sets model, dataset, shots and seed."),
    ] = None,
    model: Model = "dcp_mini",
    method: Annotated[
        str,
        typer.Option(
            help="What learns from the images: dcp, or a baseline: gda takes seconds and learns from the image "
            f"features alone. One of {', '.join(HEADS)}."
        ),
    ] = "dcp",
    dataset: Dataset = None,
    data_root: DataRoot = None,
    descriptions: DescriptionsFile = None,
    shots: Annotated[
        int | None,
        typer.Option(min=1, help="Training images per class, at most. Default: all of your own images, otherwise 16."),
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Seed of the subset, the initial prompts and the image order. The paper uses 1, 2, 3.")
    ] = 1,
    test: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=0.9,
            help="Share of your own images held out to measure the accuracy; 0 trains on all. Default: 0.3, or your "
            "folder `test`.",
        ),
    ] = None,
    refit: Annotated[
        bool, typer.Option("--refit", help="After the accuracy is measured, train again on all images, and save that.")
    ] = False,
    report: Report = None,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Workers = 0,
    threads: Threads = None,
    grad_checkpointing: Annotated[
        str,
        typer.Option(
            help="on recomputes activations in the backward pass, which saves memory but takes time; off keeps them; "
            "auto decides by their size."
        ),
    ] = "auto",
    clip_pretrained: Annotated[str | None, typer.Option(help="Another open_clip tag for CLIP's weights.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again and replace the contents of the output folder.")
    ] = False,
    save_every: Annotated[
        float, typer.Option(min=0, help="Seconds between saves of the state, from which a stopped run resumes.")
    ] = 60,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="release|FILE",
            help="The authors' recipe, or a YAML file with lines such as `epochs: 50`.",
            rich_help_panel=RECIPE,
        ),
    ] = None,
    changes: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change a field of the recipe, listed below; may be repeated.",
            rich_help_panel=RECIPE,
        ),
    ] = [],  # noqa: B006
) -> None:
    """Train a head on a few images per class, test it, and save it with its stored statistics.

    Of your own images, 30 % of each class are held out for the test.
    The same command resumes a run that was stopped or killed.
    [bold]torchrun --nproc-per-node 2 -m dcp_zoo train ...[/] splits every batch over two processes or GPUs.

    [dim]dcp-zoo train MY_PHOTOS --output my_head[/]
    [dim]dcp-zoo train --head dcp_vitb16.imagenet-16shot --data-root DATA[/]
    [dim]dcp-zoo train --model dcp_vitb16 --dataset caltech101 --data-root DATA --output head --set epochs=50[/]
    """
    if head:
        chosen = _head_only(ctx, head)
        model, dataset, shots, seed = chosen.model, chosen.dataset, chosen.shots, chosen.seed
    dataset, data_root = data_source(photos, dataset, data_root)
    if dataset is None:
        _no_data(data_root)
    check_choice("method", method, HEADS)
    if method != "dcp" and (given := _given(ctx, "recipe", "save_every", "grad_checkpointing")):
        raise ZooError(f"{', '.join(given)} works with --method dcp only: omit it, or use --set.")
    output_dir = output_dir or _default_output(head, photos)
    shots = shots or (None if is_own(dataset) else DATASET_SHOTS)
    base, made = chosen_recipe(recipe, model, dataset), single_values(parse_changes(changes))
    updated = base.updated(made, where="--set") if method == "dcp" else base
    from dcp_zoo.training.distributed import is_main, process_group, world_size
    from dcp_zoo.training.run import plan, train_and_refit, train_head
    from dcp_zoo.training.state import never

    options: dict[str, Any] = {"precision": precision, "clip_pretrained": clip_pretrained, "workers": workers}
    options |= {"grad_checkpointing": grad_checkpointing}
    options |= {"descriptions": read_descriptions(descriptions) if descriptions else None}
    use_threads(threads)
    interruptible = stop_after_step(log) if method == "dcp" else nullcontext(never)
    with process_group(device) as device, interruptible as stop:
        if method != "dcp" and world_size() > 1:
            raise ZooError(f"--method {method} runs in one process: start it without torchrun.")
        if is_main():
            check_output(output_dir)
            if report:
                check_report(report)
        run = plan(model, dataset, data_root, shots, seed, updated, device, test, **options)
        if report and not run.split.test:
            raise ZooError("--report shows the mistakes on test images, and there are none: omit it or --test 0.")
        show = partial(show_evaluation, report=report, title=f"{output_dir} on {dataset}")
        display: dict[str, Any] = {"progress": progress_bar, "log": log, "show": show} if is_main() else {}
        if is_main() and run.split.note:
            log(run.split.note)
        if method != "dcp":
            from dcp_zoo.training.methods.heads import train_method

            train_method(method, run, made, output_dir, refit=refit, overwrite=overwrite, **display)
        else:
            work = train_and_refit if refit else train_head
            work(run, output_dir, overwrite=overwrite, save_every=save_every, stop=stop, **display)
        if is_main():
            output.print(f"Saved in {output_dir}. Try it: dcp-zoo predict IMAGE --head {output_dir}", highlight=False)


def _no_data(data_root: Path | None) -> NoReturn:
    """Raise ZooError with the two usual commands."""
    problem = f"--data-root {data_root} needs --dataset NAME" if data_root else "There is nothing to train on"
    own = data_root or "MY_PHOTOS"
    raise ZooError(
        f"{problem}. For your own images in one folder per class: dcp-zoo train {own} --output my_head. For one of the "
        "datasets: dcp-zoo train --dataset caltech101 --data-root DATA --output my_head."
    )


def _default_output(head: str | None, photos: str | None) -> Path:
    if head:
        return Path(head)
    if photos:
        return Path(f"{Path(photos).resolve().name}_head")
    raise ZooError("The checkpoint needs a folder: pass --output DIR.")


def _given(ctx: typer.Context, *names: str) -> list[str]:
    """Those of these options that are on the command line."""
    return [
        "PHOTOS" if name == "photos" else f"--{name.replace('_', '-')}"
        for name in names
        if getattr(ctx.get_parameter_source(name), "name", None) == "COMMANDLINE"
    ]


def _head_only(ctx: typer.Context, head: str) -> HeadEntry:
    """The head with this name; ZooError if the command line also sets something that the name determines."""
    given = _given(ctx, "photos", "model", "dataset", "shots", "seed")
    if given:
        raise ZooError(f"--head {head} already sets {', '.join(given)}: omit these options, or omit --head.")
    if not is_model(head) and (":" in head or Path(head).exists()):
        raise ZooError(
            f"--head names a head of the zoo to train, and {head} is a checkpoint. To train on your own images: "
            "dcp-zoo train MY_PHOTOS --output DIR."
        )
    return get_head(head)
