"""Inspect labelled images before training: a page and a CSV file of what was found."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.api.inputs import Groups, Images, Labels, labelled
from dcp_zoo.backbone.classes import check_classnames
from dcp_zoo.data import (
    PARTS,
    Split,
    bursts,
    by_key,
    group_ids,
    joined,
    load_labelled,
    near_copies,
    thumbnails,
    unreadable_summary,
    with_groups,
)
from dcp_zoo.errors import ZooError, shorten
from dcp_zoo.features import FeatureTable, comparable, looks_few, pick_device, users_cache, with_subjects
from dcp_zoo.features.extract import plain_reading
from dcp_zoo.files import write_file
from dcp_zoo.pages import templates
from dcp_zoo.probe.candidates import TrainingSet, columns_of, fit_candidates
from dcp_zoo.probe.fit import ReadingFeatures
from dcp_zoo.probe.folds import folds, shares, within_class
from dcp_zoo.probe.stacking import cross_validate, prior_weights
from dcp_zoo.progress import Progress, bar
from dcp_zoo.tables import INSPECTION_PAGE, INSPECTION_TABLE, LEAVE_OUT, NONE, write_csv
from dcp_zoo.threads import fair_threads
from dcp_zoo.training.evaluation import Evaluation
from dcp_zoo.training.methods.text_probe import on_cpu
from dcp_zoo.zoo.build import plain_clip

SHOWN = 60  # pictures of a section
SURE = 20  # how many times as probable as the label another class is, for a label that is probably wrong
PER_CLASS = 3  # the same times the number of classes, if that is more
IQR = 1.349  # standard deviations between the quartiles of a normal distribution
SHOTS = (1, 2, 4, 8, 16)  # images per class of the learning curve
DRAWS = 5  # random samples of each
TESTED = 1000  # images on which a sample is tested, at most
T_QUANTILE = 2.776  # of Student's t for a 95 % interval of the mean of `DRAWS` samples


class Point(NamedTuple):
    """A point of a learning curve: images per class, accuracy in percent, and its 95 % interval over random
    draws."""

    images: int
    accuracy: float
    low: float
    high: float


class Inspected(NamedTuple):
    """What was found about one image: a row of the CSV file."""

    file: str  # its path in the folder, or for an image in memory its number
    label: str  # its class
    part: str = PARTS[0]  # train, val or test
    problems: str = ""  # cannot be read, label?, no class? and twice, joined by ";"
    looks_like: str = ""  # the most probable class by the other images
    label_probability: float | None = None  # of its own class, from 0 to 1
    same_as: str = ""  # another file with the same picture
    group: str = ""  # the same for images that were taken together, or ""
    suggestion: str = ""  # what to do: "leave out", the name of another class, or ""


@dataclass(frozen=True)
class Inspection:
    """What was found about n labelled images, which are named by their positions."""

    data: Split
    seen: FeatureTable  # their features, and why some cannot be read
    log_probabilities: Tensor  # (m, C), of those that can be read by a classifier fitted without the image and its
    # group; of an image that cannot be left out, as its class has no other group, by the text
    answers: Evaluation  # by the former
    suspects: list[int]  # images whose label is probably wrong, the most suspicious first
    of_no_class: list[int]  # images that may show none of the classes, the least like them first
    copies: list[list[int]]  # images that show the same picture
    groups: Tensor  # (n,), the same for images that were taken together: no estimate is made across a group
    few_subjects: bool  # whether the groups are guesses, as these look like few subjects
    curve: list[Point]  # the accuracy to expect with more and fewer images per class

    def __repr__(self) -> str:
        return f"<Inspection of {len(self.data.items)} images: {self.summary}>"

    @property
    def summary(self) -> str:
        """How many images have which problem."""
        counts = {
            "labels that may be wrong": len(self.suspects),
            "images that may show none of the classes": len(self.of_no_class),
            "groups of duplicates": len(self.copies),
            "groups that were taken together": len(self.together),
            "of these across classes": len(self.across_classes),
            "images that cannot be read": len(self.seen.errors),
        }
        return "; ".join(f"{what}: {count}" for what, count in counts.items())

    @cached_property
    def together(self) -> list[list[int]]:
        """The groups of several images, by their positions."""
        members = by_key(range(len(self.groups)), self.groups.tolist())
        return [group for group in members.values() if len(group) > 1]

    @property
    def across_classes(self) -> list[list[int]]:
        """The groups whose images have several labels: of one moment, or one picture, few show two
        classes."""
        return [group for group in self.together if len({self.data.items[i].label for i in group}) > 1]

    @property
    def rows(self) -> list[Inspected]:
        """One for each image, those with a suggestion first."""
        return sorted(self.in_order, key=lambda row: (not row.suggestion, not row.problems))

    @cached_property
    def in_order(self) -> list[Inspected]:
        """The rows in the order of the images."""
        items = self.data.items
        names = self.data.classnames
        parts = [part for part in PARTS for _ in getattr(self.data, part)]
        probabilities = dict(zip(self.seen.readable, self.log_probabilities.exp(), strict=True))
        group_of = {i: str(number) for number, group in enumerate(self.together, 1) for i in group}
        copies_of = {i: group for group in self.copies for i in group}
        problems = {
            "cannot be read": set(self.seen.errors),
            "label?": set(self.suspects),
            "no class?": set(self.of_no_class),
            "twice": set(copies_of),
        }
        superfluous = set(self.seen.errors)
        for group in self.copies:  # of copies in a class a test image stays, else the first; of those in two, all stay
            kept = set[int]()
            for i in sorted(group, key=lambda i: (parts[i] != "test", i)):
                if items[i].label in kept:
                    superfluous.add(i)
                kept.add(items[i].label)
        rows = []
        for i, item in enumerate(items):
            copies = [items[other] for other in copies_of.get(i, []) if other != i]
            looks_like = ""
            label_probability = None
            if i in probabilities:
                looks_like = names[int(probabilities[i].argmax())]
                label_probability = round(float(probabilities[i][item.label]), 4)
            is_there = looks_like in [names[copy.label] for copy in copies]
            suggestion = looks_like if i in problems["label?"] else ""
            if i in superfluous or (suggestion and is_there):
                suggestion = LEAVE_OUT
            rows.append(
                Inspected(
                    file=item.key,
                    label=names[item.label],
                    part=parts[i],
                    problems=";".join(problem for problem, images in problems.items() if i in images),
                    looks_like=looks_like,
                    label_probability=label_probability,
                    same_as=copies[0].key if copies else "",
                    group=group_of.get(i, ""),
                    suggestion=suggestion,
                )
            )
        return rows

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Write the page and the CSV file into a folder; their paths. The file is a labels file: in its
        column `class` a person writes another class, or "leave out". ZooError if it is not writable."""
        page = Path(folder) / INSPECTION_PAGE
        table = Path(folder) / INSPECTION_TABLE
        write_file(page, self.page())
        columns = ["file", "class", *Inspected._fields[2:]]
        none = [Inspected(item.key, NONE) for item in self.data.no_class]
        write_file(table, lambda temporary: write_csv(temporary, columns, [*self.rows, *none]))
        return page, table

    def page(self) -> str:
        """The page as HTML, with everything in it."""
        rows = self.in_order
        listed = self.together if self.few_subjects else self.across_classes
        spanning = [group for group in listed if group not in self.copies]
        groups = (self.copies + spanning)[: SHOWN // 2]
        shown = {*self.suspects[:SHOWN], *self.of_no_class[:SHOWN], *(i for group in groups for i in group[:8])}
        pictures = thumbnails(self.data.items[i].path for i in shown)
        page = templates(__package__).get_template("inspection.html.jinja")
        return page.render(
            title=f"Inspection of {Path(self.data.source).name}",
            inspection=self,
            rows=rows,
            pictures={rows[i].file: picture for i, picture in zip(shown, pictures, strict=True)},
            groups=[[rows[i] for i in group] for group in groups],
            shown=SHOWN,
        )


@fair_threads()
@torch.no_grad()
def inspect(
    images: Images,
    labels: Labels = None,
    *,
    groups: Groups = None,
    model: str = "dcp_mini",
    device: str = "auto",
    progress: Progress = bar,
) -> Inspection:
    """Inspect images before training: wrong labels, duplicates, classes that look alike, and the accuracy to
    expect. ZooError for no such folder, fewer than two classes, or a class without a readable image.

    Args:
        images: a folder with one folder per class, or with `train/CLASS` and `test/CLASS`; a sequence of
            images, see `train`; or a `dcp_zoo.data.Split`.
        labels: one per image; for a folder omitted, or a CSV file with the columns file and class.
        groups: one per image of a sequence, see `dcp_zoo.train`: no image is judged by its group.
        model: its frozen features are used, and kept in the user's cache for a folder.
        device: "auto", "cpu", "cuda" or "mps".
        progress: see `train`.
    """
    data = _read(images, labels, groups)
    check_classnames(data.classnames)
    clip = plain_clip(model).to(pick_device(device))
    with users_cache() if isinstance(images, (str, Path, Split)) else nullcontext():
        seen = comparable(data.items, clip, progress)
    assert seen.facts is not None
    facts = seen.facts.numpy()
    readable = seen.readable
    target = seen.labels[readable]
    empty = [name for label, name in enumerate(data.classnames) if not (target == label).any()]
    if empty:
        broken = unreadable_summary(data.items, seen.errors)
        raise ZooError(f"No image of {shorten(empty)} can be read. {broken}. Replace them, or remove the class.")
    text = on_cpu(clip.scaled(clip.zero_shot_classifier(data.classnames)))
    read = plain_reading(clip).only(len(seen.widths[0]))
    features = ReadingFeatures(seen.rows()[:, readable], text, read.parts)
    copies = near_copies(seen.joined.numpy(), facts)
    items = data.items
    if not any(item.group for item in items):
        grouped = with_groups(items, joined([*copies, *bursts(facts)]))
        items = with_subjects(grouped, seen.embeddings.joined.numpy())
    groups = group_ids([item.group for item in items])
    judged = out_of_fold(features, target, groups[readable])
    tested = [data.items[readable[i]] for i in judged.left_out]
    return Inspection(
        data,
        seen,
        judged.log_probabilities,
        Evaluation(data.classnames, tested, judged.log_probabilities[judged.left_out]),
        [readable[i] for i in suspected(judged)],
        [readable[i] for i in of_no_class(judged)],
        joined(copies),
        groups,
        looks_few(items),
        learning_curve(judged),
    )


def _read(images: Images, labels: Labels, groups: Groups) -> Split:
    if isinstance(images, Split):
        return images
    if isinstance(images, (str, Path)) and (labels is None or Path(images).is_dir()):
        return load_labelled("folder", images, labels)
    _, split = labelled(images, labels, groups=groups)
    return replace(split, source=f"{len(split.train)} images")


@dataclass(frozen=True)
class OutOfFold:
    """What text probes that were fitted without it say of each of n images."""

    log_probabilities: Tensor  # (n, C)
    distances: Tensor  # (n,), to the nearest class mean, 1 on average
    left_out: Tensor  # (m,), positions, in order, of the images that are not the only group of their class
    images: TrainingSet
    groups: Tensor  # (n,)

    @property
    def of_label(self) -> Tensor:
        """The log-probability (n,) of each image's label."""
        return self.log_probabilities.gather(1, self.images.labels[:, None])[:, 0]


def out_of_fold(given: ReadingFeatures, labels: Tensor, groups: Tensor) -> OutOfFold:
    """What the images of other groups say of each, in four folds, of features (1, n, ..), labels and groups
    (n,). The only group of a class is judged by the text, at no distance."""
    assert given.start is not None
    images = TrainingSet(given.features, columns_of(given.widths), labels, given.start, shares(groups))
    log_probabilities = (images.scales(images.all) * images.text_logits).log_softmax(1)
    distances = torch.zeros(len(labels))
    left_out = torch.empty(0, dtype=torch.long)
    parts = folds(labels, groups)
    if parts:
        validation = cross_validate(images, parts)
        left_out = validation.positions
        log_probabilities[left_out] = validation.logits()[0].log_softmax(1)
        distances[left_out] = validation.distances()
    distances /= distances.mean().clamp(min=1e-6)
    return OutOfFold(log_probabilities, distances, left_out.sort().values, images, groups)


def suspected(judged: OutOfFold) -> list[int]:
    """The images for which another class is `SURE` times as probable as their label, or with many classes,
    one of which is easily like the image, `PER_CLASS` times their number; the most suspicious first.
    At equal numbers, this order finds more wrong labels than confident learning: see
    `benchmarks/inspection.py`."""
    doubt = judged.log_probabilities.amax(1) - judged.of_label
    order = doubt.argsort(descending=True, stable=True)
    return order[doubt[order] > math.log(max(SURE, PER_CLASS * judged.log_probabilities.shape[1]))].tolist()


def of_no_class(judged: OutOfFold) -> list[int]:
    """The images that may show none of the classes, the least like them first: their `in_distribution_score`
    lies three standard deviations, estimated from the quartiles, below the median, or one if their own class
    has a probability below 1 / `SURE`. Chosen on art paintings, cartoons and Tiny ImageNet, see
    `benchmarks/inspection.py`."""
    scores = torch.from_numpy(in_distribution_score(judged.log_probabilities.numpy(), judged.distances.numpy()))
    low, middle, high = scores.quantile(scores.new_tensor([0.25, 0.5, 0.75]))
    deviations = torch.where(judged.of_label < -math.log(SURE), 1, 3)
    odd = (judged.distances > 0) & (scores < middle - deviations * (high - low) / IQR)
    order = scores.argsort(stable=True)
    return order[odd[order]].tolist()


def learning_curve(judged: OutOfFold) -> list[Point]:
    """Accuracy at 1 to 16 images per class, each of another group, as far as half of the classes have more
    groups, on images of groups that were not drawn."""
    labels = judged.images.labels
    sizes = torch.bincount(labels[_first_of(judged.groups)], minlength=int(labels.max()) + 1)
    points = []
    for shots in SHOTS:
        if 2 * (sizes > shots).sum() <= len(sizes):
            break
        generator = torch.Generator().manual_seed(0)
        most = (sizes - 1).clamp(1, shots)
        accuracies = [_of_sample(judged, most[labels], generator) for _ in range(DRAWS)]
        margin = T_QUANTILE * stdev(accuracies) / DRAWS**0.5
        accuracy = mean(accuracies)
        points.append(Point(shots, accuracy, max(0, accuracy - margin), min(100, accuracy + margin)))
    return points


def _of_sample(judged: OutOfFold, most: Tensor, generator: torch.Generator) -> float:
    """The accuracy of a text probe that is fitted to a random sample, in percent; `most` (n,) is how many
    images of each one's class are drawn."""
    images = judged.images
    order = torch.randperm(len(images.labels), generator=generator)
    single = order[_first_of(judged.groups[order])]  # an image of each group
    drawn = single[within_class(images.labels[single]) < most[single]].sort().values
    tested = order[~torch.isin(judged.groups[order], judged.groups[drawn])][:TESTED]
    few = replace(images.select(drawn), weights=torch.ones(len(drawn)))
    scale = few.scales(few.all)
    prior = prior_weights(few, scale)
    parts = folds(few.labels)
    weights = cross_validate(few, parts, is_judged=False).weights if parts else prior
    probe = fit_candidates(few, few.all, scale, weights).mean(0, weights)
    logits = probe.logits(scale * images.text_logits[tested], images.views[0, tested])
    return 100 * (logits.argmax(1) == images.labels[tested]).float().mean().item()


def _first_of(groups: Tensor) -> Tensor:
    """The positions, in order, of the first image of each group."""
    return torch.from_numpy(np.sort(np.unique(groups.numpy(), return_index=True)[1]))
