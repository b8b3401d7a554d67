"""Every method as a head: the same logits after saving and loading, fused, and through timm's functions."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from helpers import StoppedState, close
from safetensors.torch import load_file, save_file
from test_baselines import NAMES, logits_of, pixels, task

from dcp_zoo.data import Split
from dcp_zoo.errors import ZooError
from dcp_zoo.heads.checkpoint import tensor_shapes
from dcp_zoo.heads.config import STATE_NAME, WEIGHTS_NAME, read_config
from dcp_zoo.heads.linear import LinearHead
from dcp_zoo.heads.prompts import PromptHead
from dcp_zoo.onnx.export import export
from dcp_zoo.probe import ReadingFeatures, fit_on_features
from dcp_zoo.training.methods import METHODS, fit_head
from dcp_zoo.training.methods.text_probe import fit_probe
from dcp_zoo.training.run import plan
from dcp_zoo.training.sources import image_source
from dcp_zoo.training.state import TrainingState
from dcp_zoo.zoo.factory import create_model, trained_head
from dcp_zoo.zoo.resolve import Source

NONLINEAR = ["tip-adapter", "tip-adapter-f", "proker"]
FAST = {"epochs": 2, "steps": 2}


def small(method, clip, photos, **changes):
    """A task with a schedule of a few steps."""
    known = METHODS[method].recipe("dcp_vitb16", "caltech101", 4, "few-shot").as_dict()
    return task(method, clip, photos, **{name: value for name, value in FAST.items() if name in known}, **changes)


def load(clip, folder):
    """The head of a checkpoint on another copy of the same CLIP."""
    own = clip.with_clip(copy.deepcopy(clip.clip))
    return trained_head(own, Source("custom", folder=folder, config=read_config(folder))).eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_loaded_head_gives_the_same_logits(method, clip, photos, tmp_path):
    given = small(method, clip, photos)
    head, x = fit_head(method, given), pixels(given.val)
    assert head.pretrained_cfg["label_names"] == head.classnames == NAMES
    assert head.method == method
    assert not any(p.requires_grad for p in head.parameters()) or method == "dcp"
    loaded = load(clip, head.save_pretrained(tmp_path, dataset="own"))
    with torch.no_grad():
        expected = head(x)
        assert close(loaded(x), expected)
        assert close(logits_of(loaded, given.val), expected)
        if method not in NONLINEAR:
            assert close(loaded.fuse()(x), expected)
            assert close(loaded.get_classifier()(loaded.forward_features(x)), expected)


@pytest.mark.parametrize("method", NONLINEAR)
def test_a_head_that_keeps_its_images_is_not_linear(method, clip, photos, tmp_path):
    """It predicts, but cannot be fused, exported or followed by a text probe."""
    given = small(method, clip, photos)
    head, x = fit_head(method, given), pixels(given.val)
    for refused in (head.fuse, head.linear, lambda: export(head, tmp_path / "x.onnx")):
        with pytest.raises(ZooError, match=f"A head of {method} keeps its training images.*cannot be fused, exported"):
            refused()
    with pytest.raises(ZooError, match=f"A head of {method} is fitted to features.*omit the classifier"):
        fit_head(method, small(method, clip, photos, classifier="text-probe"))
    assert head.predict(x) == [NAMES[i] for i in head(x).argmax(-1)]


@pytest.mark.parametrize(("method", "steps"), [("coop", 2), ("maple", 3), ("promptsrc", 2), ("promptsrc", 3)])
def test_a_stopped_training_of_prompts_resumes_bit_for_bit(method, steps, clip, photos, tmp_path):
    """Three epochs of two steps; the state of PromptSRC has its average over the epochs, too."""

    def fit(**options):
        given = task(method, clip, photos, augment="crop-flip", epochs=3)
        crops = image_source(clip, photos[:9], "crop-flip")
        return fit_head(method, replace(given, train=crops, training=options))._trained_state()

    whole = fit()
    with pytest.raises(KeyboardInterrupt):
        fit(state=StoppedState(steps, tmp_path / STATE_NAME))
    state = TrainingState(tmp_path / STATE_NAME)
    assert len(state.losses) == steps
    resumed = fit(state=state)
    assert len(state.losses) == 6
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_an_average_over_epochs_counts_each_once_if_a_step_fails(clip, photos, tmp_path, monkeypatch):
    """The first step of an epoch counts the weights of the last one, then fails, and is done again."""

    def fit(**options):
        return fit_head("promptsrc", replace(task("promptsrc", clip, photos), training=options))._trained_state()

    def state():
        return TrainingState(tmp_path / STATE_NAME)

    whole, encode, calls = fit(), PromptHead.encode_text, []

    def failing(self):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError
        return encode(self)

    monkeypatch.setattr(PromptHead, "encode_text", failing)
    with pytest.raises(ZooError, match="Out of memory.* after step 2 is saved"):
        fit(state=state())
    resumed = fit(state=state())
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize("method", ["zero-shot", "clip-lora", "maple"])
def test_a_probe_on_the_features_of_any_method(method, clip, photos, tmp_path):
    given = small(method, clip, photos, classifier="text-probe")
    head, bare = fit_head(method, given), fit_head(method, small(method, clip, photos))
    assert head.text_probe.classes == head.classes
    assert fit_probe(bare, given.plain_train) == head.info["text_probe"]
    assert len(head.reads) == (1 if method == "zero-shot" else 2)
    x = pixels(given.val)
    with torch.no_grad():
        assert close(logits_of(bare, given.val), head(x), 1e-4)
        assert close(head.fuse()(x), head(x), 1e-4)
        loaded = load(clip, head.save_pretrained(tmp_path, torch.float32))
        assert close(loaded(x), head(x), 1e-4)
        assert close(loaded.frozen.encode_image(x), clip.encode_image(x), 1e-5)


def test_a_checkpoint_holds_a_text_tower_only_if_names_are_read(clip, photos, tmp_path):
    """That of 2SFS, which is limited to its classes, changes the norms of both towers."""
    fit_head("2sfs", small("2sfs", clip, photos)).save_pretrained(tmp_path)
    names = tensor_shapes(tmp_path)
    assert names.keys() > {"weight", "bias", "visual.ln_post.weight"}
    assert all(name.startswith("visual.") for name in names.keys() - {"weight", "bias"})


@torch.no_grad()
def test_classes_of_a_head(clip, photos):
    given = small("zero-shot", clip, photos)
    head, x = fit_head("zero-shot", given), pixels(given.val)
    before, names = head(x), list(head.classnames)
    head.set_classnames([names[2], "zebra", names[0]])
    assert close(head(x)[:, [2, 0]], before[:, [0, 2]])
    fixed = fit_head("linear-probe", small("linear-probe", clip, photos))
    features, labels = fixed.encode_image(x), torch.arange(len(x)) % len(names)
    for probe in (
        None,
        fit_on_features(fixed.classes, labels, [ReadingFeatures(features[None], fixed.own_linear())])[0],
    ):
        fixed.text_probe = probe
        for add in (lambda: fixed.set_classnames(["zebra"]), lambda: fixed.add_class("zebra", x)):
            with pytest.raises(ZooError, match="linear-probe is limited to its classes.*zebra.*dcp or zero-shot"):
                add()
    fixed.add_class(names[0], x)  # other images of a class that it has
    head.set_classnames(names)
    head.text_probe = probe
    head.add_class("zebra", x)
    assert head.classnames == [*names, "zebra"]


def test_a_probe_is_fitted_with_texts_that_stand_for_the_heads_own(clip, photos, monkeypatch):
    given = replace(small("zero-shot", clip, photos, classifier="text-probe"), val=None, texts="a drawing of a {}.")
    head = fit_head("zero-shot", given)
    weight = head.text_probe.weight.clone()
    fit_probe(head, given.plain_train)
    assert close(head.text_probe.weight, weight, 1e-3)
    for method in ("linear-probe", "gda"):  # said before anything is trained
        with pytest.raises(ZooError, match=f"A head of {method} is fitted to features.*method text-probe"):
            plan(Split("folder", NAMES, given.train.items), "dcp_mini", method, classifier="text-probe")
    same = replace(given.plain_train, items=[item._replace(path=photos[0].path) for item in given.train.items])
    with pytest.raises(ZooError, match="same image features"):
        fit_probe(head, same)


def test_tensors_that_do_not_fit(clip, photos, tmp_path):
    weight = torch.zeros(2, clip.num_features)
    for wrong in ((weight, torch.zeros(3)), (weight[:, 1:], torch.zeros(2))):
        with pytest.raises(ZooError, match="classifier has the shapes .* do not fit 2 classes"):
            LinearHead(clip, ["a", "b"], *wrong)
    fit_head("zero-shot", small("zero-shot", clip, photos)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    without = {name: tensor for name, tensor in tensors.items() if name != "bias"}
    for changed, wrong in ((without, "bias"), (tensors | {"visual.nothing": weight}, "visual.nothing")):
        save_file(changed, tmp_path / WEIGHTS_NAME)
        with pytest.raises(ZooError, match=wrong):
            load(clip, tmp_path)


def test_the_command_line_trains_any_method(photos, tmp_path, run):
    for item in photos[:9]:  # three of each class
        folder = tmp_path / "photos" / NAMES[item.label]
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(item.path, folder)
    gda = ("--method", "gda", "--no-refit", "--output", tmp_path / "gda")
    assert "test top-1" in run.ok("train", tmp_path / "photos", *gda)
    code, out, err = run("eval", "--head", tmp_path / "gda", "--data-root", tmp_path / "photos", "--json")
    assert json.loads(out)["top1"] == read_config(tmp_path / "gda")["dcp"]["metrics"]["top1_stored"], err
    cached = ("--method", "tip-adapter", "--output", tmp_path / "cache")
    assert "test top-1" in run.ok("train", tmp_path / "photos", *cached)
    answers = json.loads(run.ok("predict", photos[0].path, "--head", tmp_path / "cache", "--json"))[0]["predictions"]
    assert {answer["class"] for answer in answers} == set(NAMES)
    for given, wrong in (
        (("--recipe", "release"), "The recipe release is for DCP: omit it, or use --method dcp"),
        (("--recipe", "fast"), "The recipe fast is for DCP"),
        (("--set", "beta=2"), "--set: beta is none of augment"),
        (("--set", "classifier=svm"), "classifier must be none or text-probe, not 'svm'"),
    ):
        assert wrong in run.refused("train", tmp_path / "photos", "--method", "gda", *given, "--output", tmp_path / "x")
    run.ok("train", tmp_path / "photos", "--method", "gda", "--output", tmp_path / "all")
    measured, final = (read_config(tmp_path / name)["dcp"] for name in ("gda", "all"))
    assert final["metrics"] == measured["metrics"]
    assert final["test_share"] == 0
    assert final["subset_sha256"] != measured["subset_sha256"]
    # on the images held out
    code, out, err = run("eval", tmp_path / "photos", "--head", tmp_path / "gda", "--claim")
    assert (code, out.count("holds")) == (0, 1), err

    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / STATE_NAME).write_bytes(b"")
    for command in (("train", tmp_path / "photos", "--method", "gda"), ("classes", tmp_path / "gda", "--remove", "x")):
        assert "holds a stopped training, which can resume" in run.refused(*command, "--output", tmp_path / "stopped")
    for part in ("train", "test"):
        shutil.copytree(tmp_path / "photos", tmp_path / "parts" / part)
    run.ok("train", tmp_path / "parts", "--method", "gda", "--refit", "--output", tmp_path / "whole")
    err = run.refused("eval", "--head", tmp_path / "whole", "--data-root", tmp_path / "parts")
    assert "trained on these images" in err
    (tmp_path / "page").mkdir()
    err = run.refused("train", tmp_path / "photos", "--output", tmp_path / "x", "--report", tmp_path / "page")
    assert "'--report'" in err

    short = ("--method", "coop", "--set", "epochs=1")
    code, _, err = run("train", tmp_path / "photos", *short, "--output", tmp_path / "coop")
    assert (code, "not converged" in err, "--set epochs=3" in err) == (0, True, True), err

    options = ("--method", "dcp", "--set", "epochs=1")
    run.ok("train", tmp_path / "photos", *options, "--no-refit", "--output", tmp_path / "dcp")
    head = create_model(str(tmp_path / "dcp"), True)
    assert head.text_probe.classes == head.classes
    assert head.classnames == sorted(NAMES)
    assert head.info["text_probe"]["text_scale"]
    assert head.info["metrics"].keys() == {"top1_stored", "top1_batch", "top1_no_classifier"}
