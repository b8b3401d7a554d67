"""Find images by a text or by another image, with the features of a frozen CLIP."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dcp_zoo.data.find import find_images
from dcp_zoo.data.images import thumbnails
from dcp_zoo.data.progress import Progress, bar
from dcp_zoo.errors import ZooError
from dcp_zoo.files import templates, write_file
from dcp_zoo.inspection.look import look
from dcp_zoo.threads import fair_threads
from dcp_zoo.training.device import pick_device
from dcp_zoo.zoo.factory import plain_clip


class Match(NamedTuple):
    """An image, and the cosine of its features with those that were searched for."""

    path: str
    similarity: float


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
    sheet: str | Path | None = None,
    progress: Progress = bar,
) -> list[Match]:
    """The images of a folder that fit a text, or look like another image, best first.

    Args:
        folder: with images, also in subfolders. Their features are kept in the user's cache.
        text: what to find, such as "red mug on a table".
        like: a photo, instead of the text.
        count: how many images.
        model, device, progress: see `inspect`. The text is only understood as far as the model's text tower goes.
        sheet: a page with the images as pictures is written to this file.

    Raises:
        ZooError: neither text nor photo, or both; no images; or a photo that cannot be read.
    """
    if (not text) == (like is None):
        raise ZooError('Say what to find: a text such as "red mug on a table", or --like photo.jpg, not both.')
    paths = [image.path for image in find_images([str(folder)])]
    clip = plain_clip(model).to(pick_device(device))
    if like is None:
        wanted = clip.zero_shot_classifier([str(text)])[0].float().cpu().numpy()
    else:
        photo = look([str(like)], clip)
        if photo.errors:
            raise ZooError(photo.errors[0])
        wanted = photo.features[0]
    similarity = np.nan_to_num(look(paths, clip, True, progress).features @ wanted, nan=-2)
    best = np.argsort(-similarity, kind="stable")[:count]
    found = [Match(paths[i], round(float(similarity[i]), 4)) for i in best if similarity[i] > -2]
    if sheet is not None:
        notes = [f"{match.similarity:.2f}" for match in found]
        write_sheet(Path(sheet), text or f"Like {like}", [match.path for match in found], notes)
    return found


def write_sheet(file: Path, title: str, paths: Sequence[str], notes: Sequence[str]) -> None:
    """Write a page with the images, and a note for each."""
    pictures = zip(thumbnails(paths), notes, paths, strict=True)
    page = templates(__package__).get_template("sheet.html.jinja")
    content = page.render(title=title, pictures=list(pictures))
    write_file(file, content, "choose another file for the sheet")
