"""Inspect labelled images before training: a page and a CSV file of what was found."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dcp_zoo.answers import in_distribution_score
from dcp_zoo.api.inputs import Groups, Images, Labels, is_folder, labelled
from dcp_zoo.backbone.classes import check_classnames
from dcp_zoo.data import Item, Split, load_labelled
from dcp_zoo.data.groups import bursts, group_ids, grouped, joined, near_copies
from dcp_zoo.data.images import Progress, bar, thumbnails
from dcp_zoo.data.splits import PARTS
from dcp_zoo.errors import ZooError, by_reason, shorten
from dcp_zoo.files import templates, write_file
from dcp_zoo.inspection.look import Seen, look
from dcp_zoo.probe.candidates import Evidence, TrainingSet, fit_candidates, mean_of
from dcp_zoo.probe.estimates import text_scale
from dcp_zoo.probe.evidence import leave_out_each, without_evidence
from dcp_zoo.probe.fit import ReadingFeatures
from dcp_zoo.probe.folds import folds, shares, within_class
from dcp_zoo.tables import INSPECTION_PAGE, INSPECTION_TABLE, LEAVE_OUT, NONE, write_csv
from dcp_zoo.threads import fair_threads
from dcp_zoo.training.device import pick_device
from dcp_zoo.training.evaluation import Evaluation
from dcp_zoo.training.methods.text_probe import on_cpu
from dcp_zoo.zoo.build import plain_clip

SHOWN = 60  # pictures of a section
SURE, PER_CLASS = 20, 3
IQR = 1.349  # standard deviations between the quartiles of a normal distribution
SHOTS, DRAWS, TESTED = (1, 2, 4, 8, 16), 5, 1000  # of the learning curve; images tested at most


class Point(NamedTuple):
    """A point of a learning curve: images per class, accuracy in percent, and its 95 % interval over random draws."""

    images: int
    accuracy: float
    low: float
    high: float


class Inspected(NamedTuple):
    """What was found about one image: a row of the CSV file."""

    file: str  # its path in the folder, or for an image in memory its number
    label: str  # its class
    part: str  # train, val or test
    problems: str  # cannot be read, label?, no class? and twice, joined by ";"
    looks_like: str  # the most probable class by the other images
    label_probability: float | None  # of its own class, from 0 to 1
    same_as: str  # another file with the same picture
    group: str  # the same for images that were taken together, or ""
    suggestion: str  # what to do: "leave out", the name of another class, or ""


@dataclass(frozen=True)
class Inspection:
    """What was found about n labelled images, which are named by their positions."""

    data: Split
    seen: Seen  # their features, and why some cannot be read
    answers: Evaluation  # each by a classifier fitted without the image, for those that can be read
    suspects: list[int]  # images whose label is probably wrong, the most suspicious first
    of_no_class: list[int]  # images that may show none of the classes, the least like them first
    copies: list[list[int]]  # images that show the same picture
    groups: Tensor  # (n,), the same for images that were taken together: no estimate is made across a group
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
        order, sizes = self.groups.argsort(stable=True), torch.bincount(self.groups).tolist()
        return [group.tolist() for group in order.split(sizes) if len(group) > 1]

    @property
    def across_classes(self) -> list[list[int]]:
        """The groups whose images have several labels: of one moment, or one picture, few show two classes."""
        return [group for group in self.together if len({self.data.items[i].label for i in group}) > 1]

    @cached_property
    def rows(self) -> list[Inspected]:
        """One for each image, those with a suggestion first."""
        items, names, parts = self.data.items, self.data.classnames, parts_of(self.data)
        readable = [i for i in range(len(items)) if i not in self.seen.errors]
        answers = dict(zip(readable, self.answers.logits.exp(), strict=True))
        group_of = {i: str(number) for number, group in enumerate(self.together, 1) for i in group}
        suspects, of_no_class = set(self.suspects), set(self.of_no_class)
        twins = {i: group for group in self.copies for i in group}
        rows = []
        for i, item in enumerate(items):
            looks = names[int(answers[i].argmax())] if i in answers else ""
            chance = round(float(answers[i][item.label]), 4) if i in answers else None
            same = [other for other in twins.get(i, []) if other != i]
            marks = {
                "cannot be read": i in self.seen.errors,
                "label?": i in suspects,
                "no class?": i in of_no_class,
                "twice": bool(same),
            }
            wrong = ";".join(mark for mark, holds in marks.items() if holds)
            # of copies in a class a test image stays, else the first; of those in two, a person decides
            kept = (o for o in same if (parts[o] != "test", o) < (parts[i] != "test", i))
            twin_to_drop = any(items[o].label == item.label for o in kept)
            is_there = any(names[items[o].label] == looks for o in same)
            drop = i in self.seen.errors or twin_to_drop or (i in suspects and is_there)
            advice = LEAVE_OUT if drop else looks if i in suspects else ""
            same_as = items[same[0]].key if same else ""
            of_image = item.key, names[item.label], parts[i], wrong, looks, chance, same_as, group_of.get(i, "")
            rows += [Inspected(*of_image, advice)]
        return sorted(rows, key=lambda row: (not row.suggestion, not row.problems))

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Write the page and the CSV file into a folder; their paths. The file is a labels file: in its column `class`
        a person writes another class, or "leave out". ZooError if it is not writable."""
        page, table = Path(folder) / INSPECTION_PAGE, Path(folder) / INSPECTION_TABLE
        write_file(page, self.page())
        columns = ["file", "class", *Inspected._fields[2:]]
        none = [Inspected(item.key, NONE, PARTS[0], "", "", None, "", "", "") for item in self.data.none]
        write_file(table, lambda temporary: write_csv(temporary, columns, [*self.rows, *none]))
        return page, table

    def page(self) -> str:
        """The page as HTML, with everything in it."""
        items, names, parts = self.data.items, self.data.classnames, parts_of(self.data)
        weakest = sorted(self.answers.per_class, key=lambda row: (row.percent, row.images))
        spanning = [group for group in self.across_classes if group not in self.copies]
        groups = [(_title(group, items, parts), group[:8]) for group in (self.copies + spanning)[: SHOWN // 2]]
        shown = {*self.suspects[:SHOWN], *self.of_no_class[:SHOWN], *(i for _, group in groups for i in group)}
        pictures = dict(zip(shown, thumbnails([items[i].path for i in shown]), strict=True))
        page = templates(__package__).get_template("inspection.html.jinja")
        return page.render(
            title=f"Inspection of {Path(self.data.place).name}",
            inspection=self,
            rows={row.file: row for row in self.rows},
            items=items,
            names=names,
            parts=parts if len(set(parts)) > 1 else None,
            pictures=pictures,
            groups=groups,
            shown=SHOWN,
            weakest=weakest,
        )


def _title(group: list[int], items: Sequence[Item], parts: Sequence[str]) -> str:
    classes, places = {items[i].label for i in group}, {parts[i] for i in group}
    across_classes = f"across {len(classes)} classes" if len(classes) > 1 else ""
    across_parts = f"across {' and '.join(sorted(places))}" if len(places) > 1 else ""
    return ", ".join(filter(None, (f"{len(group)} images", across_classes, across_parts)))


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
    """Inspect images before training: wrong labels, duplicates, classes that look alike, and the accuracy to expect.
    ZooError for no such folder, fewer than two classes, or a class without a readable image.

    Args:
        images: a folder with one folder per class, or with `train/CLASS` and `test/CLASS`; a sequence of images, see
            `train`; or a `dcp_zoo.data.Split`.
        labels: one per image; for a folder omitted, or a CSV file with the columns file and class.
        groups: one per image of a sequence, see `dcp_zoo.train`: no image is judged by its group.
        model: its frozen features are used, and kept in the user's cache for a folder.
        device: "auto", "cpu", "cuda" or "mps".
        progress: see `train`.
    """
    data = _read(images, labels, groups)
    check_classnames(data.classnames)
    clip = plain_clip(model).to(pick_device(device))
    seen = look([item.path for item in data.items], clip, isinstance(images, (str, Path, Split)), progress)
    readable = [i for i in range(len(data.items)) if i not in seen.errors]
    items = [data.items[i] for i in readable]
    target = torch.tensor([item.label for item in items]).long()
    if empty := [name for label, name in enumerate(data.classnames) if not (target == label).any()]:
        problem = f"No image of {shorten(empty)} can be read: {unreadable(data, seen)}"
        raise ZooError(f"{problem}. Replace them, or remove the class.")

    text = on_cpu(clip.scaled(clip.zero_shot_classifier(data.classnames)))
    features = ReadingFeatures(torch.from_numpy(seen.parts[None, readable]), text, tuple(seen.widths))
    copies = near_copies(seen.joined, seen.facts)
    in_groups = grouped(data.items, lambda: joined([*copies, *bursts(seen.facts)]))
    groups = group_ids([item.group for item in in_groups])
    judged = out_of_fold(features, target, groups[readable])
    return Inspection(
        data,
        seen,
        Evaluation(data.classnames, items, judged.log_probabilities),
        [readable[i] for i in suspected(judged.log_probabilities, target)],
        [readable[i] for i in of_no_class(judged.log_probabilities, judged.distances, target)],
        joined(copies),
        groups,
        learning_curve(judged),
    )


def parts_of(data: Split) -> list[str]:
    return [part for part in PARTS for _ in getattr(data, part)]


def unreadable(data: Split, seen: Seen) -> str:
    """The images that cannot be read, and why, see `by_reason`."""
    return by_reason({data.items[i].key: reason for i, reason in seen.errors.items()})


def _read(images: Images, labels: Labels, groups: Groups) -> Split:
    if isinstance(images, Split):
        return images
    if is_folder(images) or (isinstance(images, (str, Path)) and labels is None):
        return load_labelled("folder", images, labels)
    given = labelled(images, labels, groups=groups)
    return Split("images", given.names, given.items, none=given.none, place=f"{len(given.items)} images")


@dataclass(frozen=True)
class OutOfFold:
    """What text probes that were fitted without it say of each of n images."""

    log_probabilities: Tensor  # (n, C)
    distances: Tensor  # (n,), to the nearest class mean, 1 on average
    images: TrainingSet
    groups: Tensor  # (n,)
    evidence: Evidence


def out_of_fold(given: ReadingFeatures, labels: Tensor, groups: Tensor) -> OutOfFold:
    """What the images of other groups say of each, in four folds, of features (1, n, ..), labels and groups (n,). The
    only group of a class is judged by the text, at no distance."""
    assert given.start is not None
    images = TrainingSet(given.features, given.widths, labels, given.start, weights=shares(groups))
    images = replace(images, scale=text_scale(images.text_logits(images.views[0]), labels, images.weights))
    log_probabilities = images.text_logits(images.views[0]).log_softmax(-1)
    distances = torch.zeros(len(labels))
    parts = folds(labels, groups)
    left_out, evidence = leave_out_each(images, parts)
    for out, fold in zip(parts, left_out, strict=True):
        log_probabilities[out] = fold.logits(evidence)[0].log_softmax(-1)
        distances[out] = fold.distances()
    distances /= distances.mean().clamp(min=1e-6)
    return OutOfFold(log_probabilities, distances, images, groups, evidence)


def suspected(log_probabilities: Tensor, labels: Tensor) -> list[int]:
    """The images for which another class is so many times as probable as their label, the most suspicious first:
    `SURE` times, or with many classes, one of which is the more easily like the image, `PER_CLASS` times their number.
    At equal numbers, this order finds more wrong labels than confident learning: see `benchmarks/inspection.py`."""
    doubt = log_probabilities.amax(1) - log_probabilities.gather(1, labels[:, None])[:, 0]
    order = doubt.argsort(descending=True, stable=True)
    return order[doubt[order] > math.log(max(SURE, PER_CLASS * log_probabilities.shape[1]))].tolist()


def of_no_class(log_probabilities: Tensor, distances: Tensor, labels: Tensor) -> list[int]:
    """The images that may show none of the classes, the least like them first: their `in_distribution_score` lies three
    standard deviations, estimated from the quartiles, below the median, or one if their own class has a probability
    below 1 / `SURE`. Chosen on art paintings, cartoons and Tiny ImageNet, see `benchmarks/inspection.py`."""
    scores = torch.from_numpy(in_distribution_score(log_probabilities.numpy(), distances.numpy()))
    low, middle, high = scores.quantile(scores.new_tensor([0.25, 0.5, 0.75]))
    is_doubtful = log_probabilities.gather(1, labels[:, None])[:, 0] < -math.log(SURE)
    odd = (distances > 0) & (scores < middle - torch.where(is_doubtful, 1, 3) * (high - low) / IQR)
    order = scores.argsort(stable=True)
    return order[odd[order]].tolist()


def learning_curve(judged: OutOfFold) -> list[Point]:
    """Accuracy at 1 to 16 images per class, each of another group, as far as half of the classes have more groups, on
    images of groups that were not drawn."""
    labels, groups = judged.images.labels, judged.groups
    sizes = torch.bincount(labels[_first_of(groups)], minlength=int(labels.max()) + 1)
    points = []
    for shots in SHOTS:
        if 2 * (sizes > shots).sum() <= len(sizes):
            break
        generator, values = torch.Generator().manual_seed(0), np.zeros(DRAWS)
        most = torch.minimum(sizes - 1, torch.tensor(shots)).clamp(min=1)[labels]
        for draw in range(DRAWS):
            order = torch.randperm(len(labels), generator=generator)
            single = order[_first_of(groups[order])]  # an image of each group
            drawn = torch.zeros(len(labels), dtype=torch.bool)
            drawn[single] = within_class(labels[single]) < most[single]
            tested = order[~torch.isin(groups[order], groups[drawn])][:TESTED]
            few, x = judged.images.of(drawn), judged.images.views[0][tested]
            evidence = without_evidence(few, len(few.widths)) if shots == 1 else judged.evidence
            mean = mean_of(fit_candidates(few, evidence), evidence, x.shape[1])
            right = mean.logits(few.text_logits(x), x).argmax(1) == labels[tested]
            values[draw] = 100 * right.float().mean().item()
        spread = 2.776 * values.std(ddof=1) / DRAWS**0.5  # Student's t of five draws
        points.append(Point(shots, values.mean(), max(0, values.mean() - spread), min(100, values.mean() + spread)))
    return points


def _first_of(groups: Tensor) -> Tensor:
    """The positions, in order, of the first image of each group."""
    return torch.from_numpy(np.sort(np.unique(groups.numpy(), return_index=True)[1]))
