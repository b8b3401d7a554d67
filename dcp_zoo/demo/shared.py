"""The photographs of a page, and the models behind it, shared by all visitors: what they answer."""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dcp_zoo.answers import Answering
from dcp_zoo.api.functions import as_model, predict
from dcp_zoo.data import DATASETS, load_image, load_split
from dcp_zoo.data.images import decode_image
from dcp_zoo.data.packaged import SAMPLE_CLASSES, sample_images
from dcp_zoo.errors import ZooError
from dcp_zoo.model.classes import TEMPLATE, repeated_names
from dcp_zoo.model.head import Head
from dcp_zoo.zoo.factory import create_transform
from dcp_zoo.zoo.registry import all_heads

MAX_FILE = 20_000_000  # bytes of one upload
MAX_PHOTO = 50_000_000  # pixels
KEPT_SIDE = 448  # pixels to which a larger short side is resized: more than the input of the largest model
KEPT_PIXELS = 4 * KEPT_SIDE**2  # to which longer images are resized
Uploads = list[str] | str | None  # paths; of the webcam, one
Answers = dict[str, float]  # of one image: the probabilities of all classes, the most probable first
_lock = threading.Lock()


@dataclass(frozen=True)
class Photo:
    name: str  # of its file
    image: Image.Image  # upright, RGB, with a short side of at most `KEPT_SIDE`, and at most `KEPT_PIXELS`
    truth: str | None = None  # the class that it shows, if that is known

    @property
    def bytes(self) -> int:
        """The memory it takes: PIL has four bytes per pixel."""
        return 4 * self.image.width * self.image.height


def read_photo(path: str) -> Photo:
    """Read a photograph; ZooError, naming the file without its folder, if it is damaged or too large."""
    name = Path(path).name
    image = decode_image(Path(path).read_bytes(), name, MAX_PHOTO)
    shrink = min(KEPT_SIDE / min(image.size), (KEPT_PIXELS / (image.width * image.height)) ** 0.5)
    if shrink < 1:
        image = image.resize([round(side * shrink) for side in image.size], Image.Resampling.BICUBIC)
    return Photo(name, image)


def read_uploads(files: Uploads, limit: int, room: float = float("inf")) -> tuple[list[Photo], list[str]]:
    """Uploaded files, which are removed -> at most `limit` photographs in `room` bytes; messages about the others."""
    paths = [files] if isinstance(files, str) else files or []
    images = list(paths)
    photos: list[Photo] = []
    messages: list[str] = []
    try:
        while images and len(photos) < limit and room > 0:
            try:
                photos.append(read_photo(images.pop(0)))
                room -= photos[-1].bytes
            except ZooError as error:
                messages.append(str(error))
    finally:
        for path in map(Path, paths):
            path.unlink(missing_ok=True)
            with suppress(OSError):  # it holds other files
                path.parent.rmdir()
    if images:
        fit = f"only {len(photos)} more fit" if photos else "no more fit"
        messages.append(f"Skipped {len(images)}: {fit} here. Remove some first.")
    return photos, messages


def sample_photos() -> list[Photo]:
    """The six photographs shown initially."""
    return [replace(read_photo(path), truth=name) for path, name in zip(sample_images(), SAMPLE_CLASSES, strict=False)]


def digit_photos(digits: int, n: int) -> list[list[Photo]]:
    """`n` of scikit-learn's images of each of the first handwritten digits."""
    items = load_split("digits").train
    own = [[item for item in items if item.label == digit][:n] for digit in range(digits)]
    return [[Photo(f"{item.label}_{item.key}.png", load_image(item.path)) for item in some] for some in own]


def head_note(head: str, classes: int) -> str:
    """A head's classes, training images and accuracy, in a sentence or two."""
    entry = all_heads().get(head)
    if entry is None:
        return f"{classes} classes."
    top1 = entry.metrics.get("top1_stored")
    measured = f" Top-1 on its test images: {top1:.1f}\u00a0%." if top1 is not None else ""
    return f"{classes} classes of {entry.dataset}, {entry.shots} training images per class.{measured}"


@lru_cache(maxsize=2)
def load(head: str) -> Head:
    """A head that all visitors may use, on the best device."""
    return as_model(head, "auto")


@contextmanager
def acquire(head: Head | str, classnames: Sequence[str] | None = None) -> Iterator[Any]:
    """Exclusive access to a head: a copy that shares its weights, with classes and statistics of its own."""
    with _lock:
        shared = load(head) if isinstance(head, str) else head
        model = copy.copy(shared)
        for parts in ("_buffers", "_modules"):  # a module's copy would write into the module's own
            setattr(model, parts, dict(getattr(shared, parts)))
        if classnames is not None and list(classnames) != model.classnames:
            if problem := repeated_names(classnames):
                raise ZooError(problem)
            model.set_classnames(classnames)
        yield model


def to_batch(model: Head, photos: Sequence[Photo]) -> torch.Tensor:
    """Photographs as images (B, 3, H, W) on the model's device."""
    transform = create_transform(model)
    return torch.stack([transform(photo.image) for photo in photos]).to(model.device)


def head_answers(model: Head, photos: Sequence[Photo]) -> list[Answers]:
    """The answers for each photograph, with the model's default statistics."""
    rows = predict(model, [photo.image for photo in photos], top_k=model.num_classes)
    return [dict(row if isinstance(row, list) else ()) for row in rows]


@torch.inference_mode()
def clip_answers(model: Head, photos: Sequence[Photo]) -> list[Answers] | None:
    """CLIP's answers without training, with the dataset's template; None if the head changes the image tower."""
    if model.frozen is not model.encoder:
        return None
    spec = DATASETS.get(str(model.info.get("dataset")))
    clip = model.encoder
    classifier = clip.zero_shot_classifier(model.classnames, spec.template if spec else TEMPLATE)
    logits = clip.logits(clip.encode_image(to_batch(model, photos)), classifier).cpu().numpy()
    rows = Answering(model.num_classes)(logits, model.classnames)
    return [{answer["class"]: answer["probability"] for answer in row["predictions"]} for row in rows]


def rejected(model: Head, photos: Sequence[Photo]) -> list[bool]:
    """Whether each photograph belongs to none of the model's classes."""
    return [row is None for row in predict(model, [photo.image for photo in photos], reject=True)]
