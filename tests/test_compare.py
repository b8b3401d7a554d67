"""`dcp_zoo.compare`: the numbers of `dcp-zoo benchmark`, for any folds. And no trial learns from the labels of test
images: with others there, all that is fitted is the same bit for bit."""

from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo.backbone.clip import FrozenCLIP
from dcp_zoo.benchmark import Settings, plan, plan_trials, store
from dcp_zoo.benchmark import sweep as sweep_module
from dcp_zoo.benchmark.sweep import sweep
from dcp_zoo.data import Item, Split, few_shot, load_split

METHODS = ["zero-shot", "text-probe", "gda"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Blue and red noise, 4 images of each for training and 6 for the test, some of them hard."""
    place, rng = tmp_path_factory.mktemp("noise"), np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 6)):
        for name, channel in (("blue", 2), ("red", 0)):
            (place / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3))
                pixels[..., channel] = np.minimum(255, pixels[..., channel] + 20 * i)
                Image.fromarray(pixels.astype(np.uint8)).resize((64, 64)).save(place / part / name / f"{i}.png")
    return place


def test_numbers_are_those_of_the_benchmark(images, tmp_path):
    trials = plan_trials("few-shot", ["dcp_mini"], METHODS, ["folder"], [4], [1])
    assert sweep(trials, Settings(tmp_path, images)) == {}
    expected = {key.split(".")[-1]: result["results"][0] for key, result in store.results(tmp_path).items()}
    subset = few_shot(load_split("folder", images), 4, 1)  # in its order, on which the probe's own folds depend
    labels = [subset.classnames[item.label] for item in subset.items]
    folds = [(range(8), range(8, 20))]
    found = dcp_zoo.compare([item.path for item in subset.items], labels, methods=METHODS, cv=folds)
    assert [row.accuracy for row in found] == sorted((row.accuracy for row in found), reverse=True)
    for row in found:
        assert row.accuracy == pytest.approx(expected[row.method]["top1"], abs=0.01)
        assert row.log_loss == pytest.approx(expected[row.method]["nll"], abs=1e-3)
        assert row.low < row.accuracy <= row.high
    assert {row.method for row in found} == set(METHODS) == set(expected)


def test_features_are_computed_once(images, monkeypatch):
    calls, encode = [], FrozenCLIP.encode_image
    monkeypatch.setattr("dcp_zoo.training.cache._memory", dcp_zoo.training.cache.FeatureCache())
    monkeypatch.setattr(FrozenCLIP, "encode_image", lambda *args: calls.append(len(args[1])) or encode(*args))
    found = dcp_zoo.compare(images / "test", methods=["text-probe", "gda"], cv=3)
    assert sum(calls) <= 2 * 12 + 30  # with mirror images, and the pictures of everyday things
    assert pandas.DataFrame(found).columns.tolist()[:3] == ["model", "method", "accuracy"]
    assert repr(found).splitlines()[0].split("  ")[0] == "model"


def test_what_cannot_be_compared_is_said(images):
    for options, message in (
        ({"cv": 7}, "cv=7: of blue there are 6 images.*pass 2 to 6"),
        ({"cv": [(range(6), range(6, 12))]}, "no image of red for training"),
        ({"models": ["dcp_maxi"]}, "Unknown model 'dcp_maxi'.*dcp_mini"),
    ):
        with pytest.raises(ZooError, match=message):
            dcp_zoo.compare(images / "test", **options)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Two training, one validation and four test images of each of three classes. They are noise, so that what fits one
    labelling of them best fits another worse."""
    folder, rng, items = tmp_path_factory.mktemp("noise"), np.random.default_rng(2), []
    for i in range(21):
        path = folder / f"{i}.png"
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((32, 32)).save(path)
        items.append(Item(str(path), path.name, i % 3))
    return Split("digits", ["red", "blue", "green"], items[:6], items[6:9], items[9:])


@pytest.fixture
def fitted(clip, split, monkeypatch, tmp_path):
    """A function (permuted) -> the logits of the test images and `info`, of a whole few-shot trial of GDA."""
    logits: list[torch.Tensor] = []
    top1 = sweep_module.METRICS["top1"]
    monkeypatch.setattr(sweep_module, "plain_clip", lambda model: clip)
    monkeypatch.setitem(sweep_module.METRICS, "top1", lambda x, labels: logits.append(x) or top1(x, labels))

    def run(permuted):
        test = [item._replace(label=(item.label + 1) % 3) for item in split.test] if permuted else split.test
        monkeypatch.setattr(plan, "read_split", lambda *args: replace(split, test=test))
        sweep_module.shared_images.cache_clear()
        logits.clear()
        (trial,) = plan_trials("few-shot", ["dcp_mini"], ["gda"], ["digits"], [2], [1])
        result = sweep_module.run_trial(trial, Settings(tmp_path / str(permuted), device="cpu"))
        assert len(logits) == len(result["results"])
        return torch.stack(logits), result["info"]

    yield run
    sweep_module.shared_images.cache_clear()


def test_labels_of_test_images_change_nothing(fitted):
    """A method gets training and validation images alone; what it gets is the same for all."""
    (logits, info), (permuted, other) = fitted(permuted=False), fitted(permuted=True)
    assert torch.equal(permuted, logits)
    assert other == info


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_method_that_reads_them_is_found(fitted, monkeypatch, part):
    """If it is given the test images as its training or validation images."""
    subset = sweep_module.TrialImages.subset

    def leaking(self, *args):
        return replace(subset(self, *args), **{part: self.split("digits").test})

    monkeypatch.setattr(sweep_module.TrialImages, "subset", leaking)
    assert not torch.equal(fitted(permuted=False)[0], fitted(permuted=True)[0])
