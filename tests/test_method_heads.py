"""Every method as a head: the same logits after saving and loading, fused, and through timm's functions."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import close
from test_baselines import NAMES, pixels, task

from dcp_zoo.errors import ZooError
from dcp_zoo.model.config import read_config
from dcp_zoo.model.linear_head import LinearHead, load_linear_head
from dcp_zoo.training.fit_probe import fit_stage, text_probe
from dcp_zoo.training.methods import METHODS
from dcp_zoo.training.recipes import VALIDATION
from dcp_zoo.training.state import STATE_NAME
from dcp_zoo.zoo.factory import create_model

NONLINEAR = [name for name, method in METHODS.items() if not method.linear]
LINEAR = [name for name in METHODS if name not in (*NONLINEAR, "dcp")]
FAST = {"epochs": 2, "steps": 2}


def small(method, clip, photos, **changes):
    """A task with a schedule of a few steps."""
    known = METHODS[method].recipe("dcp_vitb16", "caltech101", 4, "few-shot").as_dict()
    return task(method, clip, photos, **{name: value for name, value in FAST.items() if name in known}, **changes)


@pytest.mark.parametrize("method", LINEAR)
def test_a_head_has_the_probabilities_of_its_method(method, clip, photos, tmp_path):
    given = small(method, clip, photos)
    expected = METHODS[method].fit(given).logits(given.val).detach().softmax(-1)
    head, x = METHODS[method].fit_head(given), pixels(given.val)
    assert head.pretrained_cfg["label_names"] == head.classnames
    head.save_pretrained(tmp_path, dataset="own")
    loaded = load_linear_head(copy.deepcopy(clip.clip), tmp_path, clip.tokenizer)
    with torch.no_grad():
        assert close(head(x).softmax(-1), expected, 1e-4)
        assert torch.equal(loaded(x), head(x))
        assert close(loaded.fuse()(x), head(x))
        assert close(loaded.get_classifier()(loaded.forward_features(x)), head(x))


@pytest.mark.parametrize("method", ["zero-shot", "clip-lora", "gda"])
def test_a_stage_on_the_features_of_any_method(method, clip, photos):
    given = small(method, clip, photos, classifier="text-probe")
    head, classifier = METHODS[method].fit_head(given), METHODS[method].fit(given)
    assert head.text_probe.names == NAMES
    assert head.info["text_probe"] == classifier.info["text_probe"]
    assert (head.info["text_probe"]["selection"], head.info["text_probe"]["val_images"]) == (VALIDATION, 3)
    with torch.no_grad():
        assert close(classifier.logits(given.val), head(pixels(given.val)), 1e-4)


@torch.no_grad()
def test_a_head_with_a_stage_takes_new_classes(clip, photos, tmp_path):
    given = small("zero-shot", clip, photos, classifier="text-probe")
    head, x = METHODS["zero-shot"].fit_head(given), pixels(given.val)
    head.save_pretrained(tmp_path)
    loaded = load_linear_head(copy.deepcopy(clip.clip), tmp_path, clip.tokenizer)
    assert torch.equal(loaded(x), head(x))
    assert close(loaded.fuse()(x), head(x))
    before = head(x)
    head.add_class("zebra", x[:2])
    assert head.classnames[-1] == "zebra"
    assert close(head(x)[:, :-1], before)


def test_names_are_not_read_by_another_text_tower(clip, photos):
    """The trained tower is not kept."""
    assert METHODS["clip-lora"].fit_head(small("clip-lora", clip, photos)).template == ""


@pytest.mark.parametrize("method", NONLINEAR)
def test_a_cache_of_images_is_no_head(method, clip, photos):
    with pytest.raises(ZooError, match="cannot become a head.*gda"):
        METHODS[method].fit_head(small(method, clip, photos))


@torch.no_grad()
def test_classes_of_a_head(clip, photos):
    given = small("zero-shot", clip, photos)
    head, x = METHODS["zero-shot"].fit_head(given), pixels(given.val)
    before, names = head(x), list(head.classnames)
    head.set_classnames([names[2], "zebra", names[0]])
    assert close(head(x)[:, [2, 0]], before[:, [0, 2]])
    fixed = METHODS["linear-probe"].fit_head(small("linear-probe", clip, photos))
    features, labels = fixed.encode_image(x), torch.arange(len(x)) % len(names)
    for stage in (None, text_probe(names, features[None], labels, fixed.text_linear())[0]):  # as fit-text-probe adds
        fixed.classifier = stage
        for add in (lambda: fixed.set_classnames(["zebra"]), lambda: fixed.add_class("zebra", x)):
            with pytest.raises(ZooError, match="linear-probe is limited to its classes.*zebra.*dcp or zero-shot"):
                add()
    pair = METHODS["linear-probe"].fit_head(small("linear-probe", clip, photos))
    pair.classnames = [names[0], names[1], names[0]]  # as two pairs of ImageNet's classes
    rows = pair.weight.clone()
    pair.set_classnames(list(pair.classnames))
    assert torch.equal(pair.weight, rows)
    fixed.add_class(names[0], x)  # other images of a class that it has
    head.set_classnames(names)
    head.text_probe = stage
    head.add_class("zebra", x)
    assert head.classnames == [*names, "zebra"]


def test_a_stage_is_fitted_with_texts_that_stand_for_the_heads_own(clip, photos, monkeypatch):
    """Without validation images; a linear probe has none, and a tower that was trained on the images neither."""
    given = replace(small("zero-shot", clip, photos, classifier="text-probe"), val=None, template="a drawing of a {}.")
    head = METHODS["zero-shot"].fit_head(given)
    weight = head.text_probe.weight.clone()
    fit_stage(given.plain_train.for_model(head))
    assert close(head.text_probe.weight, weight, 1e-3)
    for method in ("linear-probe", "prolip"):  # said before anything is trained
        monkeypatch.delattr(f"dcp_zoo.training.methods.{METHODS[method].module}.fit{METHODS[method].variant}")
        with pytest.raises(ZooError, match=f"stage for a head of {method} needs validation images"):
            METHODS[method].fit_head(replace(small(method, clip, photos, classifier="text-probe"), val=None))
    same = replace(given.plain_train, items=[item._replace(path=photos[0].path) for item in given.train.items])
    same = same.for_model(METHODS["zero-shot"].fit_head(given))
    with pytest.raises(ZooError, match="same image features"):
        fit_stage(same)


def test_tensors_that_do_not_fit(clip):
    weight = torch.zeros(2, clip.num_features)
    for tensors, wrong in [
        ({"weight": weight}, "bias"),
        ({"weight": weight, "bias": torch.zeros(3)}, "bias"),
        ({"weight": weight, "bias": torch.zeros(2), "visual.nothing": weight}, "visual.nothing"),
    ]:
        with pytest.raises(ZooError, match=wrong):
            LinearHead(clip.clip, ["a", "b"], tensors, method="gda")


def test_the_command_line_trains_any_method_and_adds_the_stage(photos, tmp_path, run):
    """`train --method`, with `--classifier`, and `fit-text-probe` for a DCP that has no stage."""
    for item in photos:
        folder = tmp_path / "photos" / NAMES[item.label]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(item.path, folder)
    assert "test top-1" in run.ok("train", tmp_path / "photos", "--method", "gda", "--output", tmp_path / "gda")
    code, out, err = run("eval", "--head", tmp_path / "gda", "--data-root", tmp_path / "photos", "--json")
    assert json.loads(out)["top1"] == read_config(tmp_path / "gda")["dcp"]["metrics"]["top1_stored"], err
    assert "made by gda" in run.refused("explain", "--head", tmp_path / "gda")
    err = run.refused("train", tmp_path / "photos", "--method", "tip-adapter", "--output", tmp_path / "x")
    assert "choose from zero-shot" in err
    for given, wrong in (
        (("--save-every", "9"), "--save-every works with --method dcp only"),
        (("--recipe", "release"), "The recipe release is for DCP: omit it, or use --method dcp"),
        (("--recipe", "fast"), "The recipe fast is for DCP"),
        (("--set", "beta=2"), "--set sets unknown fields beta"),
        (("--classifier", "svm"), "choose from none, text-probe"),
    ):
        assert wrong in run.refused("train", tmp_path / "photos", "--method", "gda", *given, "--output", tmp_path / "x")
    run.ok("train", tmp_path / "photos", "--method", "gda", "--refit", "--output", tmp_path / "all")
    measured, final = (read_config(tmp_path / name)["dcp"] for name in ("gda", "all"))
    assert final["metrics"] == measured["metrics"]
    assert final["test_share"] == 0
    assert final["subset_sha256"] != measured["subset_sha256"]
    # on the images held out
    code, out, err = run("verify", "--head", tmp_path / "gda", "--data-root", tmp_path / "photos")
    assert (code, out.count("holds")) == (0, 1), err

    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / STATE_NAME).write_bytes(b"")
    for command in (("train", tmp_path / "photos", "--method", "gda"), ("fit-text-probe", "--head", tmp_path / "gda")):
        assert "DCP whose training was stopped" in run.refused(*command, "--output", tmp_path / "stopped")
    for part in ("train", "test"):
        shutil.copytree(tmp_path / "photos", tmp_path / "parts" / part)
    run.ok("train", tmp_path / "parts", "--method", "gda", "--refit", "--output", tmp_path / "whole")
    err = run.refused("eval", "--head", tmp_path / "whole", "--data-root", tmp_path / "parts")
    assert "trained on all of these images" in err
    (tmp_path / "page").mkdir()
    err = run.refused("train", tmp_path / "photos", "--output", tmp_path / "x", "--report", tmp_path / "page")
    assert "'--report'" in err

    short = ("--method", "coop", "--set", "epochs=1")
    code, _, err = run("train", tmp_path / "photos", *short, "--output", tmp_path / "coop")
    assert (code, "training images are not learnt" in err, "--set epochs=3" in err) == (0, True, True), err

    options = ("--method", "dcp", "--set", "epochs=1", "--set", "classifier=none")
    run.ok("train", tmp_path / "photos", *options, "--output", tmp_path / "plain")
    out = run.ok("fit-text-probe", tmp_path / "photos", "--head", tmp_path / "plain", "--output", tmp_path / "refit")
    assert "test top-1" in out
    head = create_model(str(tmp_path / "refit"), True)
    assert head.text_probe.names == sorted(NAMES)
    trained = read_config(tmp_path / "plain")["dcp"]
    assert head.info["text_probe"]["subset_sha256"] == trained["subset_sha256"]  # not on the test images
    assert head.info["text_probe"]["val_images"] == 0
    assert head.info["metrics"].keys() == {"top1_stored", "top1_batch", "top1_no_classifier"}
