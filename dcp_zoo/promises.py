"""What a head promises of images like its training images, by those of them that were left out: sets of
classes, and which predictions can be trusted. Without NumPy, for commands that only show it."""

import math
from collections.abc import Mapping
from typing import Any

COVERAGES = (0.8, 0.9, 0.95)  # the shares of images whose class is in their set
WRONG = (0.01, 0.02, 0.05, 0.1)  # the largest shares of trusted predictions that are wrong
TRUSTED = 0.05  # the one that the column `trusted` is about
SURE = 0.9  # of the share that is wrong


def images_for_set(coverage: float) -> int:
    """How many left-out images a set needs: no promise follows from fewer.

    >>> [images_for_set(coverage) for coverage in COVERAGES]
    [4, 9, 19]
    """
    return math.ceil(round(coverage / (1 - coverage), 6))


def images_for_trust(wrong: float) -> int:
    """How many left-out images, all of them right, show with `SURE` that at most this share is wrong.

    >>> [images_for_trust(wrong) for wrong in WRONG]
    [230, 114, 45, 22]
    """
    return math.ceil(math.log(1 - SURE) / math.log(1 - wrong))


def trust_note(info: Mapping[str, Any]) -> str:
    """Of what share of images the answers of a head of this `info` can be trusted, in sentences; "" if it
    promises nothing."""
    promises = info.get("text_probe", {}).get("promises")
    if not promises:
        return ""
    most = f"at most {100 * TRUSTED:g} % wrong"
    if promises.get("share") is not None:
        return (
            f"{promises['share']:.0f} % of images like these can be trusted to be {most} ({100 * SURE:g} % sure). "
            "Sets and trust hold over all images, not for each class."
        )
    needed = images_for_trust(TRUSTED)
    images = promises.get("images", 0)
    if images < needed:
        return (
            f"Which answers can be trusted to be {most} cannot be told: that needs {needed} images, or groups, "
            f"that were left out and are not refused, and there are {images:.0f}."
        )
    return f"No answers can be trusted to be {most}: even of the surest, too many may be wrong."
