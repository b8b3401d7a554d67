"""The few-shot draw against the hashes of CoOp's, and the base/new halves of the classes."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from dcp_zoo.data import Item, Split, classnames, few_shot, packaged, subsample_classes, subset_sha256
from dcp_zoo.errors import ZooError

GOLDEN = Path(__file__).parent / "golden"


def small_split(sizes: list[int], val: int = 6) -> Split:
    """Classes of these sizes, first appearing in reverse order of label, images of all classes
    interleaved."""
    labels = [y for i in range(max(sizes)) for y in reversed(range(len(sizes))) if i < sizes[y]]
    train = [Item(f"/x/t{i}", f"t{i}", y) for i, y in enumerate(labels)]
    val_items = [Item(f"/x/v{i}", f"v{i}", i % len(sizes)) for i in range(val * len(sizes))]
    return Split("small", [f"class {y}" for y in range(len(sizes))], train, val_items, val_items[:3])


def test_few_shot_takes_all_of_a_small_class_with_a_warning():
    split = small_split([20, 3, 2])
    state = random.getstate()
    with pytest.warns(UserWarning, match=r"fewer than 4 training images, using all: class 1 \(3\), class 2 \(2\)"):
        drawn = few_shot(split, 4, 1)
    assert random.getstate() == state  # the caller's
    assert drawn.test == split.test
    assert Counter(item.label for item in drawn.train) == {0: 4, 1: 3, 2: 2}
    with pytest.raises(ZooError, match="no training image for class 1"):
        few_shot(small_split([5, 0, 5]), 2, 1)


COOP = json.loads((GOLDEN / "fewshot_subsets.json").read_text())  # hashes of the subsets drawn by CoOp's code


@pytest.mark.filterwarnings("ignore:.*fewer than")
@pytest.mark.parametrize("name", COOP)
def test_few_shot_subsets_equal_coops(name):
    rows = packaged.split_rows(name)
    train, val = ([Item(key, key, label) for key, label, _ in rows[part]] for part in ("train", "val"))
    split = Split(name, classnames(name), train, val, [])
    assert len(COOP[name]) == 15
    for draw, hashes in COOP[name].items():
        shots, seed = int(draw.split("-")[0]), int(draw[-1])
        drawn = few_shot(split, shots, seed)
        assert [subset_sha256(drawn.train), subset_sha256(drawn.val)] == hashes, draw


@pytest.mark.parametrize("classes", [4, 5])
def test_base_and_new_classes(classes):
    split = small_split([4, 5, 6, 7, 8][:classes])
    base, new = subsample_classes(split, "base"), subsample_classes(split, "new")
    half = (classes + 1) // 2
    assert base.classnames + new.classnames == split.classnames
    assert len(base.classnames) == half
    assert base.train == [item for item in split.train if item.label < half]
    assert [(i.key, i.label + half) for i in new.train] == [(i.key, i.label) for i in split.train if i.label >= half]
    assert subsample_classes(split, "all") == split
    with pytest.raises(ZooError, match="has 3 classes: two halves need at least 2 each"):  # one alone is always right
        subsample_classes(small_split([4, 5, 6]), "new")
