"""What the classifier stage could be instead of Gaussians: kinds of classifiers on the features of the bundled heads.

    python benchmarks/stage.py --data-root DATA       writes results/stage_choice.csv

DATA holds `caltech-101` in CoOp's layout; test images are not read. Each classifier is fitted on a head's own features
of its few-shot training images and added to the head's text logits, with the two weights of `dcp_zoo.training.stage`.
To compare the classifiers alone, the weights are fitted on one half of Caltech-101's validation images and measured on
the other, both ways. The heads' prompts were trained on the same training images; features from heads that were not
would take one training run for each fold, and were not tried.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from tuning import GrowingTable

from dcp_zoo import create_model
from dcp_zoo.benchmark.trial import weights_id
from dcp_zoo.cli.console import progress_bar
from dcp_zoo.data import few_shot, load_split
from dcp_zoo.model.classifier import GaussianClassifier, class_means
from dcp_zoo.training.evaluation import expected_calibration_error, top1
from dcp_zoo.training.loop import cosine
from dcp_zoo.training.methods.linear_probe import regression
from dcp_zoo.training.sources import image_source
from dcp_zoo.training.stage import fit_weights, image_features, prior

RESULTS = Path(__file__).parent / "results" / "stage_choice.csv"
COLUMNS = ("weights", "shots", "classifier", "top1", "nll", "ece")
MODEL, SHOTS = "dcp_mini", (1, 2, 4, 8, 16)
Scores = Callable[[Tensor], Tensor]  # features (n, E) -> scores (n, C)


def gaussian(rows: Tensor, labels: Tensor, text: Tensor) -> Scores:
    return GaussianClassifier([""] * len(text), rows.shape[1]).fit(rows, labels).scores


def ridge(strength: float) -> Callable[[Tensor, Tensor, Tensor], Scores]:
    """Least squares on one-hot labels; the penalty in multiples of the features' variance."""

    def fit(rows: Tensor, labels: Tensor, text: Tensor) -> Scores:
        x, y = rows.double(), F.one_hot(labels, len(text)).double()
        centred, mean = x - x.mean(0), x.mean(0)
        gram = centred.T @ centred
        penalty = strength * gram.trace() / len(x) * torch.eye(len(gram), dtype=gram.dtype)
        weight = torch.linalg.solve(gram + penalty, centred.T @ (y - y.mean(0)))
        return lambda features: ((features.double() - mean) @ weight + y.mean(0)).float()

    return fit


def softmax_regression(c: float) -> Callable[[Tensor, Tensor, Tensor], Scores]:
    """With the linear probe's penalty 1 / C."""

    def fit(rows: Tensor, labels: Tensor, text: Tensor) -> Scores:
        found = regression(rows, labels, c, 1000)
        return lambda features: torch.from_numpy(found.decision_function(features.numpy())).float()

    return fit


def clap(rows: Tensor, labels: Tensor, text: Tensor) -> Scores:
    """CLAP (`training.methods.clap`) from the head's text features, in 300 full-batch steps: text (C, E), of length
    exp(logit_scale)."""
    scale, start = text.norm(dim=-1).mean(), F.normalize(text, dim=-1)
    own = (scale * rows @ start.T).softmax(-1).gather(1, labels[:, None])  # (n, 1)
    strength = class_means(own, labels, len(start))[:, 0].float()
    weight = start.clone().requires_grad_()
    optimizer, rate = torch.optim.SGD([weight], 0.1, momentum=0.9), cosine(0.1, 300)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = rate(step)
        loss = F.cross_entropy(scale * rows @ F.normalize(weight, dim=-1).T, labels)
        loss = loss + (strength * (weight - start).square().sum(-1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fitted = scale * F.normalize(weight.detach(), dim=-1)
    return lambda features: features @ fitted.T


CLASSIFIERS: dict[str, Callable[[Tensor, Tensor, Tensor], Scores]] = {
    "gaussian": gaussian,
    **{f"ridge, {strength:g} x variance": ridge(strength) for strength in (0.1, 1, 10)},
    **{f"softmax regression, C {c:g}": softmax_regression(c) for c in (1, 30)},
    "clap": clap,
}


def main(data_root: Annotated[Path, typer.Option(help="Folder with caltech-101.")]) -> None:
    """Measure what the file of results does not have for the current weights yet."""
    table = GrowingTable(RESULTS, COLUMNS, COLUMNS[:2])
    split = load_split("caltech101", data_root)
    for shots in SHOTS:
        key = weights_id(MODEL), shots
        if key not in table:
            model = create_model(f"{MODEL}.caltech101-{shots}shot", pretrained=True).eval()
            few = few_shot(split, shots, 1)
            train = image_source(model, few.train, "flip", progress=progress_bar)
            val = image_source(model, split.val, progress=progress_bar)
            views, features = image_features(train, progress_bar), image_features(val, progress_bar)[0]
            table.add((*key, *row) for row in compared(model, views, train.labels, features, val.labels))


def compared(model: Any, views: Tensor, labels: Tensor, features: Tensor, truth: Tensor) -> list[tuple[Any, ...]]:
    """A row for each classifier: training features (V, n, E), labels (n,), validation features (m, E), labels (m,)."""
    model.classifier = None
    weight, bias = (t.detach().cpu() for t in model.text_linear())
    text, centre = features @ weight.T + bias, prior(len(labels) / len(weight))
    rows = [("text alone", text * half_by_half(text, torch.zeros_like(text), truth, centre)[0])]
    fits = {name: (fit, views) for name, fit in CLASSIFIERS.items()} | {
        "gaussian, without mirror images": (gaussian, views[:1])
    }
    for name, (fit, used) in fits.items():
        scores = fit(used.flatten(0, 1), labels.repeat(len(used)), weight)
        given = scores(features) / scores(views[0]).std()
        u, v = half_by_half(text, given, truth, centre)
        rows.append((name, u * text + v * given))
    return [
        (
            name,
            top1(logits, truth),
            round(F.cross_entropy(logits, truth).item(), 3),
            round(expected_calibration_error(logits, truth), 1),
        )
        for name, logits in rows
    ]


def half_by_half(text: Tensor, scores: Tensor, labels: Tensor, centre: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """The weights (m, 1) of text logits and scores (m, C) of each validation image, fitted on the half without it."""
    first = torch.arange(len(labels)) % 2 == 0
    weights = torch.empty(len(labels), 2)
    for half in (first, ~first):
        weights[half] = torch.tensor(fit_weights(text[~half], scores[~half], labels[~half], centre))
    return weights[:, :1], weights[:, 1:]


if __name__ == "__main__":
    typer.run(main)
