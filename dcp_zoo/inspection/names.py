"""Class names: whether CLIP knows them, and whether other names suit the images better."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from dcp_zoo.data.splits import Split
from dcp_zoo.errors import ZooError, as_zoo_error, nearest_hint
from dcp_zoo.inspection.labels import OutOfFold
from dcp_zoo.texts import class_name, folder_name, read_csv
from dcp_zoo.training.accuracy import Accuracy

# Of ImageNet's names with ViT-B/32 and four images per class, at most 1 in 100 is below, and of names of other classes
# three in four.
KNOWN = 0.7


class Gain(NamedTuple):
    """The accuracies with the old and the new names, and the 95 % interval of the difference in percentage points."""

    by: str
    old: Accuracy
    new: Accuracy
    low: float
    high: float

    def __str__(self) -> str:
        gain = self.new.percent - self.old.percent
        accuracies = f"{self.old.percent:.1f} % with the old names, {self.new.percent:.1f} % with the new ones"
        return f"{self.by}: {accuracies}, {gain:+.1f} ({self.low:+.1f} to {self.high:+.1f}) percentage points"


def unknown(text: Tensor, labels: Tensor) -> list[int]:
    """The classes whose name says little about images, by zero-shot logits (n, C) and labels (n,): in less than `KNOWN`
    of all pairs, an image of the class is more like the name than one of another class. By chance it is in half."""
    ranks, found = text.argsort(0).argsort(0).double(), []
    for label in range(text.shape[1]):
        of_class = labels == label
        images, others = int(of_class.sum()), int((~of_class).sum())
        above = ranks[of_class, label].sum().item() - images * (images - 1) / 2
        found += [label] if above < KNOWN * images * others else []
    return found


def gains_of(old: OutOfFold, new: OutOfFold, labels: Tensor) -> list[Gain]:
    """What the new names change, for zero-shot CLIP and for text probes."""
    pairs = {
        "By the names alone": (old.task.text_logits, new.task.text_logits),
        "By a text probe": (old.log_probabilities, new.log_probabilities),
    }
    return [gain(by, before.argmax(1), after.argmax(1), labels) for by, (before, after) in pairs.items()]


def gain(by: str, old: Tensor, new: Tensor, labels: Tensor) -> Gain:
    """What the new names change, by the answers (n,) with both."""
    before, after = old == labels, new == labels
    difference = after.double() - before.double()
    mean, spread = 100 * difference.mean().item(), 196 * difference.std().item() / len(labels) ** 0.5
    accuracies = [Accuracy("", int(right.sum()), len(labels)) for right in (before, after)]
    return Gain(by, accuracies[0], accuracies[1], mean - spread, mean + spread)


def read_names(given: Iterable[str], classnames: Sequence[str]) -> dict[str, str]:
    """The new names in OLD=NEW, or in files with the columns class and name; ZooError for what is no class."""
    pairs = list[tuple[str, str]]()
    for text in given:
        with as_zoo_error(f"Cannot read {text} ({{}}): pass a .csv with the columns class and name."):
            rows = read_csv(Path(text))[1:] if text.endswith(".csv") else [[*text.partition("=")[::2]]]
            pairs += [(old, new) for old, new, *_ in rows]
    for old, new in pairs:
        if old not in classnames or not new:
            hint = nearest_hint(old, classnames)
            raise ZooError(f"--names takes CLASS=NAME, or a .csv with the columns class and name, not {old!r}.{hint}")
    return dict(pairs)


def renaming(data: Split, names: Mapping[str, str]) -> list[str]:
    """The commands that rename the class folders; none where a class is no folder."""
    items = [(Path(item.key), data.classnames[item.label]) for item in data.items]
    folders = {place: name for key, name in items for place in key.parents if class_name(place.name) == name}
    pairs = {Path(data.place, place): folder_name(names[name]) for place, name in folders.items() if name in names}
    return [shlex.join(["mv", str(old), str(old.with_name(new))]) for old, new in sorted(pairs.items())]
