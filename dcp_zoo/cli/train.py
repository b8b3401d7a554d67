"""`dcp-zoo train`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from typer import Option

from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import log, output, progress_bar, rejection_note, resumable
from dcp_zoo.cli.heads import TEST, report_mistakes, show_evaluation
from dcp_zoo.data import is_user_data, load_for_training
from dcp_zoo.data.readers import read_descriptions
from dcp_zoo.data.unreadable import all_named
from dcp_zoo.errors import ZooError
from dcp_zoo.files import check_output, check_outside, check_writable
from dcp_zoo.heads.config import REFITTED
from dcp_zoo.promises import trust_note
from dcp_zoo.threads import use_threads
from dcp_zoo.training.folder import check_free
from dcp_zoo.training.methods.table import DCP_METHOD, DEFAULT_METHOD, METHODS
from dcp_zoo.zoo.registry import get_head
from dcp_zoo.zoo.resolve import name_of
from dcp_zoo.zoo.specs import MINIATURE_NOTE, get_spec

if TYPE_CHECKING:
    from dcp_zoo.heads.head import Head
    from dcp_zoo.training.evaluation import Evaluation
    from dcp_zoo.training.run import Run

REFIT = "After the accuracy is measured, the head is trained on all images and saved."
DATASET_SHOTS = 16  # training images per class of a dataset
SEED = 1  # unless another is given
RECIPE_PANEL = "Recipe (default: the method's)"


def train(
    photos: opt.Images = None,
    output_dir: Path | None = Option(
        None, "--output", help="Folder for the checkpoint. Default: --head, or PHOTOS_head."
    ),
    head: str | None = Option(None, help="A head of the zoo: sets method, model, dataset, shots and seed."),
    model: opt.Model = "dcp_mini",
    method: str | None = Option(
        None,
        help=f"{DEFAULT_METHOD} (a classifier on CLIP's features; the default), dcp (coupled prompts in both towers "
        f"plus text probe; takes longer), or another: {', '.join(METHODS)}. With --help: the fields of its recipe.",
    ),
    labels: opt.Labels = None,
    group_by: opt.GroupBy = None,
    data_root: opt.DataRoot = None,
    descriptions: Path | None = Option(None, metavar="FILE.json", help="Sentences for the class names, as in CuPL."),
    shots: int | None = Option(None, min=1, help="Images per class, at most. Default: all of your own, otherwise 16."),
    seed: int = Option(
        SEED, help="Seed of the subset, the initial prompts and the image order. The paper uses 1, 2, 3."
    ),
    test: float | None = Option(
        None, min=0, max=0.9, help="Share held out for testing. Default: folder `test`, or 0.3."
    ),
    refit: bool | None = Option(None, "--refit/--no-refit", help=f"{REFIT} Default: for your own images."),
    report: opt.Report = None,
    encoder: list[str] = Option((), help="Image model of timm to read beside CLIP; may be repeated."),
    device: opt.Device = "auto",
    precision: opt.Precision = "auto",
    skip_unreadable: bool = Option(False, "--skip-unreadable", help="Leave out images that cannot be read."),
    overwrite: bool = Option(False, "--overwrite", help="Start again and replace the contents of the output folder."),
    recipe: str | None = Option(
        None,
        metavar="release|paper",
        help="For dcp: release (as in the authors' code) or paper (the same with their paper's coupling).",
        rich_help_panel=RECIPE_PANEL,
    ),
    changes: list[str] = Option(
        (),
        "--set",
        metavar="NAME=VALUE",
        help="Change a field listed below; may be repeated.",
        rich_help_panel=RECIPE_PANEL,
    ),
) -> None:
    """Train a head on a few images per class, test it, and save it.

    The accuracy on your own images is measured by four folds, or with --test and for methods that train
    prompts, on a share that is held out; then the head is trained on all images and saved. Photographs that
    were taken together are never on both sides. Methods that train prompts resume after a stop or kill:
    repeat the command.

    [dim]dcp-zoo train MY_PHOTOS --output my_head[/]
    [dim]dcp-zoo train MY_PHOTOS --method dcp --output dcp_head[/]
    [dim]dcp-zoo train --head dcp_vitb16.imagenet-16shot --data-root DATA[/]
    [dim]dcp-zoo train caltech101 --data-root DATA --method dcp --set epochs=50[/]
    """
    if not output_dir:
        images = photos or (labels[0].with_suffix("") if labels else "")
        output_dir = Path(head or f"{Path(images).resolve().name}_head")
    if head:
        if photos or method or shots or model != "dcp_mini" or seed != SEED:
            raise ZooError(f"--head {head} already sets PHOTOS, --model, --method, --shots and --seed: omit these.")
        entry = get_head(head)
        method = DCP_METHOD
        model = entry.model
        shots = entry.shots
        seed = entry.seed
        dataset: str | None = entry.dataset
    else:
        dataset, data_root = opt.data_source(photos, data_root, labels)
    if dataset is None:
        raise ZooError("There is nothing to train on: dcp-zoo train PHOTOS, or train caltech101 --data-root DATA.")
    check_writable(output_dir)
    if dataset == "folder" and not labels:
        check_outside(output_dir, str(data_root))
    check_free(output_dir, overwrite, resumes=True)
    if report:
        check_output(report, overwrite, "--report")
    split = load_for_training(dataset, data_root, labels, test, skip_unreadable, group_by)
    from dcp_zoo.features.device import decoders, pick_device  # after the images are listed, as torch is slow
    from dcp_zoo.training.run import plan

    use_threads()
    run = plan(
        split,
        model,
        method or DEFAULT_METHOD,
        shots=shots or (None if is_user_data(dataset) else DATASET_SHOTS),
        seed=seed,
        recipe=recipe,
        changes=opt.single_values(opt.parse_changes(changes)),
        device=device,
        precision=precision,
        encoder=encoder,
        workers=decoders(pick_device(device), len(split.items)),
        descriptions=read_descriptions(descriptions) if descriptions else None,
        test_share=test,
    )
    trained = trained_head(run, output_dir, refit, report, overwrite)
    if trained.text_probe is not None and trained.cannot_reject:
        output.print("predict --reject will be refused: it needs 20 images of classes with two or more.")
    note = rejection_note(trained.info)
    if note:
        output.print(f"With predict --reject, {note}", soft_wrap=True)
    trust = trust_note(trained.info)
    if trust:
        output.print(trust, soft_wrap=True)
    name = shlex.quote(str(name_of(output_dir)))
    output.print(f"Saved in {output_dir}. Try it: dcp-zoo predict IMAGE --head {name}", markup=False)
    if not get_spec(model).clip:
        log(MINIATURE_NOTE)


def trained_head(run: "Run", folder: Path, refit: bool | None, report: Path | None, overwrite: bool) -> "Head":
    """Train, test and save a head, with a page of its mistakes in `report`."""
    from dcp_zoo.features.cache import users_cache
    from dcp_zoo.training.run import RunOptions, hold_out, train_head, train_on_all

    split = run.split
    holds_out = run.is_own and not split.has_parts and run.test_share != 0  # test images are chosen here
    if refit is None:
        refit = holds_out and run.shots is None
    log(f"{split.note} {REFIT if refit else ''}".strip())

    def show(evaluation: "Evaluation") -> None:
        if report:
            report_mistakes(evaluation, report, f"{folder} on {split.name}")
        show_evaluation(evaluation, f"{TEST}, {REFITTED}" if refit else TEST)

    settings = RunOptions(overwrite=overwrite, progress=progress_bar, log=log, show=show)
    images = split.all_items if split.name == "folder" else []
    with resumable(), users_cache(), all_named(images):
        if refit:
            head, metrics = train_on_all(run, folder, settings)
        else:
            head, metrics = train_head(hold_out(run, settings) if holds_out else run, folder, settings)
    if report and not metrics:
        log(f"{report} is not written, as no image was tested.")
    return head
