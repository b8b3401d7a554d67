"""The one road from images to answers: decode an image, encode its pixels, classify its features, reject images of
other things. Two backends: PyTorch (`heads`) and ONNX Runtime (`dcp_zoo.onnx`). Without torch."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from dcp_zoo.answers import Outputs
from dcp_zoo.data.images import ImageLike, Progress, by_image, crop, load_image, no_progress
from dcp_zoo.errors import ZooError, attempted
from dcp_zoo.fields import Values
from dcp_zoo.files import MAX_PIXELS
from dcp_zoo.threads import available_cores

Errors = list[ZooError | None]  # of each image None, or why it cannot be read
AHEAD = 2  # batches that are decoded while one is computed


def decode(image: ImageLike, preprocessing: Values, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An image, see `load_image` -> its pixels, uint8 (3, H, W), by timm's `preprocessing`: exactly the transform's
    before they are normalised. It needs no model, so it can run in another process. ZooError as of `load_image`."""
    try:
        return crop(load_image(image, max_pixels), preprocessing)
    except MemoryError:
        raise ZooError(f"{image} is too large for the memory that is left.") from None


class Predictor(ABC):
    """A classifier that is ready to answer.

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
        """Images in order, in batches: why each cannot be read, and what `encode` makes of the others; of a black image
        if there are none. Threads decode ahead of the caller: PIL works outside the interpreter lock."""
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
