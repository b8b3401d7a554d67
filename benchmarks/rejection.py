"""How well heads tell images of none of their classes from those of their classes, with part of the classes hidden.

    python benchmarks/rejection.py --data-root DATA              writes results/rejection.csv; resumes when repeated
    python benchmarks/rejection.py --data-root DATA --choose     writes results/rejection_choice.csv

DATA holds `caltech-101` in CoOp's layout. A text probe is trained on 50 of its 100 classes, another 50 for every seed;
the test images of these are known, those of the other 50 unknown. As in a folder of one's own there are no validation
images: the threshold comes from the training images. Reference: the maximum softmax probability of zero-shot CLIP with
the names of the same classes.

--choose compares scores on validation images instead, for other draws of 5 to 50 classes.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn import functional as F
from tuning import GrowingTable, of_class, relabelled, sample

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.benchmark.plan import weights_id
from dcp_zoo.cli.console import progress_bar
from dcp_zoo.data import Item, Split, load_split
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.model.names import TEMPLATE
from dcp_zoo.model.text_probe import shared_precision
from dcp_zoo.training.cache import kept_features
from dcp_zoo.training.evaluation import EVAL_BATCH, predict
from dcp_zoo.training.fit_probe import fit_on_features, on_cpu
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.methods.base import Task
from dcp_zoo.training.methods.table import DEFAULT_METHOD
from dcp_zoo.training.sources import image_source
from dcp_zoo.zoo.factory import plain_clip

RESULTS = Path(__file__).parent / "results"
COLUMNS = ("weights", "images_per_class", "seed", "score", "auroc", "fpr95", "accepted_known", "accepted_unknown")
CHOICE_COLUMNS = ("weights", "classes", "images_per_class", "seed", "score", "auroc", "fpr95")
METHOD = METHODS[DEFAULT_METHOD]
MODEL, CLASSES, SHOTS, SEEDS = "dcp_mini", 50, (4, 16), (1, 2, 3)
CHOICE_CLASSES, CHOICE_SHOTS, CHOICE_SEEDS = (5, 10, 50), (2, 4, 16), range(11, 19)

HEADS_OWN = "in_distribution_score"  # the score that heads reject by
LOGIT_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    HEADS_OWN: lambda z: torch.from_numpy(in_distribution_score(z.numpy())),
    "energy": lambda z: z.logsumexp(-1),
    "maximum logit": lambda z: z.amax(-1),
    "maximum probability": lambda z: z.softmax(-1).amax(-1),
    "entropy": lambda z: (z.softmax(-1) * z.log_softmax(-1)).sum(-1),
}


def main(
    data_root: Annotated[Path, typer.Option(help="Folder with caltech-101.")],
    choose: Annotated[bool, typer.Option("--choose", help="Compare scores on validation images.")] = False,
) -> None:
    """Measure what the file of results does not have for the current weights yet."""
    if choose:
        compare_scores(load_split("caltech101", data_root))
        return
    table = GrowingTable(RESULTS / "rejection.csv", COLUMNS, ("weights", "images_per_class", "seed"))
    for seed in SEEDS:
        for shots in SHOTS:
            key = weights_id(MODEL), shots, seed
            if key not in table:
                with kept_features():
                    table.add((*key, *row) for row in measured(data_root, shots, seed))


def measured(data_root: Path, shots: int, seed: int) -> Iterator[tuple[Any, ...]]:
    """A row for each score: AUROC, FPR at 95 % acceptance, and what the head's own threshold accepts, in percent."""
    full = load_split("caltech101", data_root)
    split, unknown = draw(full, full.test, CLASSES, shots, seed)
    train, known, others = (
        image_source(plain_clip(MODEL), items, progress=progress_bar) for items in (split.train, split.test, unknown)
    )
    task = Task(train.model, MODEL, split.classnames, TEMPLATE, train, None, METHOD.recipe(MODEL, "folder", shots, ""))
    head = METHOD.fit(task)
    logits = [predict(x.for_model(head), EVAL_BATCH) for x in (known, others)]
    scores = map(LOGIT_SCORES[HEADS_OWN], logits)
    accepted = [round(100 * (x >= head.rejection_threshold()).float().mean().item(), 1) for x in scores]
    for score, of in LOGIT_SCORES.items():
        yield (
            f"{score} of the head",
            *separation(*map(of, logits)),
            *(accepted if score == HEADS_OWN else ("", "")),
        )
    zero_shot = [F.linear(x.features(1)[0], *on_cpu(head.own_linear())) for x in (known, others)]
    yield "maximum probability of zero-shot", *separation(*map(LOGIT_SCORES["maximum probability"], zero_shot)), "", ""


def draw(full: Split, images: list[Item], classes: int, shots: int, seed: int) -> tuple[Split, list[Item]]:
    """Training images of the classes of this seed, with those of `images` that show them as test images, and those of
    `images` that show other classes."""
    chosen = sorted(random.Random(seed).sample(range(len(full.classnames)), classes))
    train = relabelled(full.train, chosen)
    few = [item for label in range(classes) for item in sample(of_class(train, label), shots, seed)]
    names = [full.classnames[label] for label in chosen]
    unknown = [item for item in images if item.label not in chosen]
    return Split("folder", names, few, [], relabelled(images, chosen)), unknown


def separation(known: Tensor, unknown: Tensor) -> tuple[float, float]:
    """AUROC of the scores of known and unknown images, and the share of unknown ones above the score that 95 % of the
    known ones have, in percent."""
    labels = torch.cat([torch.ones(len(known)), torch.zeros(len(unknown))])
    auroc = roc_auc_score(labels.numpy(), torch.cat([known, unknown]).numpy())
    return round(100 * float(auroc), 1), round(100 * (unknown >= known.quantile(0.05)).float().mean().item(), 1)


# ------------------------------------------------------------------------------------------------ the choice of a score


def compare_scores(full: Split) -> None:
    clip = plain_clip(MODEL)
    train, val = image_source(clip, full.train, "flip", progress=progress_bar), image_source(clip, full.val)
    views, features = train.features(progress=progress_bar), val.features(1, progress_bar)[0]
    place = {item.key: i for i, item in enumerate([*full.train, *full.val])}
    table = GrowingTable(
        RESULTS / "rejection_choice.csv", CHOICE_COLUMNS, ("weights", "classes", "images_per_class", "seed")
    )
    for classes in CHOICE_CLASSES:
        for shots in CHOICE_SHOTS:
            for seed in CHOICE_SEEDS:
                key = weights_id(MODEL), classes, shots, seed
                if key not in table:
                    split, unknown = draw(full, full.val, classes, shots, seed)
                    few = views[:, [place[item.key] for item in split.train]]
                    known, others = (
                        features[[place[item.key] - len(full.train) for item in x]] for x in (split.test, unknown)
                    )
                    table.add((*key, *row) for row in compared(clip, split, few, known, others))


def compared(clip: FrozenCLIP, split: Split, few: Tensor, known: Tensor, others: Tensor) -> Iterator[tuple[Any, ...]]:
    """A row for each score of a text probe: features of training images (V, n, E), known and other ones (m, E)."""
    text = on_cpu(clip.scaled(clip.zero_shot_classifier(split.classnames)))
    labels = torch.tensor([item.label for item in split.train])
    probe, _ = fit_on_features(split.classnames, few, labels, text)
    logits = [F.linear(x, *probe.linear(text, split.classnames)) for x in (known, others)]
    for score, of in LOGIT_SCORES.items():
        yield score, *separation(*map(of, logits))
    precision = shared_precision(few.flatten(0, 1), labels.repeat(len(few)), probe.means.double()).float()
    yield "Mahalanobis distance", *separation(*(-mahalanobis(x, probe.means, precision) for x in (known, others)))
    zero_shot = [LOGIT_SCORES["maximum probability"](F.linear(x, *text)) for x in (known, others)]
    yield "maximum probability of zero-shot", *separation(*zero_shot)


def mahalanobis(features: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """The squared distance (m,) of features (m, E) from the nearest of the means (C, E)."""
    away = features[:, None] - means
    return torch.einsum("mce,ef,mcf->mc", away, precision, away).amin(-1)


if __name__ == "__main__":
    typer.run(main)
