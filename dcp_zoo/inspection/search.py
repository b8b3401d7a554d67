"""Find images with the features of a frozen CLIP: by a text or another image, or those that are worth a
label next.

For labels, each step takes the image that most raises the sum, over all images, of the similarity to the
nearest one with a label. Features at distance d have the similarity exp(-2 d^2 / m), with m the median of
d^2 (Bae et al., Generalized Coverage for More Robust Low-Budget Active Learning, ECCV 2024). How sure a head
is plays no part: to weight it raised the accuracy on one set of images and lowered it on another.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.api.functions import lent, predict
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.data import Item, LabelFiles, find_images, listed_images, not_trained_on, thumbnails
from dcp_zoo.errors import ZooError
from dcp_zoo.features import comparable, pick_device, users_cache
from dcp_zoo.files import check_empty, check_outside, check_writable, write_file
from dcp_zoo.heads.head import Head
from dcp_zoo.pages import templates
from dcp_zoo.progress import Progress, bar
from dcp_zoo.tables import write_csv
from dcp_zoo.threads import fair_threads
from dcp_zoo.zoo.build import plain_clip

TABLE = "found.csv"
PAGE = "found.html"
TO_LABEL = "file", "class", "guess", "guess_probability"  # the columns of that table
MOST = 5000  # images that are compared with each other
SAME = 0.999  # similarity of an image to a copy of it


class Match(NamedTuple):
    """An image, and the cosine of its features with those that were searched for."""

    path: str
    similarity: float

    @property
    def note(self) -> str:
        """What is shown beside the image."""
        return f"{self.similarity:.3f}"


@users_cache()
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
    """The images of a folder that fit a text, or look like another image, best first. ZooError for neither
    text nor photo, or both, for no images or a photo that can be read, or an unusable output.

    Args:
        folder: with images, also in subfolders. Their features are kept in the user's cache.
        text, like: what to find, such as "red mug on a table", or a photo.
        count: how many images.
        model, device, progress: see `inspect`. The text is only understood as far as the model's text tower
            goes.
        output: a new folder for found.csv, and found.html with pictures.
    """
    if (not text) == (like is None):
        raise ZooError('Say what to find: a text such as "red mug on a table", a photo, or --to-label.')
    check_new(output, folder)
    items = items_in(folder)
    clip = plain_clip(model).to(pick_device(device))
    seen = comparable(items, clip, progress)
    if like is None:
        wanted = clip.zero_shot_classifier([str(text)])[0].float().cpu()
        seen = seen.embeddings
    else:
        photo = comparable(as_items([str(like)]), clip)
        if photo.errors:
            raise photo.errors[0]
        wanted = photo.joined[0]
    seen = seen.of(seen.readable)
    if not seen.items:
        raise ZooError(f"No image of {folder} can be read.")
    similarity = seen.joined.numpy() @ wanted.numpy()
    best = np.argsort(-similarity, kind="stable")[:count]
    matches = [Match(seen.items[i].path, round(float(similarity[i]), 4)) for i in best]
    if output is not None:
        write_found(Path(output), text or f"Like {like}", matches, Match._fields, matches)
    return matches


class Suggestion(NamedTuple):
    """An image to label."""

    file: str  # its path
    guess: str = ""  # the head's class, or "" without a head
    probability: float | None = None  # of that class, from 0 to 1

    @property
    def note(self) -> str:
        return "" if self.probability is None else f"{self.guess}? {100 * self.probability:.0f} %"


@users_cache()
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
    """Choose the images of a folder that are worth a label next, even without labels: those that represent
    most of the others, and are unlike those with a label. ZooError for no image left, an unknown head or table,
    or an unusable output.

    Args:
        images: a folder, also with subfolders. Of more than 5,000 images every second, third, ... is
            considered.
        head: guesses the classes: a head, its name, or the folder of a checkpoint. Its CLIP's features are
            used, and what it was trained on is not suggested.
        labels: what has a label and is not suggested again: tables with the columns file and class, or
            folders with the images or copies of them.
        count: how many images.
        output: a new folder for found.html, with pictures, and found.csv: a labels file, whose column
            `class` waits for what a person sees.
        model, device, progress: see `inspect`; the model is that of features without a head.
    """
    check_new(output, images)
    items = items_in(images)
    items = items[:: math.ceil(len(items) / MOST)]
    labelled = listed_images(labels, images)
    if head is None:
        clip = plain_clip(model).to(pick_device(device))
        suggestions = [Suggestion(file) for file in _worth_a_label(items, labelled, clip, count, progress)]
    else:
        with lent(head, device) as trained:
            new = {item.path for item in not_trained_on(items, trained.info)}
            labelled += [item.path for item in items if item.path not in new]
            files = _worth_a_label(items, labelled, trained.frozen, count, progress)
            answers: list[Any] = predict(trained, files) if files else []
        suggestions = [Suggestion(file, *row[0][:2]) for file, row in zip(files, answers, strict=True)]
    if not suggestions:
        raise ZooError(f"No image of {images} is left to label: all have a label, or cannot be read.")
    if output is not None:
        rows = [[row.file, "", row.guess, row.probability] for row in suggestions]
        write_found(Path(output), f"{len(rows)} images to label", suggestions, TO_LABEL, rows)
    return suggestions


def _worth_a_label(
    items: Sequence[Item], labelled: Sequence[str], clip: FrozenCLIP, count: int, progress: Progress
) -> list[str]:
    """At most `count` of the images that can be read, see `spread`."""
    tables = [comparable(each, clip, progress) for each in (items, as_items(labelled))]
    new, known = (table.of(table.readable) for table in tables)
    return [new.items[i].path for i in spread(new.joined, known.joined, count)]


def as_items(paths: Iterable[str]) -> list[Item]:
    return [Item(path, path, 0) for path in paths]


def items_in(folder: str | Path) -> list[Item]:
    return as_items(find_images([str(folder)]))


def check_new(output: str | Path | None, images: str | Path) -> None:
    """Raise ZooError for an output folder that exists, is among the images, or cannot be written."""
    if output is not None:
        output = Path(output)
        check_empty(output)
        check_writable(output)
        check_outside(output, images)


def write_found(
    output: Path, title: str, images: Sequence[Match | Suggestion], columns: Sequence[str], rows: Iterable[Sequence]
) -> None:
    """Write a page of pictures and a table."""
    pictures = thumbnails(image[0] for image in images)
    page = templates(__package__).get_template("sheet.html.jinja")
    write_file(output / PAGE, page.render(title=title, images=zip(pictures, images, strict=True)))
    write_file(output / TABLE, lambda temporary: write_csv(temporary, columns, rows))


def spread(features: Tensor, labelled: Tensor, count: int) -> list[int]:
    """At most `count` rows of normalised features (n, E), best first, unlike labelled ones (m, E) and each
    other."""
    if not len(features):
        return []
    distances = torch.cdist(features, features).square()
    median = distances.median().clamp(min=1e-6)
    similarity = torch.exp(-2 * distances / median)
    best = torch.zeros(len(features))  # similarity of each to the nearest one that is labelled or chosen
    if len(labelled):
        best = torch.exp(-2 * torch.cdist(labelled, features).square() / median).amax(0)
    chosen: list[int] = []
    while len(chosen) < count and best.min() < SAME:
        gain = (similarity - best).clamp(min=0).sum(1).masked_fill(best >= SAME, -1)
        chosen.append(int(gain.argmax()))
        best = torch.maximum(best, similarity[chosen[-1]])
    return chosen
