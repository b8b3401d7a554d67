"""Which of two heads is better: its test, interval and number of images against plain equations and by
simulation; and `eval` with two heads."""

import json
import math
import shutil

import numpy as np
import pytest
import torch

from dcp_zoo.data import Item
from dcp_zoo.training.comparison import Comparison
from dcp_zoo.training.evaluation import Evaluation


def compared(first, second, groups=None) -> Comparison:
    """Two heads that are right where these are true, on images of class 0, in these groups."""
    names = [""] * len(first) if groups is None else [f"group {group}" for group in groups]
    items = [Item(f"{i}.png", f"{i}.png", 0, group=group) for i, group in enumerate(names)]

    def evaluation(right) -> Evaluation:
        logits = torch.stack([torch.tensor(right, dtype=torch.float), torch.full((len(right),), 0.5)], 1)
        return Evaluation(["cat", "dog"], items, logits)

    return Comparison(evaluation(first), evaluation(second))


def of_counts(both: int, only_first: int, only_second: int, neither: int) -> Comparison:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return compared(first, second)


@pytest.mark.parametrize(("first", "second"), [(9, 1), (7, 1), (3, 12), (6, 0), (5, 5)])
def test_of_single_images_it_is_the_exact_test_of_mcnemar(first, second):
    """Heads or tails of a fair coin; the ends of the interval are the shares of which so many or more, or so
    few or fewer, have a chance of 2.5 %."""
    found, n = of_counts(50, first, second, 30), first + second
    coins = [math.comb(n, k) for k in range(n + 1)]
    p = min(1, 2 * sum(coins[max(first, second) :]) / 2**n)
    assert found.p_value == pytest.approx(p)
    assert found.better == (p < 0.05) * (1 if first > second else -1)
    total = 80 + n
    assert found.difference == pytest.approx(100 * (first - second) / total)
    low, high = ((end * total / 100 / n + 1) / 2 for end in found.interval)

    def tail(share: float, counts: range) -> float:
        return sum(math.comb(n, k) * share**k * (1 - share) ** (n - k) for k in counts)

    assert tail(low, range(first, n + 1)) == pytest.approx(0.025)
    assert tail(high, range(first + 1)) == (pytest.approx(0.025) if second else 1)


def test_heads_that_answer_alike_cannot_be_told():
    """One of 100 images may be another after all: of which, by chance, none was seen in 2.5 %."""
    found = of_counts(60, 0, 0, 40)
    assert (found.better, found.difference, found.more_images) == (0, 0, None)
    assert (1 - found.interval[1] / 100) ** 100 == pytest.approx(0.025)
    assert found.interval[0] == -found.interval[1]
    in_groups = compared([True, True, False, False], [True, True, False, False], [0, 0, 1, 1])
    assert (1 - in_groups.interval[1] / 100) ** 2 == pytest.approx(0.025)
    assert found.verdict == "cannot be told: neither is ahead"


def test_photographs_that_were_taken_together_count_as_one():
    """The interval is that of a bootstrap of whole groups, and the test asks each group once."""
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(30), rng.integers(1, 6, 30))
    right = rng.random((2, 30)) < [[0.9], [0.6]]
    first, second = (side[groups] ^ (rng.random(len(groups)) < 0.1) for side in right)
    found = compared(first, second, groups)
    gained = np.bincount(groups, weights=first.astype(int) - second.astype(int))
    images = np.bincount(groups)
    drawn = rng.integers(0, 30, (20_000, 30))
    expected = np.quantile(100 * gained[drawn].sum(1) / images[drawn].sum(1), [0.025, 0.975])
    assert found.interval == pytest.approx(expected, abs=1)
    assert found.wins == ((gained > 0).sum(), (gained < 0).sum())
    # three groups, whatever their size, are too few for any test, though each bootstrap has the first ahead
    few = compared([True] * 60, [False] * 60, np.repeat([0, 1, 2], 20))
    assert few.interval == (100, 100)
    assert (few.p_value, few.better) == (0.25, 0)


def drawn(rng: np.random.Generator, images: int, only_first: float, only_second: float, size: int = 1) -> Comparison:
    """Images in groups of one size, all of which have one answer."""
    kinds = rng.choice(3, images // size, p=[only_first, only_second, 1 - only_first - only_second]).repeat(size)
    return compared(kinds == 0, kinds == 1, np.arange(images) // size if size > 1 else None)


@pytest.mark.parametrize("size", [1, 4])
def test_equal_heads_are_rarely_told_apart(size):
    """In at most 5 % of 300 draws, and what chance adds to these."""
    rng = np.random.default_rng(0)
    told = [drawn(rng, 200, 0.15, 0.15, size).better for _ in range(300)]
    assert 0 < np.count_nonzero(told) <= 300 * 0.05 + 2 * math.sqrt(300 * 0.05 * 0.95)


@pytest.mark.parametrize("size", [1, 4])
def test_so_many_more_images_tell(size):
    """In most of 100 draws of the number that is said, and in few of a third of it."""
    rng = np.random.default_rng(1)
    wins, losses, rest = (np.repeat(np.array(share), count) for share, count in ((0, 24), (1, 16), (2, 160)))
    kinds = np.concatenate([wins, losses, rest]).repeat(size)
    found = compared(kinds == 0, kinds == 1, np.arange(len(kinds)) // size if size > 1 else None)
    assert found.better == 0
    assert found.verdict == f"cannot be told yet: about {float(f'{found.more_images:.2g}'):,.0f} more images"
    images = (len(kinds) + found.more_images) // size * size

    def told(n: int) -> float:
        return np.mean([drawn(rng, n, 0.12, 0.08, size).better == 1 for _ in range(100)])

    assert told(images) > 0.65
    assert told(images // 3 // size * size) < 0.55


def test_eval_compares_two_heads_on_images_that_neither_was_trained_on(run, flowers, small_model):
    """Of six roses and six tulips each head has two of its own; the second knows a class that has no image
    here."""
    for number, name in enumerate(("first", "second")):
        for kind in ("rose", "tulip"):
            (flowers.parent / name / kind).mkdir(parents=True)
            for i in (2 * number, 2 * number + 1):
                shutil.copy(flowers / kind / f"{i}.jpg", flowers.parent / name / kind)
    shutil.copytree(flowers / "rose", flowers.parent / "second" / "lily")
    for path in (flowers.parent / "second" / "lily").glob("[45].jpg"):
        path.unlink()
    for name in ("first", "second"):
        run.ok("train", name, "--model", small_model, "--output", f"{name}_head", "--test", 0)
    command = ["eval", "MY_PHOTOS", "--head", "first_head", "--head", "second_head"]
    code, out, err = run(*command)
    assert code == 0
    assert "Left out: 4 of 12 images, as first_head was trained on them." in err
    assert "A: first_head" in out
    assert "A minus B: " in out
    assert "better" in out or "cannot be told" in out
    found = json.loads(run.ok(*command, "--json"))
    assert (found["images"], [row["head"] for row in found["heads"]]) == (4, ["first_head", "second_head"])
    top1 = [row["top1"] for row in found["heads"]]
    assert found["difference"] == pytest.approx(top1[0] - top1[1], abs=0.01)
    assert all(row["parameters"] > 1e6 and 0 < row["seconds_per_image"] < 1 for row in found["heads"])
    swapped = json.loads(run.ok("eval", "MY_PHOTOS", "--head", "second_head", "--head", "first_head", "--json"))
    assert swapped["difference"] == -found["difference"]
    for name in ("first", "second"):
        for kind in ("rose", "tulip"):
            shutil.copytree(f"{name}/{kind}", f"seen/{kind}", dirs_exist_ok=True)
    seen = run.refused("eval", "seen", *command[2:])
    assert "Each of these images is one that first_head or second_head was trained on" in seen
    assert "are for one head" in run.refused(*command, "--report", "page.html")
    assert "pass --head once or twice" in run.refused(*command, "--head", "first_head")
