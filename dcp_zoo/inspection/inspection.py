"""Inspect labelled images before training: a page and a CSV file of what was found."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch

from dcp_zoo.api.inputs import Images, Labels, is_folder, labelled
from dcp_zoo.backbone.classes import check_classnames
from dcp_zoo.data import Item, Split, load_labelled
from dcp_zoo.data.find import find_images
from dcp_zoo.data.images import thumbnails
from dcp_zoo.data.progress import Progress, bar
from dcp_zoo.data.splits import PARTS, shorten
from dcp_zoo.errors import ZooError, by_reason
from dcp_zoo.files import templates, write_file
from dcp_zoo.inspection.labels import Point, learning_curve, of_no_class, out_of_fold, suspected, unknown
from dcp_zoo.inspection.look import Seen, look, same_pictures
from dcp_zoo.probe import ReadingFeatures
from dcp_zoo.tables import INSPECTION_PAGE, INSPECTION_TABLE, LEAVE_OUT, NONE, write_csv
from dcp_zoo.threads import fair_threads
from dcp_zoo.training.device import pick_device
from dcp_zoo.training.evaluation import Evaluation
from dcp_zoo.training.methods.text_probe import on_cpu
from dcp_zoo.zoo.factory import plain_clip

UNLABELLED = [""]  # the class of images without labels
SHOWN = 60  # pictures of a section
DARK, FLAT, NARROW, BLURRED = 0.32, 0.1, 0.35, 0.1  # the first and third as in cleanvision; see `problems_of`


class Inspected(NamedTuple):
    """What was found about one image: a row of the CSV file."""

    file: str  # its path in the folder, or for an image in memory its number
    label: str  # its class
    part: str  # train, val or test
    problems: str  # cannot be read, small, dark, blank, narrow, blurred, label?, no class? and twice, joined by ";"
    looks_like: str  # the most probable class by the other images
    label_probability: float | None  # of its own class, from 0 to 1
    same_as: str  # another file with the same picture
    suggestion: str  # what to do: "leave out", the name of another class, or ""


@dataclass(frozen=True)
class Inspection:
    """What was found about n labelled images, which are named by their positions."""

    data: Split
    seen: Seen  # their features and statistics
    answers: Evaluation  # each by a classifier fitted without the image, for those that can be read
    suspects: list[int]  # images whose label is probably wrong, the most suspicious first
    of_no_class: list[int]  # images that may show none of the classes, the least like them first
    groups: list[list[int]]  # images that show the same picture
    problems: dict[int, list[str]]  # what else is wrong with images
    curve: list[Point]  # the accuracy to expect with more and fewer images per class
    unknown: Sequence[str] = ()  # classes whose names say CLIP little, see `labels.unknown`

    def __repr__(self) -> str:
        found = {
            "labels probably wrong": len(self.suspects),
            "may show no class": len(self.of_no_class),
            "groups of the same picture": len(self.groups),
            "with other problems": len(self.problems),
        }
        counts = ", ".join(f"{count} {what}" for what, count in found.items())
        return f"<Inspection of {len(self.data.items)} images: {counts}>"

    @cached_property
    def rows(self) -> list[Inspected]:
        """One for each image, those with a suggestion first."""
        items, names, parts = self.data.items, self.data.classnames, parts_of(self.data)
        readable = [i for i in range(len(items)) if i not in self.seen.errors]
        answers = dict(zip(readable, self.answers.logits.exp(), strict=True)) if names != UNLABELLED else {}
        suspects, of_no_class = set(self.suspects), set(self.of_no_class)
        twins = {i: group for group in self.groups for i in group}
        rows = []
        for i, item in enumerate(items):
            looks = names[int(answers[i].argmax())] if i in answers else ""
            own = round(float(answers[i][item.label]), 4) if i in answers else None
            others = [other for other in twins.get(i, []) if other != i]
            marks = {"label?": i in suspects, "no class?": i in of_no_class, "twice": bool(others)}
            found = [*self.problems.get(i, []), *(mark for mark, holds in marks.items() if holds)]
            # of one class the first stays, but a test image before others; of two only a person knows which is right
            kept = (o for o in others if (parts[o] != "test", o) < (parts[i] != "test", i))
            twin_to_drop = any(items[o].label == item.label for o in kept)
            is_there = any(names[items[o].label] == looks for o in others)
            drop = i in self.seen.errors or twin_to_drop or (i in suspects and is_there)
            suggestion = LEAVE_OUT if drop else looks if i in suspects else ""
            same_as = items[others[0]].key if others else ""
            rows += [Inspected(item.key, names[item.label], parts[i], ";".join(found), looks, own, same_as, suggestion)]
        return sorted(rows, key=lambda row: (not row.suggestion, not row.problems))

    def write(self, folder: str | Path) -> tuple[Path, Path]:
        """Write the page and the CSV file into a folder; their paths. The file is a labels file, in whose column
        `change` a person writes another class, or "leave out". ZooError if it is not writable."""
        page, table = Path(folder) / INSPECTION_PAGE, Path(folder) / INSPECTION_TABLE
        write_file(page, self.page())
        columns = ["file", "class", *Inspected._fields[2:], "change"]
        none = [Inspected(item.key, NONE, PARTS[0], "", "", None, "", "") for item in self.data.none]
        rows = [[*row, ""] for row in (*self.rows, *none)]
        write_file(table, lambda temporary: write_csv(temporary, columns, rows))
        return page, table

    def page(self) -> str:
        """The page as HTML, with everything in it."""
        items, names, parts = self.data.items, self.data.classnames, parts_of(self.data)
        weakest = sorted(self.answers.per_class, key=lambda row: (row.percent, row.images))
        odd = [i for i in self.problems if i not in self.seen.errors]
        groups = [(_title(group, items, parts), group[:8]) for group in self.groups[: SHOWN // 2]]
        lists = self.suspects, self.of_no_class, odd
        shown = {*(i for found in lists for i in found[:SHOWN]), *(i for _, group in groups for i in group)}
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
            odd=odd,
            shown=SHOWN,
            weakest=weakest,
            labelled=names != UNLABELLED,
        )


def _title(group: list[int], items: Sequence[Item], parts: Sequence[str]) -> str:
    """The heading of a group of images of the same picture."""
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
    model: str = "dcp_mini",
    device: str = "auto",
    progress: Progress = bar,
) -> Inspection:
    """Inspect images before training: wrong labels, duplicates, bad images, classes that look alike, and the accuracy
    to expect. ZooError for no such folder, fewer than two classes, or a class without a readable image.

    Args:
        images: a folder with one folder per class, or with `train/CLASS` and `test/CLASS`; a sequence of images, see
            `train`; or a `dcp_zoo.data.Split`.
        labels: one per image; for a folder omitted, or a CSV file with the columns file and class. False for an
            unsorted folder, of which only duplicates and bad images are found.
        model: its frozen features are used, and kept in the user's cache for a folder.
        device: "auto", "cpu", "cuda" or "mps".
        progress: see `train`.
    """
    data = _unsorted(images) if labels is False else _read(images, labels)
    if labels is not False:
        check_classnames(data.classnames)
    clip = plain_clip(model).to(pick_device(device))
    keep = isinstance(images, (str, Path))
    seen = look([item.path for item in data.items], clip, keep, progress)
    readable = [i for i in range(len(data.items)) if i not in seen.errors]
    items = [data.items[i] for i in readable]
    groups = same_pictures(seen.features, seen.grey)
    problems = dict(problems_of(seen, clip.pretrained_cfg["input_size"][-1]))
    if labels is False:
        nothing = Evaluation(data.classnames, items, torch.zeros(len(items), 1))
        return Inspection(data, seen, nothing, [], [], groups, problems, [])
    target = torch.tensor([item.label for item in items]).long()
    if empty := [name for label, name in enumerate(data.classnames) if not (target == label).any()]:
        problem = f"No image of {shorten(empty)} can be read: {unreadable(data, seen)}"
        raise ZooError(f"{problem}. Replace them, or remove the class.")

    text = on_cpu(clip.scaled(clip.zero_shot_classifier(data.classnames)))
    judged = out_of_fold(
        ReadingFeatures(torch.from_numpy(seen.parts[None, readable]), text, tuple(seen.widths)), target
    )
    return Inspection(
        data,
        seen,
        Evaluation(data.classnames, items, judged.log_probabilities),
        [readable[i] for i in suspected(judged.log_probabilities, target)],
        [readable[i] for i in of_no_class(judged.log_probabilities, judged.distances, target)],
        groups,
        problems,
        learning_curve(judged),
        [data.classnames[label] for label in unknown(judged.images.text_logits(judged.images.views[0]), target)],
    )


def parts_of(data: Split) -> list[str]:
    """The part of each of `data.items`."""
    return [part for part in PARTS for _ in getattr(data, part)]


def unreadable(data: Split, seen: Seen) -> str:
    """The images that cannot be read, and why, see `by_reason`."""
    return by_reason({data.items[i].key: reason for i, reason in seen.errors.items()})


def _read(images: Images, labels: Labels) -> Split:
    if isinstance(images, Split):
        return images
    if is_folder(images) or (isinstance(images, (str, Path)) and labels is None):
        return load_labelled("folder", images, labels)
    given = labelled(images, labels, features=False)
    return Split("images", given.names, given.items, none=given.none, place=f"{len(given.items)} images")


def _unsorted(folder: Images) -> Split:
    found = find_images([str(folder)])
    items = [Item(image.path, os.path.relpath(image.name, folder), 0) for image in found]
    return Split("unsorted", UNLABELLED, items, place=str(folder))


def problems_of(seen: Seen, side: int) -> Iterable[tuple[int, list[str]]]:
    """Images with problems for a model whose input has this side in pixels: their positions, and which problems."""
    for i, (width, height, low, high, detail) in enumerate(seen.statistics):
        shorter, longer = sorted((width, height))
        found = {
            "cannot be read": i in seen.errors,
            "small": 4 * shorter < side,
            "dark": high < DARK,
            "blank": high - low < FLAT,
            "narrow": shorter < NARROW * longer,
            "blurred": high - low >= FLAT and detail < BLURRED,
        }
        if any(found.values()):
            yield i, [problem for problem, holds in found.items() if holds]
