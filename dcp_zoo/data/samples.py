"""Photographs that come with the package, all under CC0; `photos/README.md` names their sources."""

from pathlib import Path

PHOTOS = Path(__file__).parent / "photos"
# What the photographs show, then names of other things, as six right ones would be too easy.
SAMPLE_CLASSES = [
    "cat", "cup of coffee", "otter", "bird of prey", "lake in the mountains", "blue flowers",
    "dog", "bowl of soup", "seal", "pigeon", "beach", "butterfly",
]  # fmt: skip


def sample_images() -> list[str]:
    """The paths of six photographs, in the order of the first six of `SAMPLE_CLASSES`."""
    return [str(PHOTOS / f"{name}.jpg") for name in ("cat", "coffee", "otter", "osprey", "lake", "flowers")]
