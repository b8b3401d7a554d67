"""Photographs that are available wherever the package is installed."""

from pathlib import Path


def sample_images() -> list[str]:
    """The paths of two photographs that come with scikit-learn: a hall with a pagoda roof, and a flower."""
    import sklearn.datasets

    folder = Path(sklearn.datasets.__file__).parent / "images"
    return [str(folder / "china.jpg"), str(folder / "flower.jpg")]
