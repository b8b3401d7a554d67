"""Which images a head was trained on, in its `info`: by their content, as names say little about it."""

from collections.abc import Sequence

from PIL import Image

from dcp_zoo.data.images import file_sha256, in_threads, load_image, pixels_sha256
from dcp_zoo.data.splits import Item
from dcp_zoo.fields import Values

DIGITS = 12  # of a hash: that one of 10,000 images is taken for one of 100,000 others happens in 1 of 280,000 cases


def image_hashes(items: Sequence[Item]) -> dict[str, str]:
    """The hashes of images, separated by spaces: "files" of their bytes, and "pixels" of the images in memory, whose
    keys are their `pixels_sha256`. Nothing if some are given by features only."""
    files = in_threads(file_sha256, [item.path for item in items if isinstance(item.path, str)])
    pixels = [item.key for item in items if isinstance(item.path, Image.Image)]
    if len(files) + len(pixels) < len(items):
        return {}
    both = {"files": files, "pixels": pixels}
    return {kind: " ".join(name[:DIGITS] for name in names) for kind, names in both.items() if names}


def note_images(info: Values, items: Sequence[Item]) -> None:
    """Add images to those that `info` names. If it names none, others are unknown, and it goes on saying so."""
    if known := info.get("image_hashes"):
        new = image_hashes(items)
        info["image_hashes"] = {kind: f"{known.get(kind, '')} {new.get(kind, '')}".strip() for kind in known | new}


def unseen(items: Sequence[Item], info: Values) -> list[Item]:
    """The images that are not among those that `info` names."""
    known = info.get("image_hashes") or {}
    files, pixels = (set(known.get(kind, "").split()) for kind in ("files", "pixels"))

    def is_new(item: Item) -> bool:
        if isinstance(item.path, str) and file_sha256(item.path)[:DIGITS] in files:
            return False
        return not pixels or pixels_sha256(load_image(item.path))[:DIGITS] not in pixels

    return [item for item, new in zip(items, in_threads(is_new, items), strict=True) if new] if known else list(items)
