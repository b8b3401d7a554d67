"""Sets and trust: from how many images on, that a burst counts as one, that the promises hold of other images,
and what they are lost with."""

import json

import numpy as np
import pytest
import torch
from helpers import noisy_picture

from dcp_zoo import FewShotClassifier, Predictor, ZooError, predict
from dcp_zoo.heads.config import read_config
from dcp_zoo.probe.model import HeldOut
from dcp_zoo.probe.threshold import promises_of
from dcp_zoo.promises import trust_note
from dcp_zoo.tables import split_list


def left_out(n: int, seed: int = 0, classes: int = 4, signal: float = 2.5) -> tuple[HeldOut, torch.Tensor]:
    """What is said of n images that were left out, none of them refused, and their labels."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=rng)
    logits = 1.5 * torch.randn(n, classes, generator=rng)
    logits[torch.arange(n), labels] += signal
    return HeldOut(torch.arange(n), logits, logits, None, torch.zeros(n, dtype=torch.bool)), labels


def sure(n: int) -> tuple[HeldOut, torch.Tensor]:
    """The same, all of them right."""
    return left_out(n, signal=50)


@pytest.mark.parametrize("name", ["sets", "trusted"])
def test_a_promise_needs_as_many_images_as_statistics_say(name):
    needed = {"sets": {"0.8": 4, "0.9": 9, "0.95": 19}, "trusted": {"0.01": 230, "0.02": 114, "0.05": 45, "0.1": 22}}
    for level, images in needed[name].items():
        found = [level in promises_of(*sure(n), torch.ones(n))[name] for n in (images - 1, images)]
        assert found == [False, True]


def test_a_burst_counts_as_one_image_and_a_refused_one_as_none():
    held_out, labels = left_out(60, signal=5)
    once = promises_of(held_out, labels, torch.ones(60))
    each = torch.arange(60).repeat_interleave(torch.arange(60) % 4 + 1)
    bursts = HeldOut._make(None if part is None else part[each] for part in held_out)
    assert promises_of(bursts, labels[each], 1 / (each % 4 + 1)) == once
    assert once["share"] == pytest.approx(100, abs=40)
    twice = [torch.cat([part, 0 * part]) for part in held_out if part is not None]
    twice[-1] = torch.arange(120) >= 60
    unlike = HeldOut(*twice[:3], None, twice[-1])
    found = promises_of(unlike, torch.cat([labels, labels]), torch.ones(120))
    assert found == once | {"share": pytest.approx(once["share"] / 2, abs=0.1)}


def test_the_promises_hold_of_other_images():
    """Of 150 heads with 100 images each: coverage as a mean, and that trust is broken by at most one in ten."""
    others, truth = left_out(20_000, seed=1)
    probabilities = others.logits.softmax(-1)
    confidence, predicted = probabilities.max(-1)
    own = probabilities[torch.arange(len(truth)), truth]
    covered, broken, known = [], 0, 0
    for seed in range(2, 152):
        held_out, labels = left_out(100, seed)
        promises = promises_of(held_out, labels, torch.ones(100))
        covered.append([(own >= promises["sets"][level]).double().mean() for level in ("0.8", "0.9", "0.95")])
        least = promises["trusted"].get("0.1", 1.0)
        known += least < 1
        trusted = confidence >= least
        broken += bool((predicted != truth)[trusted].double().mean() > 0.1)
    means = np.mean(covered, 0)
    assert (means > (0.79, 0.89, 0.94)).all()
    assert (means < (0.83, 0.93, 0.98)).all()
    assert broken <= 0.1 * known
    assert known > 50


def test_all_doors_promise_the_same(small_model, tmp_path, run):
    """In Python, from a file, on the screen, in tables; not of other classes, nor by a head of too few
    images."""
    rng = np.random.default_rng(0)
    colors = {"red, dark": (160, 60, 60), "blue": (60, 60, 160), "grey": (105, 105, 105), "green": (60, 120, 60)}
    labels = [*colors] * 14
    paths = [noisy_picture(tmp_path / "p" / f"{i}.png", colors[label], rng) for i, label in enumerate(labels)]
    groups = range(len(paths))  # none is alike
    classifier = FewShotClassifier(small_model).fit(paths, labels, groups=groups)
    folder = classifier.save(tmp_path / "head")
    promises = read_config(folder)["dcp"]["text_probe"]["promises"]
    assert len(json.dumps(promises)) < 1000
    assert f"{promises['share']:.0f} % of images like these can be trusted" in run.ok("info", folder)

    asked = [*paths[:8], noisy_picture(tmp_path / "other.png", (250, 250, 20), rng)]
    expected = [list(each) for each in classifier.predict_set(asked)]
    assert [list(each) for each in FewShotClassifier.load(folder).predict_set(asked, 0.9)] == expected
    rejected = [label is None for label in classifier.predict(asked, reject=True)]
    assert [not each for each in expected] == rejected
    assert (rejected[-1], all(rejected)) == (True, False)
    columns = Predictor(folder, sets=0.9)({"image": asked})
    assert [split_list(text) if text else [] for text in columns["set"]] == expected
    assert columns["trusted"].tolist() == [
        p >= promises["trusted"]["0.05"] and not is_out
        for p, is_out in zip(columns["probability"], rejected, strict=True)
    ]
    rows = json.loads(run.ok("predict", *asked, "--head", folder, "--sets", "0.9", "--json"))
    assert [row["set"] for row in rows] == expected
    assert [row["trusted"] for row in rows] == columns["trusted"].tolist()
    answers = predict(folder, asked, reject=True)
    assert [answer is not None and answer[0].trusted for answer in answers] == columns["trusted"].tolist()
    assert [answer[0].trusted for answer in predict(folder, asked)] == columns["trusted"].tolist()
    lines = run.ok("predict", *asked[-2:], "--head", folder, "--sets", "0.9", "--top-k", "1").splitlines()
    assert lines[0].split()[-2:] == ["trusted", "set"]
    assert lines[2].split()[-1] == "no"

    with pytest.raises(ZooError, match="promises no sets"):
        Predictor(folder, classnames=["blue", "grey"], sets=0.9)({"image": asked})
    few = FewShotClassifier(small_model).fit(paths[:16], labels[:16], groups=range(16))
    with pytest.raises(ZooError, match="on 20 images or more"):
        few.predict_set(asked)
    assert trust_note(few.model_.info) == ""
    assert predict(few.model_, asked[0])[0][0].trusted is None
    assert "omit --together" in run.refused("predict", *asked, "--head", folder, "--sets", "0.9", "--together")
