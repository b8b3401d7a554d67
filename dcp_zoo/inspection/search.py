"""Find images with the features of a frozen CLIP: by a text or another image, or those that are worth a label next.

For labels, each step takes the image that most raises the sum, over all images, of the similarity to the nearest one
with a label. Features at distance d have the similarity exp(-2 d^2 / m), with m the median of d^2 (Bae et al.,
Generalized Coverage for More Robust Low-Budget Active Learning, ECCV 2024). How sure a head is plays no part: to weight
it raised the accuracy on one set of images and lowered it on another.
"""

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.api.functions import lent, predict
from dcp_zoo.data.find import find_images
from dcp_zoo.data.images import GREY, Progress, bar, thumbnails
from dcp_zoo.data.load import LabelFiles, listed_images
from dcp_zoo.errors import ZooError
from dcp_zoo.files import check_empty, check_outside, check_writable, templates, write_file
from dcp_zoo.heads.head import Head
from dcp_zoo.inspection.look import look
from dcp_zoo.tables import write_csv
from dcp_zoo.threads import fair_threads
from dcp_zoo.training.device import pick_device
from dcp_zoo.zoo.build import plain_clip

TABLE, PAGE = "found.csv", "found.html"
TO_LABEL = "file", "class", "guess", "guess_probability"  # the columns of that table
MOST, SAME = 5000, 0.999  # images that are compared with each other; similarity of an image to a copy of it
BLACK = 0.04  # of white: an image is black if 99 of 100 pixels are darker


class Match(NamedTuple):
    """An image, and the cosine of its features with those that were searched for."""

    path: str
    similarity: float

    @property
    def note(self) -> str:
        """What is shown beside the image."""
        return f"{self.similarity:.3f}"


@fair_threads()
@torch.no_grad()
def search(
    folder: str | Path,
    text: str | None = None,
    *,
    like: str | Path | None = None,
    count: int = 20,
    model: str = "dcp_mini",
    device: str = "auto",
    output: str | Path | None = None,
    progress: Progress = bar,
) -> list[Match]:
    """The images of a folder that fit a text, or look like another image, best first. ZooError for neither text nor
    photo, or both, for no images or a photo that can be read, or an unusable output.

    Args:
        folder: with images, also in subfolders. Their features are kept in the user's cache.
        text, like: what to find, such as "red mug on a table", or a photo.
        count: how many images.
        model, device, progress: see `inspect`. The text is only understood as far as the model's text tower goes.
        output: a new folder for found.csv, and found.html with pictures.
    """
    if (not text) == (like is None):
        raise ZooError('Say what to find: a text such as "red mug on a table", a photo, or --to-label.')
    _check_new(output, folder)
    paths = find_images([str(folder)])
    clip = plain_clip(model).to(pick_device(device))
    if like is None:
        wanted = clip.zero_shot_classifier([str(text)])[0].float().cpu().numpy()
        features = look(paths, clip, True, progress).parts[:, : len(wanted)]  # CLIP's embeddings
    else:
        photo = look([str(like)], clip)
        if photo.errors:
            raise ZooError(photo.errors[0])
        wanted, features = photo.joined[0], look(paths, clip, True, progress).joined
    similarity = np.nan_to_num(features @ wanted, nan=-2)
    best = np.argsort(-similarity, kind="stable")[:count]
    matches = [Match(paths[i], round(float(similarity[i]), 4)) for i in best if similarity[i] > -2]
    if not matches:
        raise ZooError(f"No image of {folder} can be read.")
    if output is not None:
        _write(Path(output), text or f"Like {like}", matches, Match._fields, matches)
    return matches


class Suggestion(NamedTuple):
    """An image to label."""

    file: str  # its path
    guess: str = ""  # the head's class, or "" without a head
    probability: float | None = None  # of that class, from 0 to 1

    @property
    def note(self) -> str:
        return "" if self.probability is None else f"{self.guess}? {100 * self.probability:.0f} %"


@fair_threads()
@torch.no_grad()
def suggest(
    images: str | Path,
    head: Head | str | None = None,
    *,
    labels: LabelFiles = None,
    count: int = 20,
    output: str | Path | None = None,
    model: str = "dcp_mini",
    device: str = "auto",
    progress: Progress = bar,
) -> list[Suggestion]:
    """Choose the images of a folder that are worth a label next, even without labels: those that represent most of the
    others, and are unlike those with a label. Never a black one, of which 99 % of the pixels are darker than 4 % of
    white. ZooError for no image left, an unknown head or table, or an unusable output.

    Args:
        images: a folder, also with subfolders. Of more than 5,000 images every second, third, ... is considered.
        head: guesses the classes: a head, its name, or the folder of a checkpoint. Its CLIP's features are used.
        labels: what has a label and is not suggested again: tables with the columns file and class, or folders with the
            images or copies of them.
        count: how many images.
        output: a new folder for found.html, with pictures, and found.csv: a labels file, whose column `class` waits
            for what a person sees.
        model, device, progress: see `inspect`; the model is that of features without a head.
    """
    _check_new(output, images)
    paths = find_images([str(images)])
    done = listed_images(labels, images)
    paths = paths[:: -(-len(paths) // MOST)]
    with nullcontext() if head is None else lent(head, device) as known:
        clip = plain_clip(model).to(pick_device(device)) if known is None else known.frozen
        seen = look(paths, clip, True, progress)
        usable = np.percentile(seen.facts[:, : GREY**2], 99, 1) >= 255 * BLACK  # not NaN, of a broken image
        paths = [path for path, is_usable in zip(paths, usable, strict=True) if is_usable]
        of_done = look(done, clip, True, progress).joined if done else seen.joined[:0]
        features, of_labelled = map(torch.from_numpy, (seen.joined[usable], of_done[~np.isnan(of_done[:, 0])]))
        files = [paths[i] for i in spread(features, of_labelled, count)]
        if not files:
            raise ZooError(f"No image of {images} is left to label: all have a label, are black, or cannot be read.")
        suggestions = [Suggestion(file) for file in files]
        if known is not None:
            guesses = [row[0] for row in predict(known, files) if isinstance(row, list)]
            suggestions = [Suggestion(file, *guess) for file, guess in zip(files, guesses, strict=True)]
    if output is not None:
        rows = [[row.file, "", row.guess, row.probability] for row in suggestions]
        _write(Path(output), f"{len(files)} images to label", suggestions, TO_LABEL, rows)
    return suggestions


def _check_new(output: str | Path | None, images: str | Path) -> None:
    """Raise ZooError for an output folder that exists, is among the images, or cannot be written."""
    if output is not None:
        check_empty(Path(output))
        check_writable(Path(output))
        check_outside(Path(output), images)


def _write(
    output: Path, title: str, images: Sequence[Match | Suggestion], columns: Sequence[str], rows: Iterable[Sequence]
) -> None:
    files = [image[0] for image in images]
    pictures = zip(thumbnails(files), (image.note for image in images), files, strict=True)
    page = templates(__package__).get_template("sheet.html.jinja").render(title=title, pictures=list(pictures))
    write_file(output / PAGE, page)
    write_file(output / TABLE, lambda temporary: write_csv(temporary, columns, rows))


def spread(features: Tensor, labelled: Tensor, count: int) -> list[int]:
    """At most `count` rows of normalised features (n, E), best first, unlike labelled ones (m, E) and each other."""
    if not len(features):
        return []
    distances, chosen = torch.cdist(features, features).square(), list[int]()
    median = distances.median().clamp(min=1e-6)
    each, best = torch.exp(-2 * distances / median), torch.zeros(len(features))
    if len(labelled):
        best = torch.exp(-2 * torch.cdist(labelled, features).square() / median).amax(0)
    while len(chosen) < count and best.min() < SAME:
        gain = (each - best).clamp(min=0).sum(1).masked_fill(best >= SAME, -1)
        chosen.append(int(gain.argmax()))
        best = torch.maximum(best, each[chosen[-1]])
    return chosen
