"""What a head is worth on a folder without labels, by the labels of a few images that are chosen for it.

Images are put into strata of confidence, and more are drawn where the confidence says that errors are likely
(Neyman's allocation). Each labelled image stands for an equal part of its stratum, so that the estimate is
unbiased, however wrong the confidence is (Fogliato et al., A Framework for Efficient Model Evaluation Through
Stratification, Sampling, and Estimation, ECCV 2024, arXiv 2406.07320). The interval is Wilson's for as many
random images as would tell as much. The constants were chosen on PACS without its sketches and Caltech-101;
what others say is in `benchmarks/spot_check.py`.
"""

import math
import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from dcp_zoo.accuracy import wilson
from dcp_zoo.answers import Outputs, Promises, best
from dcp_zoo.api.functions import lent
from dcp_zoo.data import listed_image, not_trained_on
from dcp_zoo.errors import ZooError, as_zoo_error, check_choice, check_range
from dcp_zoo.features import AUTO, users_cache
from dcp_zoo.heads.head import Head
from dcp_zoo.inspection.search import TO_LABEL, Suggestion, check_new, items_in, write_found
from dcp_zoo.prediction.heads import outputs_of_readable
from dcp_zoo.progress import Progress, bar
from dcp_zoo.promises import TRUSTED
from dcp_zoo.tables import NONE, STRATUM, is_none, read_csv
from dcp_zoo.threads import fair_threads

LABELS = 30  # unless another number is asked for
STRATA = 4
EVEN = 0.05  # added to the deviations that strata share equally, so that sure images are not all in one
LEAST_ERROR = 0.05  # that is expected of a stratum, however sure the head is
PRIOR = 2  # images that each stratum is taken to have beside its own, at the rate of all: none is sure of itself
OF_STRATA = (STRATUM, "stratum_images")  # columns of the table, beside those of `TO_LABEL`


@dataclass(frozen=True)
class Share:
    """A share of images and the ends of its 95 % interval, in percent."""

    percent: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.percent:.1f} % (95 % interval {math.floor(self.low)} to {math.ceil(self.high)})"


@dataclass(frozen=True)
class Promise:
    """How often something that a head promises fails, of those images of the folder that it is about."""

    name: str
    allowed: float  # in percent
    failed: Share

    @property
    def verdict(self) -> str:
        """By the interval."""
        if self.failed.high <= self.allowed:
            return "holds"
        return "does not hold" if self.failed.low > self.allowed else "no sign against it"


@dataclass(frozen=True)
class SpotCheck:
    """What `spot_check` chose of a folder's images, and once these have labels, what they say of all.

    Attributes:
        to_label: the images to label, with the head's guesses.
        images: how many can be read and are none that the head was trained on.
        refused: the percentage of these that `--reject` refuses; None of a head that cannot.
        accuracy: on all of these, an image of none of the classes counting as wrong; None without labels.
        more_labels: about how many more halve its interval.
        promises: whether sets and trust hold, of a head that has these.
    """

    to_label: Sequence[Suggestion]
    images: int
    refused: float | None
    accuracy: Share | None = None
    more_labels: int | None = None
    promises: Sequence[Promise] = ()


@fair_threads()
def spot_check(
    images: str | Path,
    head: Head | str,
    *,
    label: int | None = None,
    labels: str | Path | None = None,
    output: str | Path | None = None,
    seed: int = 1,
    device: str | None = None,
    precision: str = AUTO,
    progress: Progress = bar,
) -> SpotCheck:
    """Choose which images of a folder without labels to look at, to know what a head is worth there; and with
    their labels, say so: the accuracy on the whole folder, and whether what the head promises holds. Images
    that the head was trained on are left out. ZooError for too few images, a table of another folder or head
    or with images without a class, an unknown class, or an unusable output.

    Args:
        images: a folder, also with subfolders.
        head, device, precision, progress: see `evaluate`. Features are kept in the user's cache.
        label: how many images to label. Default: 30.
        labels: the table of an earlier call, with its column `class` filled in. With a `label` above its
            number of rows, more images are chosen, and its classes are kept.
        output: a new folder for found.html, with pictures, and found.csv, whose column `class` waits for what
            a person sees: a class of the head, or `none of these`.
        seed: of the choice.
    """
    rows = [] if labels is None else read_chosen(Path(labels), Path(images))
    count = label or len(rows) or LABELS
    if count > len(rows):
        check_new(output, images)
    with lent(head, device) as model, users_cache():
        items = not_trained_on(items_in(images), model.info)
        if not items:
            raise ZooError(f"The head was trained on all images of {images}: pass others.")
        outputs, items = outputs_of_readable(model, items, 64, precision, progress)
        ranked = best(outputs.probabilities, model.classnames, 1)
        guesses = [Suggestion(item.path, *row[0][:2]) for item, row in zip(items, ranked, strict=True)]
        refused = None if outputs.rejected is None else 100 * float(outputs.rejected.mean())
        if count <= len(rows):
            return replace(told(rows, guesses, outputs, model), refused=refused)
    check_range("label", count, 2, len(guesses))
    chosen, strata = choose(outputs.probabilities.max(1), count, seed)
    to_label = [guesses[i] for i in chosen]
    if output is not None:
        known = {row["file"]: row["class"] for row in rows}
        sizes = np.bincount(strata)
        cells = [
            (file, known.get(os.path.realpath(file), ""), *guess, stratum, sizes[stratum])
            for (file, *guess), stratum in zip(to_label, strata[chosen], strict=True)
        ]
        write_found(Path(output), f"{count} images to label", to_label, (*TO_LABEL, *OF_STRATA), cells)
    return SpotCheck(to_label, len(guesses), refused)


def choose(confidence: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The positions (count,) of the images to label, by the confidence (n,) of all, and the stratum of each
    image (n,). From eight on, a larger choice holds a smaller one."""
    deviation = np.sqrt(confidence * (1 - confidence)) + EVEN
    order = np.argsort(-confidence, kind="stable")
    strata = np.empty(len(confidence), int)
    strata[order] = min(STRATA, count // 2) * (deviation[order].cumsum() - deviation[order]) / deviation.sum()
    _, strata, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    error = np.clip(1 - np.bincount(strata, confidence) / sizes, LEAST_ERROR, 0.5)
    places = np.empty(len(confidence))  # of each image in the random order of its stratum, from 0
    drawn = np.lexsort((np.random.default_rng(seed).permutation(len(confidence)), strata))
    places[drawn] = np.concatenate([np.arange(size) for size in sizes])
    saved = (sizes**2 * error * (1 - error))[strata]  # of the variance, by each; most by the first two of a stratum
    saved /= np.maximum(places * (places - 1), 1e-9)
    return np.argsort(-saved, kind="stable")[:count], strata


def share_of_all(sizes: np.ndarray, strata: np.ndarray, has_it: np.ndarray, more: int = 0) -> Share:
    """The share of all images that have something: by the number of images of each stratum (S,), the strata
    of those with a label (m,), and whether they have it (m,). With so many `more` labels of the same
    rates."""
    labelled = np.bincount(strata)
    rates = np.bincount(strata, has_it) / labelled
    labelled = np.minimum(sizes, labelled * (1 + more / len(strata)))
    weights = sizes / sizes.sum()
    share = float(weights @ rates)
    n = labelled.sum()
    drawn_in = (rates * labelled + PRIOR * (share * n + 1) / (n + 2)) / (labelled + PRIOR)
    variance = weights**2 @ (drawn_in * (1 - drawn_in) / labelled * (1 - labelled / sizes))
    mean = weights @ drawn_in
    return Share(100 * share, *wilson(share, float(mean * (1 - mean) / max(variance, 1e-9))))


def read_chosen(table: Path, folder: Path) -> list[dict[str, str]]:
    """The rows of a table of `spot_check`, with the real paths of images of this folder."""
    with as_zoo_error(f"Cannot read {table} ({{}})."):
        header, *cells = read_csv(table)
    columns = (*TO_LABEL, *OF_STRATA)
    if not set(columns).issubset(header):
        raise ZooError(f"{table} is no table of eval --label, which has the columns {', '.join(columns)}.")
    rows = [dict(zip(header, map(str.strip, row), strict=False)) for row in cells]
    for row in rows:
        row["file"] = os.path.realpath(listed_image(row["file"], folder))
    return rows


def told(rows: Sequence[Mapping[str, str]], guesses: Sequence[Suggestion], outputs: Outputs, head: Head) -> SpotCheck:
    """What rows with classes say of all images, by the head's guesses (n,) and outputs, and what it promises.
    ZooError for rows without a class or with an unknown one, of other images or of another head."""
    names = [NONE if is_none(row["class"]) else row["class"] for row in rows]
    if not all(names):
        raise ZooError(f"{names.count('')} of {len(rows)} images have no class yet: fill in the column class.")
    for name in names:
        check_choice("class", name, [*head.classnames, NONE])
    where = {os.path.realpath(guess.file): i for i, guess in enumerate(guesses)}
    positions = [where.get(row["file"], -1) for row in rows]
    _, first, strata = np.unique([row[STRATUM] for row in rows], return_index=True, return_inverse=True)
    sizes = np.array([rows[i]["stratum_images"] for i in first], float)
    is_same = all(i >= 0 and guesses[i].guess == row["guess"] for i, row in zip(positions, rows, strict=True))
    if not is_same or sizes.sum() != len(guesses):
        problem = "These images were chosen of another folder, before it changed, or by another head"
        raise ZooError(f"{problem}: pass these, or choose again.")
    right = np.array([guesses[i].guess == name for i, name in zip(positions, names, strict=True)])

    def narrowness(more: int) -> float:
        found = share_of_all(sizes, strata, right, more)
        return found.low - found.high

    def promise(name: str, allowed: float, about: np.ndarray, failed: np.ndarray) -> Promise:
        """Of the images (n,) that it is about, some of the labelled ones (m,) `failed`."""
        among = max(float(about.mean()), 1e-9)
        found = share_of_all(sizes, strata, about[positions] & failed)
        return Promise(name, 100 * allowed, Share(*[min(100, end / among) for end in astuple(found)]))

    promises = []
    for coverage, least in head.promises.get("sets", {}).items():
        sets = outputs.of(positions).sets(least)
        missed = [name not in [head.classnames[i] for i in each] for name, each in zip(names, sets, strict=True)]
        what = f"class outside its set for {100 * float(coverage):g} %"
        promises.append(promise(what, 1 - float(coverage), outputs.promised(), np.array(missed)))
    least = Promises.of(head.promises).trusted
    if least is not None:
        promises.append(promise("trusted answer wrong", TRUSTED, outputs.trusted(least), ~right))
    more = bisect_left(range(len(guesses) - len(rows)), narrowness(0) / 2, key=narrowness)
    return SpotCheck([], len(guesses), None, share_of_all(sizes, strata, right), more, promises)
