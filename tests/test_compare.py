"""`dcp_zoo.compare`: the numbers of `dcp-zoo benchmark`, for any folds."""

import numpy as np
import pandas
import pytest
from PIL import Image

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo.benchmark import store
from dcp_zoo.benchmark.plan import Settings, plan_trials
from dcp_zoo.benchmark.sweep import sweep
from dcp_zoo.data import few_shot, load_split

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
    calls, encode = [], dcp_zoo.backbone.clip.FrozenCLIP.encode_image
    monkeypatch.setattr("dcp_zoo.training.sources.VIEW_BATCH", 1000)
    monkeypatch.setattr("dcp_zoo.training.cache._memory", dcp_zoo.training.cache.FeatureCache())
    monkeypatch.setattr(
        "dcp_zoo.backbone.clip.FrozenCLIP.encode_image",
        lambda self, inputs, *args: calls.append(len(inputs)) or encode(self, inputs, *args),
    )
    found = dcp_zoo.compare(images / "test", methods=["text-probe", "gda"], cv=3)
    assert sum(calls) <= 2 * 12 + 30  # with mirror images, and the pictures of everyday things
    calls.clear()
    monkeypatch.setattr("dcp_zoo.training.cache._memory", dcp_zoo.training.cache.FeatureCache())  # another process
    dcp_zoo.compare(images / "test", methods=["text-probe", "gda"], cv=3)
    assert not calls
    table = pandas.DataFrame(found)
    assert table.columns.tolist()[:3] == ["model", "method", "accuracy"]
    assert repr(found).splitlines()[0].split("  ")[0] == "model"
    assert len(repr(found).splitlines()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cv": 7}, "cv=7: of blue there are 6 images.*pass 2 to 6"),
        ({"cv": [(range(6), range(6, 12))]}, "no image of red for training"),
        ({"methods": ["svm"]}, "Unknown method 'svm'"),
        ({"models": ["dcp_maxi"]}, "Unknown model 'dcp_maxi'.*dcp_mini"),
    ],
)
def test_what_cannot_be_compared_is_said(images, options, message):
    with pytest.raises(ZooError, match=message):
        dcp_zoo.compare(images / "test", **options)
