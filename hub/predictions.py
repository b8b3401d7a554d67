"""Create `hub/predictions.png`, the README's image: photographs with the predictions of bundled heads.

pip install '.[docs]' && python hub/predictions.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from dcp_zoo import create_model
from dcp_zoo.cli.predict import classify, torch_classifier
from dcp_zoo.data import load_image
from dcp_zoo.data.samples import SAMPLE_CLASSES, sample_images

HEAD = "caltech101-16shot"
PHOTOS = sample_images()


def main() -> None:
    """One column per photograph: the image, predictions for the head's classes and for twelve custom ones."""
    heads = create_model("dcp_mini", HEAD).eval(), create_model("dcp_mini", HEAD, classnames=SAMPLE_CLASSES).eval()
    titles = "100 classes of Caltech-101", "twelve classes named by hand"
    fig, axes = plt.subplots(3, len(PHOTOS), figsize=(15, 5.4), height_ratios=(2.2, 1, 1), layout="constrained")
    for column, path in zip(axes.T, PHOTOS, strict=True):
        column[0].imshow(load_image(path))
        column[0].axis("off")
        for ax, model, title in zip(column[1:], heads, titles, strict=True):
            ((_, answers),) = classify(torch_classifier(model, top_k=3), [path])
            bars(ax, answers)
            if path == PHOTOS[0]:
                ax.set_title(title, loc="left", fontsize=9)
    fig.savefig(Path(__file__).with_name("predictions.png"), dpi=90)


def bars(ax: plt.Axes, answers: list[dict]) -> None:
    """Horizontal bars, best at the top, with the class names inside the axes."""
    rows = range(len(answers))
    ax.barh(rows, [a["probability"] for a in answers], color="#9ecae1")
    for row, answer in zip(rows, answers, strict=True):
        ax.text(0.01, row, f"{answer['class'].replace('_', ' ')}  {answer['probability']:.0%}", va="center", fontsize=9)
    ax.set(xlim=(0, 1), xticks=[], yticks=[])
    ax.invert_yaxis()


if __name__ == "__main__":
    main()
