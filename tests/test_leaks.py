"""No trial learns from the labels of test images: with others there, all that is fitted is the same bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dcp_zoo.benchmark import Settings, plan, plan_trials
from dcp_zoo.benchmark import sweep as sweep_module
from dcp_zoo.data import Item, Split


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
