"""`dcp-zoo train`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dcp_zoo.cli.console import output, progress_bar, say
from dcp_zoo.cli.options import DataRoot, Dataset, Device, Model, Precision, Workers
from dcp_zoo.errors import ZooError
from dcp_zoo.train.distributed import is_main, process_group
from dcp_zoo.train.recipes import Recipe, read_recipe
from dcp_zoo.train.run import Run, default_recipe, fit_head, plan, train_head
from dcp_zoo.train.state import SAVE_EVERY
from dcp_zoo.zoo.registry import Head, get_head

RECIPE = "Recipe (default: the model's own)"


def part(help: str, *names: str) -> Any:
    """An option that changes one part of the recipe."""
    return typer.Option(*names, help=help, rich_help_panel=RECIPE)


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
    shots: Annotated[int, typer.Option(min=1, help="Training images a class.")] = 16,
    seed: Annotated[
        int, typer.Option(help="Draws the images, the prompts and their order. The paper uses 1, 2, 3.")
    ] = 1,
    device: Device = "auto",
    precision: Precision = "float32",
    workers: Workers = 0,
    memory: Annotated[
        str, typer.Option(help="fast keeps activations, low computes them twice, auto decides by size.")
    ] = "auto",
    clip_pretrained: Annotated[str | None, typer.Option(help="Another open_clip tag for CLIP's weights.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again, and replace what is in the output folder.")
    ] = False,
    save_every: Annotated[
        float, typer.Option(min=0, help="Seconds between two saved states, from which a stopped run goes on.")
    ] = SAVE_EVERY,
    recipe: Annotated[Path | None, part("YAML file with lines such as `epochs: 50`.")] = None,
    coupling: Annotated[str | None, part("bidirectional or text_to_vision.")] = None,
    n_ctx: Annotated[int | None, part("Prompt tokens in each tower.")] = None,
    depth: Annotated[int | None, part("Coupled blocks.")] = None,
    fusing: Annotated[str | None, part("mean, max or first.")] = None,
    shared: Annotated[bool | None, part("One CMPA for all blocks, or one each.", "--shared/--per-block")] = None,
    ctx_init: Annotated[str | None, part("Phrase that starts the text prompts, where n_ctx is at most 4.")] = None,
    optimizer: Annotated[str | None, part("sgd or adamw.")] = None,
    lr: Annotated[float | None, part("Peak learning rate.")] = None,
    warmup_lr: Annotated[float | None, part("Learning rate of the first epoch.")] = None,
    momentum: Annotated[float | None, part("Of sgd.")] = None,
    weight_decay: Annotated[float | None, part("L2 penalty (sgd) or decay (adamw).")] = None,
    batch_size: Annotated[int | None, part("Images a step, of all processes together.")] = None,
    epochs: Annotated[int | None, part("Length of the schedule.")] = None,
    stop_epoch: Annotated[int | None, part("End after this many epochs of the schedule.")] = None,
    augment: Annotated[str | None, part("crop-flip, flip or none.")] = None,
    eval_batch_size: Annotated[int | None, part("Images that share a context in the test without calibration.")] = None,
) -> None:
    """Train a head on a few images a class, test it, and save it with its calibrated context.

    A run that was stopped or killed goes on where it was when the same command is given again.
    [bold]torchrun --nproc-per-node 2 -m dcp_zoo train ...[/] shares every batch between two processes or GPUs.

    [dim]dcp-zoo train --dataset folder --data-root MY_PHOTOS --output my_head[/]
    [dim]dcp-zoo train --head dcp_vitb16.imagenet-16shot --data-root DATA[/]
    [dim]dcp-zoo train --model dcp_vitb16 --dataset caltech101 --data-root DATA --shots 16 --output head[/]
    """
    parts = {k: v for k, v in locals().items() if v is not None and k in Recipe.__dataclass_fields__}
    if head:
        chosen = _head_alone(ctx, head)
        model, dataset, shots, seed = chosen.model, chosen.dataset, chosen.shots, chosen.seed
    output_dir = output_dir or (Path(head) if head else None)
    if output_dir is None:
        raise ZooError("Say where the checkpoint goes: --output DIR.")
    base = default_recipe(model, dataset)
    base = base if recipe is None else read_recipe(recipe, base)
    with process_group(device) as device:
        run = plan(
            model,
            dataset,
            data_root,
            shots,
            seed,
            base.updated(parts),
            device,
            precision=precision,
            clip_pretrained=clip_pretrained,
            workers=workers,
            memory=memory,
        )
        if is_main():
            _train(run, output_dir, overwrite, save_every)
        else:
            fit_head(run, output_dir)


def _train(run: Run, output_dir: Path, overwrite: bool, save_every: float) -> None:
    if run.split.note:
        say(run.split.note)
    _, metrics = train_head(run, output_dir, overwrite=overwrite, save_every=save_every, progress=progress_bar, say=say)
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
