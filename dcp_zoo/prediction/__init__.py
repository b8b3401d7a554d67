"""The one road from images to answers: decode an image, encode its pixels, classify its features, reject images of
other things. `Predictor` takes it on any engine, a `Backend` computes: PyTorch (`heads`) or ONNX Runtime (`onnx`). Here
without torch."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from dcp_zoo.answers import Outputs
from dcp_zoo.data.images import ImageLike, Progress, by_image, crop, in_threads, load_image, no_progress
from dcp_zoo.errors import ZooError, as_zoo_error, attempted, check_range, shorten
from dcp_zoo.fields import Values
from dcp_zoo.files import MAX_PIXELS, packed, sha256_of, unpacked
from dcp_zoo.heads.config import CONFIG_NAME, WEIGHTS_NAME, read_config
from dcp_zoo.threads import available_cores

Errors = list[ZooError | None]  # of each image None, or why it cannot be read
AHEAD = 2  # batches that are decoded while one is computed
ERROR = "error"  # the column that says why an image cannot be read


def decode(image: ImageLike, preprocessing: Values, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image, see `load_image` -> its pixels, uint8 (3, H, W), by timm's `preprocessing`: exactly the transform's
    before they are normalised; such pixels stay as they are. It needs no model, so it can run in another process.
    ZooError as of `load_image`."""
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.shape == tuple(preprocessing["input_size"]):
        return image
    try:
        return crop(load_image(image, max_pixels), preprocessing)
    except MemoryError:
        raise ZooError(f"{image} is too large for the memory that is left.") from None


class Backend(ABC):
    """What computes: a classifier that is ready to answer.

    Attributes:
        architecture: name of its model.
        classnames: in the order of the logits.
        preprocessing: timm's, see `decode`.
        threshold: images with a lower `in_distribution_score` are rejected; None rejects none, and measures nothing.
    """

    def __init__(
        self, architecture: str, classnames: list[str], preprocessing: Values, threshold: float | None = None
    ) -> None:
        self.architecture, self.classnames = architecture, classnames
        self.preprocessing, self.threshold = preprocessing, threshold

    @abstractmethod
    def encode(self, pixels: np.ndarray) -> Any:
        """Pixels, uint8 (n, 3, H, W), see `decode` -> what `classify` takes, such as features (n, F)."""

    @abstractmethod
    def classify(self, features: Any) -> Outputs:
        """What `encode` returns -> the outputs of n images."""

    def compute(self, pixels: np.ndarray) -> Outputs:
        """Pixels, uint8 (n, 3, H, W) -> the outputs of n images."""
        return self.classify(self.encode(pixels))

    def encoded(
        self, images: Sequence[ImageLike], batch_size: int, encode: Callable[[np.ndarray], Any] | None = None
    ) -> Iterator[tuple[Errors, Any]]:
        """Images in order, in batches: why each cannot be read, and what `encode` makes of those that can; of a black
        image if none can. Threads decode ahead of the caller: PIL works outside the interpreter lock."""
        attempt = partial(attempted, partial(decode, preprocessing=self.preprocessing))
        pool, waiting = ThreadPoolExecutor(available_cores()), deque[Iterator[np.ndarray | ZooError]]()
        try:
            for start in range(0, len(images) + AHEAD * batch_size, batch_size):
                waiting.append(pool.map(attempt, images[start : start + batch_size]))
                if len(waiting) > AHEAD and (decoded := list(waiting.popleft())):
                    errors = [each if isinstance(each, ZooError) else None for each in decoded]
                    read = [each for each in decoded if not isinstance(each, ZooError)]
                    pixels = read or [np.zeros(self.preprocessing["input_size"], np.uint8)]
                    yield errors, (encode or self.encode)(np.stack(pixels))
        finally:
            pool.shutdown(cancel_futures=True)

    def batches(
        self, images: Sequence[ImageLike], batch_size: int, progress: Progress = no_progress
    ) -> Iterator[tuple[Errors, Outputs]]:
        """Images in order, in batches: why each cannot be read, and the outputs, NaN for those that cannot."""
        for errors, features in by_image(progress, self.encoded(images, batch_size), "images", len(images)):
            yield errors, self.classify(features).among([error is None for error in errors])

    def outputs(
        self, images: Sequence[ImageLike], batch_size: int, progress: Progress = no_progress
    ) -> tuple[dict[int, ZooError], Outputs]:
        """Why images cannot be read, by their positions, and the outputs of all; of one image or more."""
        errors, parts = zip(*self.batches(images, batch_size, progress), strict=True)
        return {i: error for i, error in enumerate(chain(*errors)) if error}, Outputs.joined(parts)


def decode_batch(batch: Mapping[str, Any], image: str, preprocessing: Values) -> Values:
    """See `Predictor.decode`."""
    images, left = images_of(batch, image)
    decoded = in_threads(partial(attempted, partial(decode, preprocessing=preprocessing)), images)
    errors = [str(each) if isinstance(each, ZooError) else "" for each in decoded]
    every = np.zeros((len(images), *preprocessing["input_size"]), np.uint8)
    for pixels, each in zip(every, decoded, strict=True):
        if not isinstance(each, ZooError):
            pixels[:] = each
    return left | {image: every, ERROR: np.array(errors, str)}


@dataclass(eq=False)
class Predictor:
    """A head for batches of images, as engines call it: Ray Data, `datasets`, Spark, a loop. It is made and pickled
    without loading the head, which its first call loads, in whatever process. ZooError for an unknown head, or one that
    cannot do what is asked for; never for an image.

    Called with a batch, a dict of columns, it returns one with the same rows: all columns but the images (paths stay,
    too), and

    - `class`: the most probable class, "none of these" if the image is rejected, or "" if it cannot be read
    - `probability`: of the most probable class, from 0 to 1, float32; NaN if the image cannot be read
    - `class_2`, `probability_2`, ..: of further classes, with `top_k`
    - `rejected`: whether the image is of none of the classes; False unless `reject`
    - `error`: why the image cannot be read, or "". A row that comes with an error keeps it
    - `features`: (F,), float32, with `features`

    Args:
        head: a head's name, a checkpoint's folder, or an .onnx file from `dcp-zoo export`; or a Predictor, of which
            this becomes a copy, for engines that call the class.
        image: the column of images: bytes, paths, images of PIL, `datasets`' dicts of bytes and path, arrays, or what
            `decode` made of them.
        top_k, reject, precision, classnames: see `dcp_zoo.predict`, `dcp_zoo.create_model`.
        features: whether to return them, of length 1.
        device: see `dcp_zoo.train`; "auto" takes the GPU of the `rank` that a call names, as `datasets` does.
        batch_size: images per forward pass, of batches that hold more.
        carry: pickle the head's files as well, for machines that do not share its folder. CLIP's weights stay behind.
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

    def __post_init__(self) -> None:
        if isinstance(self.head, Predictor):
            vars(self).update(self.head.__getstate__())
            return
        from dcp_zoo.zoo.resolve import parse_name  # here, as servers do without

        check_range("top_k", self.top_k, 1)
        check_range("batch_size", self.batch_size, 1)
        name, self.rank = str(self.head), 0  # of this process, among those that share the GPUs of a machine
        self.on_onnx = name.endswith(".onnx")
        changed = self.classnames or self.precision not in ("auto", "float32") or self.reject not in (None, False, True)
        if self.on_onnx and changed:
            exported = f"{name} is run as it was exported"
            raise ZooError(f"{exported}: omit other classes and precision, and let reject be True or None.")
        self.head = str(Path(name).absolute()) if self.on_onnx else str(parse_name(name))
        files = self._files
        self.sha256 = sha256_of(files[0])
        with as_zoo_error(f"{name} is not whole: {{}}. Train or download the head again.", OSError):
            self.files = packed(files) if self.carry else None

    def __getstate__(self) -> Values:
        return {name: value for name, value in vars(self).items() if name != "backend"} | {"rank": 0}

    @property
    def _files(self) -> list[Path]:
        """The exported file, or those of the head's checkpoint, the first of which names the other by its hash."""
        from dcp_zoo.zoo.resolve import head_folder

        if not self.on_onnx:
            folder = head_folder(str(self.head))
            return [folder / CONFIG_NAME, folder / WEIGHTS_NAME]
        if not (file := Path(str(self.head))).is_file():
            raise ZooError(f"There is no file {file}: create one with dcp-zoo export.")
        return [file]

    def depends_on(self) -> Values:
        """What the answers depend on besides the images, as plain JSON; the precision is the one that is used here."""
        precision = "float32"
        if not self.on_onnx:  # known without loading the head
            from dcp_zoo.training.device import pick_device, pick_precision

            architecture = read_config(self._files[0].parent)["architecture"]
            precision = pick_precision(self.precision, architecture, pick_device(self._device))
        options = {"classnames": self.classnames, "reject": self.reject, "precision": precision}
        return {"head": self.sha256} | options

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

            options: Values = {"reject": bool(self.reject), "features": self.features}
            return OnnxClassifier(head, available_cores(), self._device, **options)
        from dcp_zoo.prediction.heads import HeadBackend, loaded

        return HeadBackend(loaded(head, self._device, self.classnames), self.features, self.precision, self.reject)

    @property
    def decode(self) -> Callable[[Mapping[str, Any]], Values]:
        """A step of its own for workers without the head: a batch -> the same with uint8 pixels (3, H, W) in place of
        the images, upright and at the model's size, exactly its transform's; and with the column `error`. It
        pickles."""
        from dcp_zoo.zoo.resolve import get_pretrained_cfg

        cfg = self.backend.preprocessing if self.on_onnx else get_pretrained_cfg(str(self.head))
        return partial(decode_batch, image=self.image, preprocessing=cfg)

    def __call__(self, batch: Mapping[str, Any], rank: int | None = None) -> Values:
        self.rank = rank or self.rank
        images, left = images_of(batch, self.image)
        errors, outputs = self.backend.outputs(images or [None], self.batch_size)  # of no image, the types alone
        columns = left | outputs.of(slice(len(images))).columns(self.backend.classnames, self.top_k)
        return columns | {ERROR: np.array([str(errors.get(i, "")) for i in range(len(images))], str)}


def images_of(batch: Mapping[str, Any], column: str) -> tuple[list[Any], Values]:
    """The images of a batch, an error in place of each row that has one, and the other columns, and that of paths.
    ZooError for a batch without them."""
    if not isinstance(batch, Mapping) or column not in batch:
        given = f"the columns {shorten([*map(str, batch)])}" if isinstance(batch, Mapping) else type(batch).__name__
        raise ZooError(f"A batch is a dict of columns, of which {column!r} has the images, not {given}: pass image=...")
    errors = batch.get(ERROR, ())
    images = [ZooError(error) if error else image for image, error in zip_longest(batch[column], errors)]
    are_paths = all(image is None or isinstance(image, str) for image in batch[column])
    return images, {name: batch[name] for name in batch if name != ERROR and (are_paths or name != column)}
