"""The inference pipeline: decode an image, encode its pixels, classify its features, reject other things.

A `Backend` computes, by PyTorch (`heads`) or ONNX Runtime (`onnx`); a `Predictor` is the pipeline as a
callable on batches, for any engine. This module does not import torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from dcp_zoo.answers import NO_THRESHOLDS, Outputs, Promises, Thresholds, cells, table
from dcp_zoo.data.images import ImageLike, in_batches
from dcp_zoo.errors import ZooError, as_zoo_error, check_range
from dcp_zoo.features.photos import pixels_of
from dcp_zoo.fields import Values
from dcp_zoo.files import packed, sha256_of, unpacked
from dcp_zoo.heads.config import CONFIG_NAME, read_config, weights_file
from dcp_zoo.progress import Progress, by_image, no_progress
from dcp_zoo.threads import available_cores

Errors = list[ZooError | None]  # for each image None, or why it cannot be read
ERROR = "error"  # the column that says why an image cannot be read


class Backend(ABC):
    """A loaded classifier.

    Attributes:
        architecture: name of its model.
        classnames: in the order of the logits.
        preprocessing: timm's, see `pixels_of`.
        thresholds: which images are rejected, and of which nothing is promised.
        promises: what the head stores of them, see `Promises.of`; {} if nothing.
    """

    architecture: str
    classnames: list[str]
    preprocessing: Values
    thresholds: Thresholds = NO_THRESHOLDS
    promises: Mapping[str, Any] = {}

    @abstractmethod
    def compute(self, pixels: np.ndarray) -> Outputs:
        """Pixels, uint8 (n, 3, H, W), see `pixels_of` -> the outputs of n images."""

    def batches(self, images: Sequence[ImageLike], batch_size: int) -> Iterator[tuple[Errors, Outputs]]:
        """In batches, in order: why each image cannot be read (None if it can), and the outputs (NaN if
        not)."""
        for pixels, errors in decoded(images, batch_size, self.preprocessing):
            readable = np.array([error is None for error in errors])
            shown = pixels[readable] if readable.any() else pixels[:1]  # for the types of its outputs
            yield errors, self.compute(shown).among(readable)

    def outputs(
        self, images: Sequence[ImageLike], batch_size: int, progress: Progress = no_progress
    ) -> tuple[dict[int, ZooError], Outputs]:
        """Why images cannot be read, by their positions, and the outputs of all; of one image or more."""
        batches = by_image(progress, self.batches(images, batch_size), "images", len(images))
        errors, parts = zip(*batches, strict=True)
        return {i: error for i, error in enumerate(chain(*errors)) if error}, Outputs.joined(parts)


def decoded(images: Sequence[ImageLike], batch_size: int, preprocessing: Values) -> Iterator[tuple[np.ndarray, Errors]]:
    """In batches, in order: the pixels of images (n, 3, H, W), see `pixels_of`, black where one cannot be read;
    and why each cannot, or None."""
    read = partial(pixels_of, preprocessing=preprocessing)
    for _, results in in_batches(read, images, batch_size):
        pixels = np.zeros((len(results), *preprocessing["input_size"]), np.uint8)
        errors: Errors = [None] * len(results)
        for i, result in enumerate(results):
            if isinstance(result, ZooError):
                errors[i] = result
            else:
                pixels[i] = result
        yield pixels, errors


def decode_batch(batch: Mapping[str, Any], image: str, preprocessing: Values) -> Values:
    """See `Predictor.decode`."""
    images, other_columns = images_of(batch, image)
    n = len(images)
    ((pixels, errors),) = decoded(images or [None], max(n, 1), preprocessing)
    return other_columns | {image: pixels[:n], ERROR: np.array([str(error or "") for error in errors[:n]], str)}


@dataclass(eq=False)
class Predictor:
    """A head for batches of images, as engines call it: Ray Data, `datasets`, Spark, a loop. It is made
    and pickled without loading the head, which its first call loads, in whatever process. ZooError for an
    unknown head, or one that cannot do what is asked for; never for an image.

    Called with a batch, a dict of columns, it returns one with the same rows: all columns but the images
    (paths stay, too), and

    - `class`: the most probable class, "none of these" if the image is rejected, or "" if it cannot be read
    - `trusted`, if the head can tell: whether the class is one of those of which at most 5 % are wrong;
      never of an image that `reject` finds unlike the head's classes
    - `set`, with `sets`: the classes that the image may be of, the most probable first, as
      `dcp_zoo.tables.split_list` reads them; "" for an image that `reject` finds unlike the head's classes
    - `probability`: of the most probable class, from 0 to 1, float32; NaN if the image cannot be read
    - `class_2`, `probability_2`, ..: of further classes, with `top_k`
    - `rejected`: whether the image is of none of the classes; False unless `reject`
    - `best`, with `reject`: the most probable class, whose probability `probability` is
    - `error`: why the image cannot be read, or "". A row that comes with an error keeps it
    - `features`: (F,), float32, with `features`

    Args:
        head: a head's name, a checkpoint's folder, or an .onnx file from `dcp-zoo export`; or a
            Predictor, of which this becomes a copy, for engines that call the class.
        image: the column of images: bytes, paths, images of PIL, `datasets`' dicts of bytes and path,
            arrays, or what `decode` made of them.
        top_k, reject, precision, classnames: see `dcp_zoo.predict`, `dcp_zoo.create_model`.
        sets: 0.8, 0.9 or 0.95: the share of images, of those like the training images, whose class is in
            the `set`. It is promised over all images, not for each class.
        features: whether to return them, of length 1.
        device: see `dcp_zoo.train`; "auto" takes the GPU of the `rank` that a call names, as `datasets`
            does.
        batch_size: images per forward pass, of batches that hold more.
        carry: pickle the head's files as well, for machines that do not share its folder. CLIP's weights
            stay behind.
    """

    head: "str | Path | Predictor"
    image: str = "image"
    top_k: int = 1
    features: bool = False
    reject: float | None = None
    device: str = "auto"
    _: KW_ONLY
    precision: str = "auto"
    classnames: Sequence[str] | None = None
    batch_size: int = 32
    carry: bool = False
    sets: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.head, Predictor):
            if any(getattr(self, f.name) != f.default for f in fields(self)[1:]):
                raise ZooError("A copy of a Predictor takes nothing else: give it to the first one.")
            vars(self).update(self.head.__getstate__())
            return
        if not isinstance(self.head, str | Path):
            raise ZooError(
                f"A Predictor takes the name or folder of a head, which it loads in the process that calls it, not a "
                f"{type(self.head).__name__}: pass the folder of model.save_pretrained(FOLDER)."
            )
        from dcp_zoo.zoo.resolve import parse_name  # here, as servers do without

        check_range("top_k", self.top_k, 1)
        check_range("batch_size", self.batch_size, 1)
        name = str(self.head)
        self.rank = 0  # of this process, among those that share the GPUs of a machine
        self.on_onnx = name.endswith(".onnx")
        if self.on_onnx:
            is_as_exported = self.precision in ("auto", "float32") and self.reject in (None, False, True)
            if self.classnames or not is_as_exported:
                problem = f"{name} is run as it was exported"
                raise ZooError(f"{problem}: omit other classes and precision, and let reject be True or None.")
            self.head = str(Path(name).absolute())
        else:
            self.head = str(parse_name(name))
        files = self._files
        with as_zoo_error(f"Cannot read {name} ({{}}): train, download or export the head again.", OSError):
            self.sha256 = sha256_of(files[0])
            self.files = packed(files) if self.carry else None

    def __getstate__(self) -> Values:
        return {name: value for name, value in vars(self).items() if name != "backend"}

    @property
    def _files(self) -> list[Path]:
        """The exported file, or the head's config.json, which holds the weights' hash, and its weights."""
        from dcp_zoo.zoo.resolve import head_folder

        if not self.on_onnx:
            folder = head_folder(str(self.head))
            return [folder / CONFIG_NAME, weights_file(folder)]
        return [Path(str(self.head))]

    def depends_on(self) -> Values:
        """What the predictions depend on besides the images, as plain JSON, with the actual precision."""
        precision = "float32"
        if not self.on_onnx:  # known without loading the head
            from dcp_zoo.features.device import pick_device, pick_precision

            architecture = read_config(self._files[0].parent)["architecture"]
            precision = pick_precision(self.precision, architecture, pick_device(self._device))
        return {
            "head": self.sha256,
            "classnames": self.classnames,
            "reject": self.reject,
            "sets": self.sets,
            "precision": precision,
        }

    @property
    def _device(self) -> str:
        return f"auto:{self.rank}" if self.device == "auto" else self.device

    @cached_property
    def backend(self) -> Backend:
        """The head, loaded. ZooError if it is another one than when this was made."""
        if self.files:
            with unpacked(self.files) as folder:
                return self._loaded(str(Path(folder, *self.files)) if self.on_onnx else f"local-dir:{folder}")
        if sha256_of(self._files[0]) != self.sha256:
            raise ZooError(f"{self.head} is another head than when this Predictor was made: make it again.")
        return self._loaded(str(self.head))

    def _loaded(self, head: str) -> Backend:
        if self.on_onnx:
            from dcp_zoo.prediction.onnx import OnnxClassifier

            threads = available_cores()
            return OnnxClassifier(head, threads, self._device, reject=bool(self.reject), features=self.features)
        from dcp_zoo.prediction.heads import HeadBackend, loaded

        return HeadBackend(loaded(head, self._device, self.classnames), self.features, self.precision, self.reject)

    @property
    def promises(self) -> Promises:
        """What it says of images beside their classes. ZooError for sets that the head does not promise."""
        return Promises.of(self.backend.promises, self.sets)

    @property
    def decode(self) -> Callable[[Mapping[str, Any]], Values]:
        """A step of its own for workers without the head: a batch -> the same with uint8 pixels (3, H, W)
        in place of the images, upright and at the model's size, exactly its transform's; and with the
        column `error`. It pickles."""
        from dcp_zoo.zoo.resolve import resolve

        preprocessing = self.backend.preprocessing if self.on_onnx else resolve(str(self.head)).data_cfg
        return partial(decode_batch, image=self.image, preprocessing=preprocessing)

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> Values:
        if rank is not None:
            self.rank = rank
        images, other_columns = images_of(batch, self.image)
        promises = self.promises  # checked before any image is read
        errors, outputs = self.backend.outputs(images or [None], self.batch_size)  # of no image, the types alone
        answers = outputs.rows(self.backend.classnames, self.top_k, promises)
        names = dict.fromkeys([*cells(answers[0]), "rejected", ERROR])  # of an image that cannot be read, too
        rows = [{ERROR: str(errors[i])} if i in errors else cells(answers[i]) for i in range(len(images))]
        columns = other_columns | table(rows, names)
        if outputs.features is not None:
            columns["features"] = outputs.features[: len(images)]
        return columns


def images_of(batch: Mapping[str, Any], column: str) -> tuple[list[Any], Values]:
    """The images of a batch, an error in place of each row that has one; and the other columns, with that
    of the images if it holds paths. ZooError for a batch without images."""
    if not isinstance(batch, Mapping) or column not in batch:
        raise ZooError(f"A batch is a dict of columns, of which {column!r} has the images: pass image=...")
    images = list(batch[column])
    other_columns = dict(batch)
    other_columns.pop(ERROR, None)
    if not all(image is None or isinstance(image, str) for image in images):  # no paths
        del other_columns[column]
    for i, error in enumerate(batch.get(ERROR, ())):
        if error:
            images[i] = ZooError(error)
    return images, other_columns
