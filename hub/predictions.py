"""Create `docs/images/predictions.webp`, of `docs/reject.md`: photographs with the predictions of bundled
heads.

pip install '.[docs]' && python hub/predictions.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dcp_zoo import create_model, predict
from dcp_zoo.data import load_image
from dcp_zoo.data.packaged import SAMPLE_CLASSES, sample_images
from dcp_zoo.tables import NONE

HEAD = "caltech101-16shot"
OTHER = "pacs_photo-16shot"
PHOTOS = sample_images()
FILE = Path(__file__).parents[1] / "docs" / "images" / "predictions.webp"
COLUMNS = 3  # narrow enough to be read on a phone


def main() -> None:
    """Two rows of photographs; below each the predictions for twelve class names, and those of a head for
    other things, which may reject."""
    heads = create_model("dcp_mini", HEAD, classnames=SAMPLE_CLASSES).eval(), create_model("dcp_mini", OTHER).eval()
    titles = "twelve classes named by hand", f"trained on {', '.join(heads[1].classnames)}"
    fig, axes = plt.subplots(6, COLUMNS, figsize=(7.5, 8), height_ratios=(2.2, 1, 0.4) * 2, layout="constrained")
    columns = [*axes[:3].T, *axes[3:].T]
    for number, (column, path) in enumerate(zip(columns, PHOTOS, strict=True)):
        column[0].imshow(load_image(path))
        column[0].axis("off")
        for ax, model, title in zip(column[1:], heads, titles, strict=True):
            bars(ax, predict(model, path, top_k=3, reject=model is heads[1])[0])
            if number % COLUMNS == 0:
                ax.set_title(title, loc="left", fontsize=10)
    fig.savefig(FILE, dpi=120, pil_kwargs={"quality": 80, "method": 6})


def bars(ax: plt.Axes, answers: list | None) -> None:
    """Horizontal bars, best at the top, with the class names inside the axes; None for a rejected image."""
    if answers is None:
        ax.text(0.5, 0.5, NONE, transform=ax.transAxes, ha="center", va="center", fontsize=10)
        ax.set(facecolor="#eeeeee", xticks=[], yticks=[])
        return
    rows = range(len(answers))
    ax.barh(rows, [answer.probability for answer in answers], color="#9ecae1")
    for row, answer in zip(rows, answers, strict=True):
        ax.text(0.01, row, f"{answer.name.replace('_', ' ')}  {answer.probability:.0%}", va="center", fontsize=10)
    ax.set(xlim=(0, 1), xticks=[], yticks=[])
    ax.invert_yaxis()


if __name__ == "__main__":
    main()
