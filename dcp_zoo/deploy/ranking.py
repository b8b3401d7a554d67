"""The most probable classes of an image, in the same form everywhere: files, HTTP, ONNX and Python."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def top_classes(probabilities: np.ndarray, classnames: Sequence[str], top_k: int) -> list[list[dict[str, Any]]]:
    """The `top_k` most probable classes of each image, best first; equally probable ones in the order of the classes.

    Args:
        probabilities: (n, C).
        classnames: C names.
        top_k: classes per image, at most C.

    Returns:
        {"class": name, "probability": number rounded to six decimals} for each of them.
    """
    order = np.argsort(-probabilities, 1, kind="stable")[:, :top_k]
    values = np.take_along_axis(probabilities, order, 1)
    return [
        [{"class": classnames[i], "probability": round(p, 6)} for i, p in zip(*pair, strict=True)]
        for pair in zip(order.tolist(), values.tolist(), strict=True)
    ]
