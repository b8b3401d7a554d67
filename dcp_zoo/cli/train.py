"""`dcp-zoo train`."""

import shlex
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dcp_zoo.benchmark.report import write_mistakes
from dcp_zoo.cli import options as opt
from dcp_zoo.cli.console import advise, log, output, progress_bar, rejection_note
from dcp_zoo.cli.heads import show_evaluation
from dcp_zoo.data import is_own, load_for_training
from dcp_zoo.data.readers import read_descriptions
from dcp_zoo.data.unreadable import all_named
from dcp_zoo.errors import ZooError
from dcp_zoo.files import check_output, check_outside, check_writable
from dcp_zoo.heads.config import STATE_NAME, check_free
from dcp_zoo.threads import use_threads
from dcp_zoo.training.methods.table import DCP_METHOD, DEFAULT_METHOD, METHODS
from dcp_zoo.zoo.registry import MINIATURE_NOTE, get_head, get_spec, is_model
from dcp_zoo.zoo.resolve import name_of

if TYPE_CHECKING:
    from dcp_zoo.training.evaluation import Evaluation

REFIT = "After the accuracy is measured, the head is trained on all images and saved."
DATASET_SHOTS = 16  # training images per class of a dataset
METHOD = (
    f"{DEFAULT_METHOD} (a classifier on CLIP's features; the default), dcp (coupled prompts in both towers plus text "
    f"probe; takes longer), or another: {', '.join(METHODS)}. "
    "With --help: the fields of its recipe."
)
RECIPE = "For dcp: release (as in the authors' code) or paper (the same with their paper's coupling)."
SKIP = "Replace them, or leave them out by --skip-unreadable."
of_recipe = partial(opt.option, rich_help_panel="Recipe (default: the method's)")


@dataclass(frozen=True)
class TrainOptions:
    photos: opt.Images = None
    output: Path | None = opt.option(None, "Folder for the checkpoint. Default: --head, or PHOTOS_head.")
    head: str | None = opt.option(None, "A head of the zoo: sets method, model, dataset, shots and seed.")
    model: opt.Model = "dcp_mini"
    method: str | None = opt.option(None, METHOD)
    labels: opt.Labels = None
    group_by: opt.GroupBy = None
    data_root: opt.DataRoot = None
    descriptions: opt.DescriptionsFile = None
    shots: int | None = opt.option(None, "Images per class, at most. Default: all of your own, otherwise 16.", min=1)
    seed: int = opt.option(1, "Seed of the subset, the initial prompts and the image order. The paper uses 1, 2, 3.")
    test: float | None = opt.option(None, "Share held out for testing. Default: folder `test`, or 0.3.", min=0, max=0.9)
    refit: bool | None = opt.option(None, f"{REFIT} Default: for your own images.", "--refit/--no-refit")
    report: opt.Report = None
    encoder: list[str] = opt.option((), "Image model of timm to read beside CLIP; may be repeated.")
    device: opt.Device = "auto"
    precision: opt.Precision = "auto"
    skip_unreadable: bool = opt.option(False, "Leave out images that cannot be read.")
    overwrite: bool = opt.option(False, "Start again and replace the contents of the output folder.")
    recipe: str | None = of_recipe(None, RECIPE, metavar="release|paper")
    changes: list[str] = of_recipe((), "Change a field listed below; may be repeated.", "--set", metavar="NAME=VALUE")

    def of_head(self) -> "TrainOptions":
        """These options, with what the name in --head determines; ZooError if they also set something of that."""
        if not (head := self.head):
            return replace(self, method=self.method or DEFAULT_METHOD)
        sets = {"PHOTOS": "photos", "--model": "model", "--shots": "shots", "--seed": "seed"}
        if given := [shown for shown, name in sets.items() if getattr(self, name) != getattr(TrainOptions, name)]:
            raise ZooError(f"--head {head} already sets {', '.join(given)}: omit these options, or omit --head.")
        if not is_model(head) and (":" in head or Path(head).exists()):
            raise ZooError(f"--head names a head of the zoo, not the checkpoint {head}: dcp-zoo train MY_PHOTOS.")
        chosen = get_head(head)
        method = self.method or DCP_METHOD
        return replace(self, method=method, model=chosen.model, shots=chosen.shots, seed=chosen.seed)

    @property
    def folder(self) -> Path:
        if self.output or self.head:
            return self.output or Path(str(self.head))
        place = Path(self.photos or (self.labels[0] if self.labels else "")).resolve()
        return Path(f"{place.name if place.is_dir() else place.name.partition('.')[0]}_head")


@opt.takes_options
def train(options: TrainOptions) -> None:
    """Train a head on a few images per class, test it, and save it.

    The accuracy on your own images is measured by four folds, or with --test and for methods that train prompts, on a
    share that is held out; then the head is trained on all images and saved. Photographs that were taken together are
    never on both sides. Methods that train prompts resume after a stop or kill: repeat the command.

    [dim]dcp-zoo train MY_PHOTOS --output my_head[/]
    [dim]dcp-zoo train MY_PHOTOS --method dcp --output dcp_head[/]
    [dim]dcp-zoo train --head dcp_vitb16.imagenet-16shot --data-root DATA[/]
    [dim]dcp-zoo train caltech101 --data-root DATA --method dcp --set epochs=50[/]
    """
    options = options.of_head()
    dataset: str | None
    if options.head:  # of whose dataset no folder takes the place
        dataset, data_root = get_head(options.head).dataset, options.data_root
        opt.check_data_root(dataset, data_root)
    else:
        dataset, data_root = opt.data_source(options.photos, options.data_root, options.labels)
    if dataset is None:
        raise ZooError("There is nothing to train on: dcp-zoo train PHOTOS, or train caltech101 --data-root DATA.")
    output_dir = options.folder
    check_writable(output_dir)
    if dataset == "folder" and not options.labels:
        check_outside(output_dir, str(data_root), "--output")
    check_free(output_dir, options.overwrite, resumes=True)
    if options.report:
        check_output(options.report, options.overwrite, "--report")
    if options.skip_unreadable and dataset != "folder":
        raise ZooError(f"--skip-unreadable is for your own images, not for {dataset}: omit it.")
    split = load_for_training(
        dataset, data_root, options.labels, options.test, options.skip_unreadable, options.group_by
    )
    whole = is_own(dataset) and not split.has_parts  # without a test part
    if options.report and (options.test == 0 if whole else not split.test):
        raise ZooError("--report shows mistakes on test images, but there are no test images: omit it or --test 0.")
    from dcp_zoo.training.cache import features_folder, kept_features  # after the images are listed, as torch is slow
    from dcp_zoo.training.device import decoders, pick_device
    from dcp_zoo.training.run import RunOptions, hold_out, plan, train_head, train_on_all

    use_threads()
    run = plan(
        split,
        options.model,
        str(options.method),
        shots=options.shots or (None if is_own(dataset) else DATASET_SHOTS),
        seed=options.seed,
        recipe=options.recipe,
        changes=opt.single_values(opt.parse_changes(options.changes)),
        device=options.device,
        precision=options.precision,
        encoder=options.encoder,
        workers=decoders(pick_device(options.device), len(split.items)),
        descriptions=read_descriptions(options.descriptions) if options.descriptions else None,
        test_share=options.test,
    )
    refit = whole and options.test != 0 and run.shots is None if options.refit is None else options.refit
    if text := " ".join(filter(None, (split.note, REFIT * refit))):
        log(text)
    show = partial(_show, options, run.split.name)
    settings = RunOptions(overwrite=options.overwrite, progress=progress_bar, log=log, show=show)
    try:
        own = [*split.items, *split.none] if dataset == "folder" else []
        with kept_features(features_folder()), all_named(own, SKIP):
            if whole and options.test != 0 and not refit:
                run = hold_out(run, settings)
            head, _ = (train_on_all if refit else train_head)(run, output_dir, settings)
    except KeyboardInterrupt:
        learnt = any(output_dir.rglob(STATE_NAME))
        kept = "What was learnt" if learnt else "No head was saved, but what was computed"
        log(f"Stopped. {kept} is kept: repeat the command to go on.")
        raise
    if note := rejection_note(head.info):
        output.print(f"With predict --reject, {note}", soft_wrap=True)
    name = shlex.quote(str(name_of(output_dir)))
    output.print(f"Saved in {output_dir}. Try it: dcp-zoo predict IMAGE --head {name}", markup=False)
    if not get_spec(options.model).clip:
        advise(MINIATURE_NOTE)


def _show(options: TrainOptions, title: str, evaluation: "Evaluation") -> None:
    if options.report:
        write_mistakes(evaluation, options.report, f"{options.folder} on {title}")
        log(f"Wrote {options.report}")
    show_evaluation(evaluation)
