"""Train a head on your own images, measure it, and classify with it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dcp_zoo.answers import Prediction, Promises, best
from dcp_zoo.api.inputs import (
    ClassNames,
    Groups,
    Images,
    Labels,
    hashed,
    labelled,
    unlabelled,
    with_classes,
)
from dcp_zoo.backbone._torch import in_eval_mode, out_of_inference_mode
from dcp_zoo.data import Split
from dcp_zoo.data.images import ImageLike, normalise
from dcp_zoo.data.unreadable import ERRORS, all_named, without_unreadable
from dcp_zoo.errors import UnreadableImages, ZooError, check_choice, check_range
from dcp_zoo.features import AUTO
from dcp_zoo.features.device import pick_device
from dcp_zoo.features.photos import pixels_of
from dcp_zoo.heads.head import Head
from dcp_zoo.prediction.explain import Explanation, logit_shares
from dcp_zoo.prediction.heads import loaded, outputs_of, outputs_of_readable
from dcp_zoo.prediction.together import refined
from dcp_zoo.progress import Progress, bar
from dcp_zoo.threads import fair_threads
from dcp_zoo.training.evaluation import Evaluation
from dcp_zoo.training.methods.table import DEFAULT_METHOD, METHODS, RecipeLike
from dcp_zoo.training.run import RunOptions, plan, train_head
from dcp_zoo.training.task import Callback


@fair_threads()
@out_of_inference_mode()
def train(
    model: str,
    images: Images,
    labels: Labels = None,
    *,
    method: str = DEFAULT_METHOD,
    classifier: str | None = None,
    recipe: RecipeLike = None,
    classnames: ClassNames = None,
    groups: Groups = None,
    validation: Images = None,
    output: str | Path | None = None,
    errors: str = "raise",
    **options: Any,
) -> Head:
    """Train a head, returned in evaluation mode. ZooError for bad input, unreadable images, or diverged
    training.

    Args:
        model: "small", "medium" or "large", the best for their cost, or a model's name such as "dcp_vitb16".
        images: a folder with one folder per class; a `datasets.Dataset`, or a Parquet file's path, with the
            columns `image` and `label`; or a sequence of paths, PIL images, bytes, arrays or tensors.
        labels: one per image, names or numbers; omitted for a folder or a dataset. Images of `none of these`
            are examples of what to reject.
        method: "text-probe", a classifier on frozen features that is fitted in seconds; "dcp", which trains
            prompts first; or another name in `dcp_zoo.training.METHODS`.
        classifier: fitted on image features after training: "text-probe", or "none" for the method's own
            logits. Default: the recipe's, which for DCP is "text-probe".
        recipe: changes such as {"lr": 1e-3}, a recipe, or a name: "release" for the authors' code, "paper"
            for their paper's coupling. Default: the method's, fitted to the images.
        classnames: names of the classes, which CLIP reads, by label, or in the order of the labels. Default:
            these.
        groups: one per image, the same for photographs that were taken together, such as those of a burst:
            what is measured to weigh images against texts is never measured across a group. Default: these
            are found, by near copies and by camera and time.
        validation: (images, labels), or a folder, on which some methods choose hyperparameters (see
            `dcp_zoo.training.Method`), at most 4 per class with `shots`. No test images.
        output: folder for the checkpoint, from which a stopped training on the same images resumes. Default:
            nothing is written.
        errors: "raise" `dcp_zoo.UnreadableImages` for images that cannot be read, as scikit-learn raises for
            bad rows, or "keep": train without them, with a warning.
        options: `shots`, training images per class, at most (default: all); `seed` of all randomness (1);
            `device`, "auto", "cpu", "cuda" or "mps"; `precision`, "float32", "bfloat16", "float16" or
            "auto", the default: bfloat16 for CLIP's models where the device multiplies in it; `workers`,
            processes that decode images (0: threads of this one); `encoder`, an image model of timm, or
            several, that the text probe reads beside CLIP, such as "vit_small_patch14_dinov2.lvd142m"; and
            the fields of `dcp_zoo.training.RunOptions`: `callbacks`, called after every epoch in which
            prompts are trained; `overwrite`, to replace a checkpoint in `output`; `progress`, which wraps
            loops in a progress bar, as `rich.progress.track` does (default: tqdm's).
    """
    run_options = {part.name: options.pop(part.name) for part in fields(RunOptions) if part.name in options}
    classes, split = labelled(images, labels, classnames, groups)
    return train_labelled(
        split,
        classes,
        validation,
        model,
        method,
        RunOptions(**run_options),
        Path(output) if output is not None else None,
        recipe=recipe,
        classifier=classifier,
        errors=errors,
        **options,
    )


def train_labelled(
    split: Split,
    classes: np.ndarray,
    validation: Images,
    model: str,
    method: str,
    settings: RunOptions,
    output: Path | None = None,
    *,
    history: Callback | None = None,
    sample_weight: Sequence[float] | None = None,
    errors: str = "raise",
    **options: Any,
) -> Head:
    """A head trained on the images of `labelled`, with images for validation or None; `errors` as of `train`,
    `sample_weight` one number for each image, and `options` as of `plan`. `history` is called after each epoch, if
    there are any."""
    check_choice("errors", errors, ERRORS)
    items = split.train
    if validation is not None:
        val_images, val_labels = validation if isinstance(validation, (tuple, list)) else (validation, None)
        split = replace(split, val=with_classes(val_images, val_labels, classes.tolist(), split.classnames))
    if errors == "keep":
        split = without_unreadable(split, settings.progress)
    readable = {item.key for item in split.train}  # an image that was given twice can be read twice, or not at all
    with all_named(split.all_items):
        split = replace(split, train=hashed(split.train), val=hashed(split.val), no_class=hashed(split.no_class))
    run = plan(split, model, method, test_share=0.0, **options)
    if sample_weight is not None:
        if run.recipe.classifier == "none" or METHODS[method].trains:
            raise ZooError(f"{method} does not support sample_weight: choose method={DEFAULT_METHOD!r}.")
        pairs = zip(items, sample_weight, strict=True)
        run = replace(run, sample_weight=tuple(weight for item, weight in pairs if item.key in readable))
    if history and run.recipe.is_trained:
        settings = replace(settings, callbacks=[history, *settings.callbacks])
    with all_named(run.split.all_items):
        return train_head(run, output, settings)[0]


@fair_threads()
def evaluate(
    model: Head | str,
    images: Images,
    labels: Labels = None,
    *,
    batch_size: int = 64,
    device: str | None = None,
    precision: str = AUTO,
    progress: Progress = bar,
    errors: str = "raise",
) -> Evaluation:
    """Classify labelled images: accuracy with its interval, per class, confused pairs of classes and
    mistakes. Images that the model was trained on count as well; `dcp-zoo eval` leaves them out. ZooError
    for an unknown model, a label that is none of its classes, or images that cannot be read.

    Args:
        model: a head, which is in its own mode and on its own device again afterwards; its name; or the
            folder of a checkpoint.
        images, labels: see `train`; labels are names of the model's classes.
        batch_size: images per forward pass: fewer need less memory. Only with batch statistics, of
            `model.stats`, it affects the predictions.
        device, precision, progress: see `train`; default: the device where the model is, or "auto" for a
            name.
        errors: "raise" `dcp_zoo.UnreadableImages`, which names all images that cannot be read, at the first
            one; or "keep": measure without them, with a warning.
    """
    with lent(model, device) as head:
        items = with_classes(images, labels, head.classnames)
        outputs, readable = outputs_of_readable(head, items, batch_size, precision, progress, errors)
        return Evaluation.of(outputs, head.classnames, readable)


@fair_threads()
def predict(
    model: Head | str,
    images: Images,
    *,
    top_k: int = 1,
    reject: float | None = None,
    together: bool = False,
    batch_size: int = 64,
    device: str | None = None,
    precision: str = AUTO,
    progress: Progress = bar,
    errors: str = "raise",
) -> list[list[Prediction] | UnreadableImages | None]:
    """The `top_k` most probable classes of each image, best first: what `dcp-zoo predict` prints. ZooError
    for an unknown model, images that cannot be read, or `reject` and a model without a threshold for its
    classes.

    Args:
        model, device, precision, progress: see `evaluate`.
        images: one image, a sequence of images, or a folder; see `train`.
        top_k: how many. The first one says whether it can be `trusted`, as of `Predictor`.
        reject: return None for images that belong to none of the classes: True, or the share of right images
            that may be refused as well.
        together: refine each prediction with the other images; those that are rejected have no influence.
        batch_size: images per forward pass: fewer need less memory; it does not affect the predictions.
        errors: "raise", see `evaluate`; or "keep": predict the rest, with a warning, and with a
            `dcp_zoo.UnreadableImages`, not raised, in the place of each image that cannot be read.
    """
    check_range("top_k", top_k, 1)
    items = unlabelled(images)
    with lent(model, device) as head:
        outputs, broken = outputs_of(head, items, batch_size, precision, progress, errors, reject)
        names = head.classnames
        least = Promises.of(head.promises).trusted
    rejected = np.zeros(len(items), bool) if outputs.rejected is None else outputs.rejected
    predictions: list[Any] = best(refined(outputs, ~rejected & together), names, top_k)
    if outputs.unlike is not None and least is not None and not together:  # which is of each image alone
        for row, is_trusted in zip(predictions, outputs.trusted(least).tolist(), strict=True):
            row[0] = row[0]._replace(trusted=is_trusted)
    for i in np.flatnonzero(rejected).tolist():
        predictions[i] = None
    for i, error in broken.items():
        predictions[i] = UnreadableImages(str(error), {items[i].name: str(error)})
    return predictions


@contextmanager
def lent(model: Head | str, device: str | None) -> Iterator[Head]:
    """`loaded`; or the user's own head in evaluation mode, on the device if one is given, then again as it
    was."""
    if not isinstance(model, Head):
        yield loaded(str(model), device or AUTO)
        return
    device_before = model.device
    with in_eval_mode(model):
        try:
            yield model if device is None else model.to(pick_device(device))
        finally:
            if model.device != device_before:
                model.to(device_before)


def explain(head: Head | str, image: ImageLike, class_: str | None = None) -> Explanation:
    """Where in an image the logit of a class comes from. ZooError for an image tower without blocks, such as
    a ResNet's, for a head whose logits are no linear function of its features, and as of `predict`.

    Exact where the head reads a mean over positions: the logit is the sum of their shares. What the class
    token adds is shared out by the gradient through the last block, relative to the mean patch. What a gate
    mixes is shared out by integrated gradients. Encoders beside CLIP are left out.

    Args:
        head: or its name or folder.
        image: a path, PIL image or array, as for `predict`.
        class_: the name of one of the head's classes. Default: the most probable one.
    """
    with lent(head, None) as model:
        preprocessing = model.pretrained_cfg
        pixels = pixels_of(image, preprocessing)
        inputs = torch.from_numpy(normalise(pixels, preprocessing))[None].to(model.device)
        names = model.classnames
        if class_ is None:
            index = int(model(inputs).argmax())
        else:
            check_choice("class_", class_, names)
            index = names.index(class_)
        shares = logit_shares(model, inputs, index).cpu().numpy()
    return Explanation(names[index], shares, Image.fromarray(pixels.transpose(1, 2, 0)))
