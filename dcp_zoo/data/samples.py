"""Photographs that are available wherever the package is installed."""

from importlib.util import find_spec
from pathlib import Path


def sample_images() -> list[str]:
    """The paths of two photographs that come with scikit-learn: a hall with a pagoda roof, and a flower."""
    package = find_spec("sklearn")  # importing it would take a second
    assert package
    folder = Path(str(package.origin)).parent / "datasets" / "images"
    return [str(folder / "china.jpg"), str(folder / "flower.jpg")]
