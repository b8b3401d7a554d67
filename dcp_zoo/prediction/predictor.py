"""What every door classifies with: decode an image, encode its pixels, classify its features; without torch."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from dcp_zoo.answers import Outputs
from dcp_zoo.data.images import ImageLike, crop, load_image
from dcp_zoo.data.progress import Progress, by_image, no_progress
from dcp_zoo.errors import ZooError, attempted, check_range
from dcp_zoo.fields import Values
from dcp_zoo.threads import available_cores

Errors = list[ZooError | None]  # of each image None, or why it cannot be read
AHEAD = 2  # batches that are decoded while one is computed


def decode(image: ImageLike, preprocessing: Values) -> np.ndarray:
    """An image, see `load_image` -> its pixels, uint8 (3, H, W), by timm's `preprocessing`: exactly the transform's
    before they are normalised. It needs no model, so it can run in another process. ZooError as of `load_image`."""
    try:
        return crop(load_image(image), preprocessing)
    except MemoryError:
        raise ZooError(f"{image} is too large for the memory that is left.") from None


def decoded(images: Sequence[ImageLike], preprocessing: Values, batch_size: int) -> Iterator[tuple[np.ndarray, Errors]]:
    """The pixels of images in order, in batches uint8 (n, 3, H, W), and their errors; the pixels are then 0. Threads
    decode ahead of the caller: PIL works outside the interpreter lock. ZooError for a batch_size below 1."""
    check_range("batch_size", batch_size, 1)
    attempt = partial(attempted, partial(decode, preprocessing=preprocessing))
    pool, waiting = ThreadPoolExecutor(available_cores()), deque[Iterator[np.ndarray | ZooError]]()
    try:
        for start in range(0, len(images), batch_size):
            waiting.append(pool.map(attempt, images[start : start + batch_size]))
            if len(waiting) > AHEAD:
                yield _stacked(waiting.popleft(), preprocessing)
        while waiting:
            yield _stacked(waiting.popleft(), preprocessing)
    finally:
        pool.shutdown(cancel_futures=True)


def _stacked(found: Iterator[np.ndarray | ZooError], preprocessing: Values) -> tuple[np.ndarray, Errors]:
    rows = list(found)
    errors = [row if isinstance(row, ZooError) else None for row in rows]
    nothing = np.zeros(preprocessing["input_size"], np.uint8)
    return np.stack([nothing if isinstance(row, ZooError) else row for row in rows]), errors


def as_they_are(outputs: Outputs) -> Outputs:
    return outputs


@dataclass(frozen=True)
class Predictor:
    """A classifier that is ready, by PyTorch or ONNX Runtime: `encode` and then `classify` are `compute`."""

    architecture: str  # name of its model
    classnames: list[str]
    preprocessing: Values  # timm's, see `dcp_zoo.data.images.crop`
    encode: Callable[[np.ndarray], Any]  # pixels, uint8 (n, 3, H, W) -> what `classify` takes, such as features (n, F)
    classify: Callable[[Any], Outputs] = as_they_are
    threshold: float | None = None  # images whose in_distribution_score is below it are of no class; None: not known
    cannot_reject: str = "This head has no threshold to reject images."  # why, and what to do

    def compute(self, pixels: np.ndarray) -> Outputs:
        """Pixels, uint8 (n, 3, H, W), see `decode` -> their outputs."""
        return self.classify(self.encode(pixels))

    def outputs(
        self, images: Sequence[ImageLike], batch_size: int, progress: Progress = no_progress
    ) -> tuple[Outputs, Errors]:
        """What is computed of the images that can be read, in order, and the errors of all."""
        parts, errors = list[Outputs](), Errors()
        batches = decoded(images, self.preprocessing, batch_size)
        for pixels, problems in by_image(progress, batches, "images", len(images)):
            errors += problems
            read = [problem is None for problem in problems]
            if any(read):
                parts.append(self.compute(pixels if all(read) else pixels[read]))
        # of no image the arrays are empty
        parts = parts or [self.compute(np.zeros((1, *self.preprocessing["input_size"]), np.uint8))]
        arrays: list[Any] = [None if part[0] is None else np.concatenate(part) for part in zip(*parts, strict=True)]
        if None not in errors:
            arrays = [None if array is None else array[:0] for array in arrays]
        return Outputs(*arrays), errors
