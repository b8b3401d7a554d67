"""Views of an image, by name: as it is, flipped, or a random crop."""

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32


class View(NamedTuple):
    """One way to look at an image. Random crops are drawn from `seed` and the image's key: neither the
    other images nor their order matter."""

    name: str
    seed: int | None = None

    def seed_of(self, key: str) -> int:
        """From which the crop of the image with this key is drawn."""
        return crc32(key.encode("utf-8", "surrogateescape"), self.seed or 0)


PLAIN = View("plain")
MIRRORED = View("mirrored")  # flipped horizontally
Views = Sequence[View]


def crop_views(count: int, seed: int) -> list[View]:
    """So many random crops of each image."""
    return [View("crop", (seed * 1_000_003 + i) % 2**32) for i in range(count)]
