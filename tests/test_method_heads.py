"""Every method as a head: the same logits after saving and loading, fused, and through timm's functions."""

import copy

import pytest
import torch
from helpers import close
from test_baselines import pixels, task

from dcp_zoo.errors import ZooError
from dcp_zoo.methods import METHODS
from dcp_zoo.methods.heads import fit_head
from dcp_zoo.model.linear_head import LinearHead, load_linear_head

NONLINEAR = ["tip-adapter", "tip-adapter-f"]
LINEAR = [name for name in METHODS if name not in (*NONLINEAR, "dcp", "gda")]
FAST = {"epochs": 2, "steps": 2}


def small(method, clip, photos):
    """A task with a schedule of a few steps."""
    known = METHODS[method].recipe("dcp_vitb16", "caltech101", 4, "few-shot").as_dict()
    return task(method, clip, photos, **{name: value for name, value in FAST.items() if name in known})


@pytest.mark.parametrize("method", LINEAR)
def test_a_head_has_the_probabilities_of_its_method(method, clip, photos, tmp_path):
    given = small(method, clip, photos)
    expected = METHODS[method].fit(given).logits(given.val).detach().softmax(-1)
    head, x = fit_head(method, given), pixels(given.val)
    head.save_pretrained(tmp_path, dataset="own")
    loaded = load_linear_head(copy.deepcopy(clip.clip), tmp_path, clip.tokenizer)
    with torch.no_grad():
        assert close(head(x).softmax(-1), expected, 1e-4)
        assert torch.equal(loaded(x), head(x))
        assert close(loaded.fuse()(x), head(x))
        assert close(loaded.get_classifier()(loaded.forward_features(x)), head(x))


@torch.no_grad()
def test_gda_is_zero_shot_with_a_classifier_stage(clip, photos, tmp_path):
    given = small("gda", clip, photos)
    head, x = fit_head("gda", given), pixels(given.val)
    assert head.info["classifier"]["val_images"] == 3
    head.save_pretrained(tmp_path)
    loaded = load_linear_head(copy.deepcopy(clip.clip), tmp_path, clip.tokenizer)
    assert torch.equal(loaded(x), head(x))
    assert close(loaded.fuse()(x), head(x))
    before = head(x)
    head.add_class("zebra", x[:2])
    assert head.classnames[-1] == "zebra"
    assert close(head(x)[:, :-1], before)


@pytest.mark.parametrize("method", NONLINEAR)
def test_a_cache_of_images_is_no_head(method, clip, photos):
    with pytest.raises(ZooError, match="cannot become a head.*gda"):
        fit_head(method, small(method, clip, photos))


@torch.no_grad()
def test_classes_of_a_head(clip, photos):
    given = small("zero-shot", clip, photos)
    head, x = fit_head("zero-shot", given), pixels(given.val)
    before, names = head(x), list(head.classnames)
    head.set_classnames([names[2], "zebra", names[0]])
    assert close(head(x)[:, [2, 0]], before[:, [0, 2]])
    fixed = fit_head("linear-probe", small("linear-probe", clip, photos))
    with pytest.raises(ZooError, match="linear-probe is limited to its classes.*zebra"):
        fixed.set_classnames(["zebra"])


def test_tensors_that_do_not_fit(clip):
    weight = torch.zeros(2, clip.num_features)
    for tensors, wrong in [
        ({"weight": weight}, "bias"),
        ({"weight": weight, "bias": torch.zeros(3)}, "bias"),
        ({"weight": weight, "bias": torch.zeros(2), "visual.nothing": weight}, "visual.nothing"),
    ]:
        with pytest.raises(ZooError, match=wrong):
            LinearHead(clip.clip, ["a", "b"], tensors, method="gda")
