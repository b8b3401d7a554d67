"""`FewShotClassifier` and the functions under it, on coloured pictures that a small DCP learns in seconds."""

import inspect
import os
import pickle
import random
import shutil
import sqlite3
import sys
import warnings
import zipfile
from contextlib import closing
from pathlib import Path
from unittest.mock import DEFAULT, Mock

import numpy as np
import pandas
import pytest
import torch
from given_features import GivenSettings, run_given
from helpers import Count, in_distribution, process_unchanged
from PIL import Image
from publish import prepare
from safetensors.torch import save
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks

import dcp_zoo
from dcp_zoo import FewShotClassifier, ZooError
from dcp_zoo.api import attention_maps
from dcp_zoo.api.estimator import seed_of
from dcp_zoo.api.functions import plan_own
from dcp_zoo.api.inputs import labelled, to_image, unlabelled
from dcp_zoo.benchmark.plan import Trial
from dcp_zoo.benchmark.sweep import sweep
from dcp_zoo.data import load_image
from dcp_zoo.data.archives import unpacked
from dcp_zoo.model import mini
from dcp_zoo.model.clip import FrozenCLIP
from dcp_zoo.training import cache
from dcp_zoo.zoo.registry import get_head

QUICK = {"epochs": 6, "batch_size": 4, "n_ctx": 2, "depth": 2}
NAMES = ["blue", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four blue and four red pictures, one folder per class."""
    place = tmp_path_factory.mktemp("colours")
    for name, color in (("blue", (30, 30, 200)), ("red", (200, 30, 30))):
        (place / name).mkdir()
        for i in range(4):
            image = Image.new("RGB", (150, 140), tuple(min(255, part + 9 * i) for part in color))
            image.save(place / name / f"{i}.png")
    return place


@pytest.fixture(scope="module")
def pictures(folder):
    return dcp_zoo.list_labelled_images(folder)


@pytest.fixture(scope="module")
def fitted(folder):
    return FewShotClassifier(method="dcp", recipe=QUICK).fit(folder)


# --------------------------------------------------------------------------------------------------------------- inputs


def test_every_form_of_an_image_gives_the_same_pixels(pictures):
    path = pictures[0][0]
    image = Image.open(path)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for form in (image, array, array / 255, tensor, tensor / 255, array.astype(np.float32) / 255):
        assert np.array_equal(np.asarray(to_image(form)), array)
    assert [item.path for item in unlabelled(path)] == [path]
    for one in (array, array[..., 0], array[None, ..., 0], array[None], tensor[None], [array], [tensor], [path]):
        assert len(unlabelled(one)) == 1
    for either in (tensor, np.zeros((3, 8, 8))):  # one image, or three grey ones
        with pytest.raises(ZooError, match=r"pass images\[None\] for one, list\(images\) for three"):
            unlabelled(either)
        assert len(unlabelled(list(either))) == 3
    assert len(unlabelled(np.zeros((4, 8, 8)))) == 4
    with pytest.raises(ZooError, match="NoneType is (not|neither) an image"):
        unlabelled(None)
    assert to_image(array[..., 0]).mode == "L"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros(7), r"shape \(7,\) is not an image: an image is a path"),
        (np.zeros((3, 4, 5)) - 1, "float64 from -1"),
        (np.full((4, 4), 200), r"int64 from 200 to 200 is not an image: pass array.astype\(np.uint8\)"),
        (np.full((4, 4), 200.0), "divide it by 255"),
        (np.full((4, 4), 16.0), "divide it by 16"),
        (np.ones((4, 4), int), "divide it by 1"),
        (torch.full((3, 4, 4), -1.5), "if `create_transform` made it, pass the image itself"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\)"),
        (object(), "is (not|neither) an image"),
    ],
)
def test_what_is_no_image_is_refused(image, message):
    with pytest.raises(ZooError, match=message):
        to_image(image)


def test_images_in_other_forms_are_taken(pictures):
    path = Path(pictures[0][0])
    with path.open("rb") as file, path.open("rb") as other:
        for form in (path.read_bytes(), file, [other], [path.read_bytes()]):
            (item,) = unlabelled(form)
            assert np.array_equal(np.asarray(item.path), np.asarray(Image.open(path)))
    rgba = np.dstack([np.asarray(Image.open(path)), np.full((140, 150), 9, np.uint8)])
    for form in (rgba, [rgba], rgba / 255):
        (item,) = unlabelled(form)
        assert np.array_equal(load_image(item.path), load_image(Image.fromarray(rgba)))
    (item,) = unlabelled(b"no image")
    with pytest.raises(ZooError, match="Cannot read the image bytes: not in a supported format"):
        load_image(item.path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["a.png", float("nan"), None], r"image 1, image 2 \(there is no image \(None or NaN\)"),
        (
            pandas.DataFrame({"path": ["a.png"] * 3, "label": list("aba")}),
            r"columns path, label: pass one, as df\['path'",
        ),
        (np.full((3, 100), 0.5), r"no features of a CLIP, \(3, 100\), as their rows do not have the length 1"),
        (pandas.DataFrame(np.eye(3, 100) * 7), r"no features of a CLIP, \(3, 100\)"),
        (np.eye(3, 100), r"Features \(3, 100\) do not fit: this model reads 512 or 1792 columns"),
        (["https://no.invalid/a.png", *"bc"], r"No image at https://no\.invalid/a\.png: download it"),
    ],
)
def test_what_is_no_list_of_images_is_named(images, message):
    with pytest.raises(ZooError, match=message):
        FewShotClassifier().fit(images, list("aba"))


def test_labels_are_checked(folder, pictures, tmp_path):
    paths, labels = pictures
    for args, message in (
        ((paths,), "Pass labels"),
        ((paths, labels[:-1]), "8 images need as many labels"),
        ((paths, ["red"] * 8), "at least two classes"),
        ((folder, labels), "omit labels"),
        (([], []), "at least one"),
        ((paths, labels, ["a", "b", "c"]), "3 class names for 2 classes"),
        ((paths, labels, {"red": "red"}), "no name for blue"),
        ((paths, [None, *labels[1:]]), "no label"),
        ((paths, [float("nan"), *labels[1:]]), "no label"),
    ):
        with pytest.raises(ZooError, match=message):
            labelled(*args)
    parts = tmp_path / "parts"
    for part in ("train", "test"):
        shutil.copytree(folder, parts / part)
    with pytest.raises(ZooError, match="parts/train or .*parts/test"):
        labelled(parts)
    data = labelled(paths, [int(label == "red") for label in labels], {1: "red", 0: "blue"})
    assert (data.names, data.classes.tolist()) == (NAMES, [0, 1])


def test_class_weights_are_by_label(pictures):
    data = labelled(pictures[0][:5], pictures[1][:5])  # four blue, one red

    def weights(class_weight):
        return plan_own(data, None, "dcp_mini", "text-probe", class_weight=class_weight).class_weight

    assert weights({"red": 6}) == (1, 6)
    assert weights("balanced") is None  # a text probe is that anyway
    for wrong, message in (
        ({"green": 1}, "unknown classes: green"),
        ({"red": -1}, "at least 0"),
        ({"red": float("nan")}, "finite numbers"),
        ({"red": 0, "blue": 0}, "not all 0"),
        ("red", "balanced"),
    ):
        with pytest.raises(ZooError, match=message):
            weights(wrong)


# ------------------------------------------------------------------------------------------------------------ functions


def test_train_evaluate_predict(folder, pictures, fitted, tmp_path):
    model = dcp_zoo.train("dcp_mini", *pictures, method="dcp", recipe=QUICK, output=tmp_path / "head")
    expected = fitted.predict_proba(pictures[0])
    assert dcp_zoo.evaluate(model, folder).accuracy.correct == 8
    for head in (model, str(tmp_path / "head")):
        (best, other), *_ = dcp_zoo.predict(head, pictures[0][5], top_k=5)
        assert best.name == "red"
        assert best.probability == pytest.approx(expected[5, 1], abs=1e-3)
        assert best.probability + other.probability == pytest.approx(1, abs=1e-5)
    with pytest.raises(ZooError, match="No class green: the classes are blue, red"):
        dcp_zoo.evaluate(model, pictures[0][:1], ["green"])
    with pytest.raises(ZooError, match="already holds a checkpoint"):
        dcp_zoo.train("dcp_mini", *pictures, output=tmp_path / "head")


@pytest.mark.parametrize("name", ["batch_size", "top_k"])
def test_batches_and_predictions_have_at_least_one_entry(pictures, fitted, name):
    for options in ({name: 0}, {name: -1}):
        with pytest.raises(ZooError, match=f"{name} must be at least 1, not {options[name]}"):
            dcp_zoo.predict(fitted.model_, pictures[0], **options)
    with pytest.raises(ZooError, match="batch_size must be at least 1, not 0"):
        dcp_zoo.evaluate(fitted.model_, *pictures, batch_size=0)


@pytest.mark.parametrize("method", ["dcp", "text-probe"])
def test_a_batch_is_what_one_forward_pass_reads(pictures, fitted, method):
    classifier = FewShotClassifier(batch_size=3, memory=False)
    classifier.model_, classifier.classes_ = fitted.model_, fitted.classes_
    if method != "dcp":
        classifier.fit(*pictures)
    head, sizes = classifier.model_, []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
        for module in head.encoder.clip.visual.modules()
        if isinstance(module, torch.nn.Conv2d)
    ]
    doors = (
        lambda size: classifier.set_params(batch_size=size).predict_proba(pictures[0]),
        lambda size: dcp_zoo.evaluate(head, *pictures, batch_size=size).logits.softmax(-1),
        lambda size: np.array([row[0].probability for row in dcp_zoo.predict(head, pictures[0], batch_size=size)]),
    )
    for door in doors:
        found = []
        for size in (3, 8):
            sizes.clear()
            found.append(door(size))
            assert max(sizes) == size
        assert found[0] == pytest.approx(found[1], abs=1e-4)
    for hook in hooks:
        hook.remove()


# ------------------------------------------------------------------------------------------------------------ callbacks


def test_callbacks_see_every_epoch_and_can_end_a_training(pictures, fitted):
    paths, labels = pictures
    seen = []
    recipe = QUICK | {"classifier": "none"}  # whose weights depend on the validation images
    classifier = FewShotClassifier(method="dcp", recipe=recipe, callbacks=[lambda model, epoch: seen.append(epoch)])
    classifier.fit(paths, labels, validation=(paths[::3], labels[::3]))
    assert [epoch.epoch for epoch in classifier.history_] == list(range(1, 7))
    assert classifier.history_ == seen
    assert seen[-1].step == 12
    assert torch.equal(classifier.model_.prompts["text"], fitted.model_.prompts["text"]), "nothing is learnt from those"
    stopped = FewShotClassifier(method="dcp", recipe=recipe, callbacks=[lambda model, epoch: epoch.epoch == 4])
    assert len(stopped.fit(paths, labels).history_) == 4


def test_seeds_that_cannot_be_drawn_from_are_refused(pictures):
    for seed in (-1, 2**32):
        with pytest.raises(ZooError, match="seed must be from 0 to 4294967295"):
            dcp_zoo.train("dcp_mini", *pictures, seed=seed)


# --------------------------------------------------------------------------------------------------------- scikit-learn

CHECKS = [
    "check_estimator_cloneable",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_get_params_invariance",
    "check_no_attributes_set_in_init",
    "check_parameters_default_constructible",
    "check_set_params",
    "check_valid_tag_types",
    "check_valid_tag_values",
]


@pytest.mark.parametrize("name", CHECKS)
def test_scikit_learns_checks_that_need_no_table(name):
    check = getattr(estimator_checks, name, None)
    if check is None:
        pytest.skip("not in this version of scikit-learn")
    check("FewShotClassifier", FewShotClassifier())


def test_check_estimator_finds_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it skips what needs tables of numbers
        estimator_checks.check_estimator(FewShotClassifier())


@pytest.mark.parametrize(("verbose", "shown"), [(None, True), (False, False)])
def test_progress_is_shown_in_a_notebook(pictures, monkeypatch, capsys, verbose, shown):
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    monkeypatch.setattr("dcp_zoo.data.progress.DELAY", 0)
    classifier = FewShotClassifier(method="zero-shot", classifier="text-probe", verbose=verbose).fit(*pictures)
    classifier.predict(pictures[0])
    assert ("/8 [" in capsys.readouterr().err) == shown  # images, not batches
    if shown:
        dcp_zoo.inspect(*pictures)
        dcp_zoo.train("dcp_mini", *pictures, method="zero-shot", classifier="text-probe")
        assert capsys.readouterr().err.count("/8 [") > 1


def test_not_fitted_is_said():
    with pytest.raises(NotFittedError):
        FewShotClassifier().predict("photo.jpg")


def test_a_fitted_classifier_behaves_as_scikit_learns(folder, pictures, fitted):
    paths, labels = pictures
    before = set(vars(fitted))
    probabilities = fitted.predict_proba(paths)
    assert fitted.classes_.tolist() == NAMES
    assert probabilities.shape == (8, 2)
    assert probabilities.sum(1) == pytest.approx(np.ones(8), abs=1e-5)
    assert fitted.predict(paths).tolist() == labels
    assert fitted.score(folder) == fitted.score(paths, labels) == 1
    assert fitted.predict_proba(paths[::-1])[::-1] == pytest.approx(probabilities, abs=1e-5)
    assert fitted.predict_proba(paths[2:3]) == pytest.approx(probabilities[2:3], abs=1e-5)
    refined = fitted.predict_proba(paths[:4], together=True)  # of one of the classes
    answers = dcp_zoo.predict(fitted.model_, paths[:4], together=True)
    assert [row[0].probability for row in answers] == pytest.approx(refined.max(1), abs=1e-3)
    assert refined.sum(1) == pytest.approx(np.ones(4), abs=1e-5)
    assert np.abs(refined - probabilities[:4]).max() > 1e-3
    assert set(vars(fitted)) == before
    again = clone(fitted).fit(paths, labels)
    assert np.array_equal(again.predict_proba(paths), probabilities)


def test_pickle_and_checkpoint_keep_the_answers(pictures, fitted, tmp_path):
    paths, labels = pictures
    probabilities = fitted.predict_proba(paths)
    content = pickle.dumps(fitted)
    assert len(content) < 5e6  # without CLIP
    assert pickle.loads(content).predict_proba(paths) == pytest.approx(probabilities, abs=1e-3)
    numbers = FewShotClassifier(method="dcp", recipe=QUICK, classnames=NAMES).fit(
        paths, [10 * (name == "red") for name in labels]
    )
    numbers.save(tmp_path / "head")
    loaded = FewShotClassifier.load(tmp_path / "head", device="cpu")
    assert loaded.predict_proba(paths) == pytest.approx(probabilities, abs=1e-3)
    assert loaded.classes_.tolist() == [0, 10]
    assert dcp_zoo.create_model(f"local-dir:{tmp_path / 'head'}", True).classnames == NAMES


def test_a_class_is_added_without_training(pictures, fitted):
    classifier = pickle.loads(pickle.dumps(fitted))
    green = [Image.new("RGB", (150, 140), (10 * i, 120 + 9 * i, 30)) for i in range(6)]
    assert classifier.add_class("green", green[:4]).classes_.tolist() == ["blue", "green", "red"]
    assert classifier.predict(green[4:]).tolist() == ["green", "green"]
    assert classifier.predict(pictures[0]).tolist() == pictures[1]
    with pytest.raises(ZooError, match="green exists already"):
        classifier.add_class("green", green)
    with pytest.raises(ZooError, match="azure exists already, by its label or its name"):
        classifier.add_class("azure", green, name="blue")
    with pytest.raises(ZooError, match="5 has another type than 'blue'"):
        classifier.add_class(5, green)
    of_pandas = FewShotClassifier().fit(pictures[0], np.array(pictures[1], object))
    assert of_pandas.add_class("green", green[:4]).predict(green[4:]).tolist() == ["green", "green"]
    with pytest.raises(ZooError, match="5 has another type than 'blue'"):
        of_pandas.add_class(5, green)


def test_a_class_that_cannot_be_added_leaves_all_as_it_was(pictures, fitted, monkeypatch):
    """Also where nothing may require gradients, and with the state in the order of the classes."""
    classifier = pickle.loads(pickle.dumps(fitted))
    green, before = [Image.new("RGB", (150, 140), (10, 9 * i, 30)) for i in range(3)], fitted.predict_proba(pictures[0])
    info = {**classifier.model_.info}
    with monkeypatch.context() as patched:
        patched.setattr("dcp_zoo.model.text_probe.probe.minimum", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            classifier.add_class("azure", green)
    assert classifier.predict_proba(pictures[0]) == pytest.approx(before, abs=1e-6)
    assert (classifier.model_.info, classifier.model_.num_classes) == (info, 2)
    with torch.inference_mode():
        classifier.add_class("azure", green)
        assert FewShotClassifier().fit(*pictures).score(*pictures) == 1
    assert classifier.model_.info["class_images"] == {"blue": 4, "red": 4, "azure": 3}
    again = pickle.loads(pickle.dumps(classifier))
    again.model_.load_state_dict(classifier.model_.state_dict())
    assert again.predict_proba(pictures[0]) == pytest.approx(classifier.predict_proba(pictures[0]), abs=1e-3)
    classifier.model_.remove_class("azure")
    assert classifier.model_.info["class_images"] == {"blue": 4, "red": 4}


def test_folder_names_stand_for_labels(folder, pictures, tmp_path):
    paths, names = pictures
    numbers = FewShotClassifier(classnames={3: "blue", 5: "red"}).fit(paths, [5 if n == "red" else 3 for n in names])
    assert numbers.score(folder) == 1
    clone(numbers).set_params(method="gda").fit(paths, [5 if n == "red" else 3 for n in names], validation=folder)
    shutil.copytree(folder / "red", tmp_path / "5")
    shutil.copytree(folder / "blue", tmp_path / "blue")
    assert numbers.score(tmp_path) == 1
    shutil.copytree(folder / "blue", tmp_path / "green")
    with pytest.raises(ZooError, match="No class green: the classes are 3, 5"):
        numbers.score(tmp_path)
    numbers.model_.classes[0].name = "red"  # of two
    with pytest.raises(ZooError, match="Several classes are named red, so that this label fits each"):
        dcp_zoo.evaluate(numbers.model_, paths[-1:], ["red"])


def test_labels_outlive_edits_of_a_head(pictures, fitted, tmp_path):
    """Also where names repeat; a classifier has its labels in order, as scikit-learn expects."""
    paths, names = pictures
    numbers = FewShotClassifier(classnames={3: "blue", 5: "red"}).fit(paths, [5 if n == "red" else 3 for n in names])
    numbers.model_.info["labels"] = [["blue", 3], ["red", 5]]  # as `save` stores them
    numbers.model_.rename_class("blue", "azure")
    assert numbers.model_.info["labels"] == [["azure", 3], ["red", 5]]
    again = FewShotClassifier.load(numbers.model_.save_pretrained(tmp_path / "head"))
    assert again.classes_.tolist() == [3, 5]
    with pytest.warns(UserWarning, match="Repeated class names"):
        twins = FewShotClassifier(classnames=["a", "a", "b"]).fit(paths[:6], [*range(3)] * 2)
    for edit, labels in (
        (lambda model: model.rename_class("b", "z"), [0, 1, 2]),
        (lambda model: model.rename_class(1, "0"), [0, 1, 2]),
        (lambda model: model.remove_class(0), [1, 2]),
        (lambda model: model.remove_class("b"), [0, 1]),
    ):
        with warnings.catch_warnings():  # of repeated names
            warnings.simplefilter("ignore")
            model = dcp_zoo.create_model(str(twins.save(tmp_path / "twins", overwrite=True)), True)
            edit(model)
            assert FewShotClassifier.load(model.save_pretrained(tmp_path / "edited")).classes_.tolist() == labels
    model = dcp_zoo.create_model(str(fitted.save(tmp_path / "named")), True)
    model.rename_class("blue", "zaffre")
    loaded = FewShotClassifier.load(model.save_pretrained(tmp_path / "renamed"))
    assert loaded.classes_.tolist() == ["red", "zaffre"] == loaded.model_.classnames
    assert loaded.predict_proba(paths) == pytest.approx(fitted.predict_proba(paths)[:, ::-1], abs=1e-3)


def test_images_of_none_of_the_classes_are_examples(folder, pictures, tmp_path):
    """As for the command, in a folder or by a label; the other labels keep their type."""
    shutil.copytree(folder, tmp_path / "photos")
    shutil.copytree(folder / "red", tmp_path / "photos" / "none of these")
    found = labelled(tmp_path / "photos")
    assert (found.names, len(found.items)) == (NAMES, 8)
    assert [item.key for item in found.none] == [f"none of these/{i}.png" for i in range(4)]
    listed = labelled([*pictures[0], Image.new("L", (9, 9))], [i % 2 for i in range(8)] + ["None of these"])
    assert (listed.classes.tolist(), len(listed.items), len(listed.none)) == ([0, 1], 8, 1)
    with pytest.warns(UserWarning, match="The 4 images of none of the classes are not used"):
        FewShotClassifier().fit(tmp_path / "photos")
    with pytest.raises(ZooError, match="Images of none of these have no weights"):
        FewShotClassifier().fit(tmp_path / "photos", sample_weight=np.ones(8))


def test_a_head_without_classes_is_not_saved(pictures, tmp_path):
    model = dcp_zoo.create_model("dcp_mini", num_classes=0)
    for refused in (lambda: model.save_pretrained(tmp_path), lambda: dcp_zoo.predict(model, pictures[0])):
        with pytest.raises(ZooError, match="This head has no classes: call model.set_classnames first"):
            refused()
    assert not list(tmp_path.iterdir())


def test_an_image_has_one_label(pictures):
    paths, labels = pictures
    with pytest.raises(ZooError, match=r"0.png has two labels, 'blue' and 'red': keep one of them"):
        FewShotClassifier().fit([*paths, paths[0]], [*labels, "red"])
    FewShotClassifier().fit([*paths, paths[0]], [*labels, labels[0]])  # as a bootstrap does


def test_rejected_images_and_removed_classes(pictures, tmp_path):
    """None in place of an answer, by the functions and the class as by the model."""
    paths, _ = pictures
    classifier = FewShotClassifier(method="zero-shot", classifier="text-probe", classnames=NAMES)
    classifier.fit(paths, [10 * ("red" in path) for path in paths])
    model = classifier.model_
    for reject in (lambda: classifier.predict(paths, reject=True), lambda: dcp_zoo.predict(model, paths, reject=True)):
        with pytest.raises(ZooError, match="no threshold to reject images: it was fitted on too few"):
            reject()
    batch = torch.stack([dcp_zoo.create_transform(model)(Image.open(path)) for path in paths])
    model.text_probe.threshold.copy_(in_distribution(model, batch).sort().values[2:4].mean())
    expected = model.predict(batch, reject=True)
    assert expected.count(None) == 3
    answers = dcp_zoo.predict(model, paths, reject=True)
    assert [answer and answer[0].name for answer in answers] == expected
    labels = classifier.predict(paths, reject=True).tolist()
    assert labels == [name and {"blue": 0, "red": 10}[name] for name in expected]
    assert None not in classifier.predict(paths)
    with pytest.raises(ZooError, match="Unknown class 'red': choose from 0, 10"):
        classifier.remove_class("red")
    model.info["text_probe"]["thresholds"] = {"0.5": 1e3}
    assert set(classifier.predict(paths, reject=0.5)) == {None}
    assert classifier.predict(paths, reject=0.05).tolist() == labels
    with pytest.raises(ZooError, match=r"refuses 0\.2 of the images of its classes: choose from 0\.5, or train"):
        dcp_zoo.predict(model, paths, reject=0.2)
    classifier.add_class(5, paths[:2], name="green")
    assert set(classifier.predict(paths, reject=True)) <= {0, 10, 5, None}  # the threshold stays
    assert classifier.remove_class(10).classes_.tolist() == [0, 5]
    assert (classifier.model_.classnames, classifier.classes_.tolist()) == (["blue", "green"], [0, 5])
    classifier.save(tmp_path)
    assert FewShotClassifier.load(tmp_path).predict(paths).tolist() == classifier.predict(paths).tolist()
    model = dcp_zoo.create_model(str(tmp_path), True)
    model.set_classnames(["green", "blue"])
    model.save_pretrained(tmp_path)
    assert FewShotClassifier.load(tmp_path).predict(paths).tolist() == classifier.predict(paths).tolist()
    model.set_classnames(["green", "teal"])
    model.save_pretrained(tmp_path)
    with pytest.raises(ZooError, match="No label is stored for teal"):
        FewShotClassifier.load(tmp_path)


def test_a_classifier_that_keeps_its_images_removes_classes_but_cannot_reject(pictures):
    tip = FewShotClassifier(method="tip-adapter").fit(*pictures)
    with pytest.raises(ZooError, match="cannot reject images: it has no text probe"):
        tip.predict(pictures[0], reject=True)
    assert set(tip.remove_class("red").predict(pictures[0])) == {"blue"}


def test_decisions_are_logits(pictures, fitted):
    """Of two classes those of the second alone, as in scikit-learn."""
    found = fitted.decision_function(pictures[0])
    assert 1 / (1 + np.exp(-found)) == pytest.approx(fitted.predict_proba(pictures[0])[:, 1], abs=1e-5)
    three = FewShotClassifier().fit(pictures[0], ["a", "b", "c", "a", *pictures[1][4:]])
    assert (
        three.classes_[three.decision_function(pictures[0]).argmax(1)].tolist() == three.predict(pictures[0]).tolist()
    )


def test_features_take_the_place_of_images(pictures, fitted):
    """Of methods that need no more; the pictures are their own mirror images."""
    paths, labels = pictures
    first = FewShotClassifier().fit(paths, labels)
    features = first.transform(paths)
    again = clone(first).fit(features, labels)
    for images in (features, paths, torch.from_numpy(features)):
        assert again.predict_proba(images) == pytest.approx(first.predict_proba(paths), abs=0.02)
    assert again.score(features, labels) == dcp_zoo.evaluate(again.model_, features, labels).accuracy.percent / 100 == 1
    piped = make_pipeline(FewShotClassifier(method="zero-shot"), LogisticRegression(C=1e3)).fit(paths, labels)
    assert piped.score(paths, labels) == 1
    with pytest.raises(ZooError, match="dcp needs images, not only their features: choose from zero-shot, "):
        clone(first).set_params(method="dcp").fit(features, labels)
    with pytest.warns(UserWarning, match="a fit on the images also reads their mirror images"):
        clone(first).fit(features, labels)
    frame = clone(first).set_output(transform="pandas").fit(paths, labels).transform(paths)
    assert (
        frame.columns.tolist()
        == first.get_feature_names_out().tolist()
        == [f"fewshotclassifier{i}" for i in range(512 + 1280)]
    )
    assert clone(first).fit(frame, labels).score(frame, labels) == 1
    for wrong, message in (
        (lambda: clone(first).fit(np.eye(8), labels), r"\(8, 8\) do not fit: .* 512 or 1792 columns"),
        (lambda: fitted.predict(features), "features of dcp_mini .bundled., not of dcp_mini .bundled., changed by dcp"),
    ):
        with pytest.raises(ZooError, match=message):
            wrong()


def test_the_callers_autocast_does_not_enter_what_is_kept(pictures, fitted, tmp_path):
    keeping, plain = (pickle.loads(pickle.dumps(fitted)).set_params(memory=place) for place in (tmp_path, False))
    with torch.autocast("cpu", torch.bfloat16):
        found = keeping.transform(pictures[0])
    assert np.array_equal(found, plain.transform(pictures[0]))


def test_tables_with_one_column(pictures):
    paths, labels = (pandas.DataFrame({"column": column}) for column in pictures)
    assert FewShotClassifier().fit(paths, labels).score(paths.to_numpy(), labels) == 1


def test_weights_of_images_and_classes_in_the_text_probe(pictures):
    paths, labels = pictures
    wrong = ["red", *labels[1:]]

    def red(labels, weights=None, **options):
        classifier = FewShotClassifier(**options).fit(features[-len(labels) :], labels, weights)
        return classifier.predict_proba(features)[:, 1]

    features = FewShotClassifier(method="zero-shot").fit(paths, labels).transform(paths)
    expected, equal = red(labels[1:]), red(wrong)
    assert red(wrong, [0, *[1] * 7]) == pytest.approx(expected, abs=1e-5)  # as if it was not there
    assert red(wrong, [2] * 8) == pytest.approx(equal, abs=1e-5)
    assert red(wrong, [0.1, *[1] * 7])[0] < equal[0]
    heavy = red(wrong, class_weight={"red": 9, "blue": 3})
    assert red(wrong, [3, *[1] * 3, *[3] * 4]) == pytest.approx(red(wrong, class_weight={"red": 3}), abs=1e-5)
    assert red(wrong, class_weight={"red": 3}) == pytest.approx(heavy, abs=5e-3)  # L-BFGS stops early
    assert (heavy > equal).all()
    for method in ("dcp", "gda"):
        with pytest.raises(ZooError, match=f"{method} does not support sample_weight: choose method='text-probe'"):
            FewShotClassifier(method=method).fit(paths, labels, [1] * 8)
        with pytest.raises(ZooError, match=f"{method} does not support class_weight: choose method='text-probe'"):
            FewShotClassifier(method=method, class_weight={"red": 2}).fit(paths, labels)
    for weights in ([1] * 7, [-1, *[1] * 7], [float("nan"), *[1] * 7]):
        with pytest.raises(ZooError, match="sample_weight needs 8 numbers from 0"):
            FewShotClassifier().fit(paths, labels, weights)
    with pytest.raises(ZooError, match="images of fewer than two classes"):
        FewShotClassifier().fit(paths, labels, [0] * 4 + [1] * 4)


def test_features_of_another_tower_are_refused(pictures):
    """Also parts of them: of prolip, whose projection is trained, they have the width of plain CLIP's."""
    paths, labels = pictures
    own = FewShotClassifier(method="prolip", classifier="none", recipe={"epochs": 2}).fit(paths, labels)
    features = own.transform(paths)
    with pytest.raises(ZooError, match="features of dcp_mini .bundled., changed by prolip, not of dcp_mini .bundled.:"):
        FewShotClassifier().fit(features[2:], labels[2:])
    plain = FewShotClassifier(method="zero-shot").fit(paths, labels)
    with pytest.raises(ZooError, match="pass the images themselves"):
        plain.predict(features)
    assert plain.predict(plain.transform(paths)[1:]).tolist() == plain.predict(paths[1:]).tolist()
    for refused in (
        lambda: dcp_zoo.train("dcp_mini", features, labels),
        lambda: dcp_zoo.evaluate(plain.model_, features, labels),
        lambda: dcp_zoo.compare(features, labels, cv=2),
        lambda: FewShotClassifier().fit(paths, labels, validation=(features, labels)),
    ):
        with pytest.raises(ZooError, match="features of dcp_mini .bundled., changed by prolip"):
            refused()
    with pytest.raises(ZooError, match="This model reads 1792 features of an image, not 512: pass the images"):
        FewShotClassifier().fit(paths, labels).predict(plain.transform(paths))
    with pytest.raises(ZooError, match="this model reads images alone"):
        own.predict(plain.transform(paths).view(np.ndarray))


def test_numbers_as_class_names_are_doubted(pictures):
    labels = [int(label == "red") for label in pictures[1]]
    with pytest.warns(UserWarning, match=r"CLIP reads the class names, which are 0, 1: .*classnames=\{0: \"cat\""):
        FewShotClassifier(method="zero-shot").fit(pictures[0], labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FewShotClassifier(method="zero-shot", classnames=NAMES).fit(pictures[0], labels)
        named = FewShotClassifier(method="zero-shot", classnames=dict(enumerate(NAMES)))
        assert clone(named).fit(pictures[0], labels).model_.classnames == NAMES
        assert clone(named).fit(*pictures).model_.classnames == NAMES  # meta-estimators refit on the labels themselves


def test_processes_say_how_to_share_features(pictures, monkeypatch, tmp_path):
    monkeypatch.setattr("dcp_zoo.api.estimator.parent_process", lambda: "another")
    with pytest.warns(UserWarning, match='features of its own: memory="FOLDER" shares them'):
        FewShotClassifier().fit(*pictures)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FewShotClassifier(memory=tmp_path).fit(*pictures)


def test_methods_are_searched_by_cross_validation(pictures):
    grid = {"classifier": ["none", "text-probe"]}
    search = GridSearchCV(FewShotClassifier(method="zero-shot"), grid, cv=2).fit(*pictures)
    assert search.best_params_ == {"classifier": "text-probe"} or min(search.cv_results_["mean_test_score"]) == 1
    assert search.predict(pictures[0]).tolist() == pictures[1]


def test_features_are_kept_from_fit_to_fit(folder, pictures, tmp_path, monkeypatch):
    """By image: a changed file is read again. In a folder for other processes, as far as it is not damaged."""
    place = shutil.copytree(folder, tmp_path / "photos")
    paths, labels = dcp_zoo.list_labelled_images(place)
    runs = Count(monkeypatch, mini.Stem, "forward")
    features = FewShotClassifier(method="gda", memory=tmp_path / "kept")
    expected = features.fit(paths[1:], labels[1:]).predict_proba(paths)
    first = runs.calls
    again = clone(features).fit(paths[1:], labels[1:])
    assert np.array_equal(again.predict_proba(paths), expected)
    assert runs.calls == first  # not even for the image that was only predicted
    file = tmp_path / "kept" / cache.FILE_NAME
    assert np.array_equal(clone(features).fit(paths[1:], labels[1:]).predict_proba(paths), expected)
    assert runs.calls == first
    Image.open(paths[-1]).save(paths[0])
    os.utime(paths[0], (1, 1))
    file.write_bytes(b"damaged")
    assert not np.array_equal(clone(features).fit(paths[1:], labels[1:]).predict_proba(paths), expected)
    assert runs.calls > first


def test_the_oldest_features_go_when_there_are_too_many(tmp_path):
    for folder in (tmp_path, None):
        few = cache.FeatureCache(folder, limit=100_000)
        for i in range(300):
            few.put({str(i): torch.full((1000,), i)})
        kept = few.get(map(str, range(300)))
        assert kept["299"][0] == 299
        assert 5 < len(kept) < 30


def test_what_is_damaged_in_the_cache_is_dropped(tmp_path):
    """Wherever the file is damaged, it gives what was put there or nothing."""
    values = {str(i): torch.full((1000,), float(i)) for i in range(5)}
    cache.FeatureCache(tmp_path).put(values)
    file = tmp_path / cache.FILE_NAME
    whole = file.read_bytes()
    damages = [whole[:at] + bytes(9) + whole[at + 9 :] for at in (*range(0, 200, 9), *range(200, len(whole), 997))]
    damages += [whole[:size] for size in range(1, len(whole), 997)]
    for damaged in damages:
        file.write_bytes(damaged)
        for _ in range(2):  # the second one finds what the first one left
            kept = cache.FeatureCache(tmp_path)
            assert all(torch.equal(value, values[key]) for key, value in kept.get(values).items())
            kept.put(values)
    assert len(cache.FeatureCache(tmp_path).get(values)) == 5


def test_foreign_values_in_the_cache_are_ignored(tmp_path):
    cache.FeatureCache(tmp_path).put({"1": torch.ones(9), "2": torch.zeros(9)})
    for value in (None, 5, "text", b"", bytes(99), save({"value": torch.zeros(9, dtype=torch.long)})):
        with closing(sqlite3.connect(tmp_path / cache.FILE_NAME)) as file, file:
            file.execute("UPDATE kept SET value = ? WHERE key = '1'", (value,))
            file.execute("INSERT OR REPLACE INTO kept SELECT '3', value FROM kept WHERE key = '2'")
        assert cache.FeatureCache(tmp_path).get("123").keys() == {"2"}


def test_a_cache_that_cannot_be_used_is_gone_around(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "PATIENCE", 0.01)
    (tmp_path / "a file").touch()
    cache.FeatureCache(tmp_path).put({})
    with closing(sqlite3.connect(tmp_path / cache.FILE_NAME)) as other:
        other.execute("BEGIN EXCLUSIVE")
        for folder, reason in ((tmp_path, "database is locked"), (tmp_path / "a file", "File exists")):
            kept = cache.FeatureCache(folder)
            with pytest.warns(UserWarning, match=f"not cached for the next run. .*{reason}. Choose another"):
                kept.put({"1": torch.ones(3)})
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                kept.put({"2": torch.ones(3)})
                assert kept.get("123").keys() == {"1", "2"}
    assert not cache.FeatureCache(tmp_path).get("123")


def test_features_are_kept_by_what_an_image_shows(tmp_path, monkeypatch):
    """Not by how it is stored: a palette gives the same indices other colours, EXIF turns an image. What computed the
    features counts, too; and an image in an archive is the same wherever that is unpacked."""

    def in_palette(color):
        image = Image.new("P", (8, 6))
        image.putpalette(color)
        return image

    red, blue = in_palette((255, 0, 0)), in_palette((0, 0, 255))
    assert cache.image_key(red) != cache.image_key(blue)
    assert cache.image_key(red) == cache.image_key(red.convert("RGB"))
    turned, upright = red.convert("RGB"), red.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    turned.getexif()[0x112] = 6  # by a quarter
    turned.save(tmp_path / "1.png", exif=turned.getexif())
    assert cache.image_key(Image.open(tmp_path / "1.png")) == cache.image_key(upright)
    before = cache.computed_by()
    monkeypatch.setattr(cache, "version", lambda name: f"new {name}")
    cache.computed_by.cache_clear()
    assert cache.computed_by() != before
    cache.computed_by.cache_clear()
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as file:
        file.write(tmp_path / "1.png", "cat/1.png")
    keys = set()
    for _ in range(2):
        folder = unpacked(str(tmp_path / "photos.zip"))
        keys.add(cache.image_key(next(folder.rglob("1.png"))))
        unpacked.cache_clear()
    assert len(keys) == 1


def test_palette_images_in_memory_are_told_apart():
    colors = np.random.default_rng(0).permutation(8)
    images = [Image.new("RGB", (32, 32), (255, 10 * i, 0) if i < 4 else (0, 10 * i, 255)) for i in colors]
    labels = ["red" if i < 4 else "blue" for i in colors]
    images = [image.convert("P", palette=Image.Palette.ADAPTIVE) for image in images]
    assert FewShotClassifier().fit(images, labels).predict(images).tolist() == labels


def test_a_cache_that_cannot_be_opened_is_not_deleted(tmp_path, monkeypatch):
    """As where a process has too many files open."""
    cache.FeatureCache(tmp_path).put({"1": torch.ones(3)})
    connect = sqlite3.connect

    def fail(place, **options):
        if place != cache.MEMORY:
            raise sqlite3.OperationalError("unable to open database file")
        return connect(place, **options)

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", fail)
        with pytest.warns(UserWarning, match="unable to open"):
            cache.FeatureCache(tmp_path).put({})
    assert cache.FeatureCache(tmp_path).get("1")


def test_the_cache_of_commands_can_be_switched_off(monkeypatch):
    assert cache.features_folder().name == "features"
    monkeypatch.setenv("DCP_ZOO_NO_FEATURE_CACHE", "1")
    assert cache.features_folder() is None


def test_features_are_kept_as_they_come(pictures, tmp_path, monkeypatch):
    """A fit that was stopped computes only the others."""
    paths, labels = pictures
    monkeypatch.setattr("dcp_zoo.training.sources.VIEW_BATCH", 2)
    whole = FewShotClassifier().fit(paths, labels).predict_proba(paths)
    few, read = FewShotClassifier(memory=tmp_path), FrozenCLIP.read
    runs = Mock(side_effect=[*[DEFAULT] * 5, KeyboardInterrupt])
    monkeypatch.setattr(FrozenCLIP, "read", lambda *args: runs() and read(*args))
    with pytest.raises(KeyboardInterrupt):
        few.fit(paths, labels)
    assert runs.call_count == 6
    runs.reset_mock(side_effect=True)
    few.fit(paths, labels)
    assert runs.call_count == 2 * len(paths) // 2 - 4, "two batches of two images with their mirror images were kept"
    runs.reset_mock()
    assert np.allclose(few.predict_proba(paths), whole, atol=1e-3)  # in other batches, features round otherwise
    assert not runs.called, "features of the fit serve the answers"


def test_a_stopped_training_goes_on_with_the_same_images_only(pictures, tmp_path):
    """Which in memory have no names to tell them apart."""
    images, labels = [Image.open(path) for path in pictures[0]], pictures[1]
    options = {"method": "dcp", "recipe": QUICK, "output": tmp_path}

    def stop(model, epoch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dcp_zoo.train("dcp_mini", images, labels, callbacks=[stop], **options)
    others = [*images[:-1], Image.new("RGB", images[-1].size)]
    with pytest.raises(ZooError, match=r"the state of another run: hash of the images \w{12} instead of \w{12}\. To"):
        dcp_zoo.train("dcp_mini", others, labels, **options)
    head = dcp_zoo.train("dcp_mini", [image.copy() for image in images], labels, **options)
    assert head.info["subset_sha256"] != dcp_zoo.train("dcp_mini", others, labels).info["subset_sha256"]


@pytest.mark.parametrize("method", ["gda", "tip-adapter"])
def test_other_methods_are_saved_like_dcp(pictures, tmp_path, method):
    paths, labels = pictures
    classifier = FewShotClassifier(method=method).fit(paths, labels)
    classifier.save(tmp_path / "head")
    with pytest.raises(ZooError, match="head already holds a checkpoint.*overwrite=True"):
        classifier.save(tmp_path / "head")
    classifier.save(tmp_path / "head", overwrite=True)
    again = FewShotClassifier.load(tmp_path / "head")
    assert again.method == method
    probabilities = classifier.predict_proba(paths)
    assert probabilities.sum(1) == pytest.approx(np.ones(8), abs=1e-5)
    for other in (again, pickle.loads(pickle.dumps(classifier))):
        assert np.array_equal(other.predict_proba(paths), probabilities)
    correct = int((classifier.predict(paths) == labels).sum())
    assert dcp_zoo.evaluate(str(tmp_path / "head"), paths, labels).accuracy.correct == correct
    assert correct == 8 or method == "tip-adapter"


def test_what_a_method_cannot_is_said(pictures):
    with pytest.raises(ZooError, match="Unknown method 'svm': choose from zero-shot"):
        FewShotClassifier(method="svm").fit(*pictures)


# ------------------------------------------------------------------------------------------------ the process around it


@pytest.fixture
def calls(folder, pictures, fitted, uploads, tmp_path, tiny_head, exported_once):
    """A call of every public function, and of the methods that work."""
    head, images = fitted.model_, torch.rand(2, 3, 192, 192)
    own, trial = FewShotClassifier(random_state=7), Trial("few-shot", "dcp_mini", "zero-shot", "digits", 0, 0)
    vectors = {f"{part}_vector": np.eye(4, 8, dtype=np.float32) for part in ("train2", "test", "text")}
    names = {"train2_label": [0, 0, 1, 1], "test_label": [0, 0, 1, 1], "classnames": ["a", "b"]}
    vectors["text_vector"] = vectors["text_vector"][::2]
    np.savez(tmp_path / "digits.npz", **vectors, **names)
    return {
        "train": lambda: dcp_zoo.train("dcp_mini", folder, method="maple", recipe={"epochs": 1}),
        "evaluate": lambda: dcp_zoo.evaluate(head, folder),
        "predict": lambda: dcp_zoo.predict(head, folder),
        "inspect": lambda: dcp_zoo.inspect(folder),
        "search": lambda: dcp_zoo.search(folder, "something red"),
        "suggest": lambda: dcp_zoo.suggest(folder),
        "list_labelled_images": lambda: dcp_zoo.list_labelled_images(folder),
        "create_model": lambda: dcp_zoo.create_model("dcp_mini", True).eval().get_classifier(),
        "create_transform": lambda: dcp_zoo.create_transform(head)(Image.new("RGB", (9, 9))),
        "load_head": lambda: dcp_zoo.load_head(head, head.save_pretrained(tmp_path / "head")),
        "export": lambda: dcp_zoo.export(tiny_head, tmp_path / "file.onnx"),  # torch's exporter: see `onnx_file`
        "push_to_hub": lambda: dcp_zoo.push_to_hub(head, "me/colours"),
        "get_pretrained_cfg": lambda: dcp_zoo.get_pretrained_cfg("dcp_mini"),
        "is_model": lambda: dcp_zoo.is_model("dcp_mini"),
        **{name: getattr(dcp_zoo, name) for name in ("list_datasets", "list_heads", "list_models", "list_pretrained")},
        "fit": lambda: own.fit(*pictures).add_class("green", pictures[0][:1]).transform(pictures[0]),
        "head.predict": lambda: head.predict(images),
        "attention": lambda: attention_maps(head, images),
        "prepare": lambda: prepare(get_head("dcp_mini.caltech101-16shot").bundled_dir, "me"),
        "compare": lambda: dcp_zoo.compare(*pictures, methods=["gda"], cv=2),
        "benchmark": lambda: sweep([trial], GivenSettings(tmp_path / "sweep", features=tmp_path), run=run_given),
    }


def test_no_public_function_changes_the_process(calls):
    """Only fresh weights of a model are drawn from torch's random state, as those of every torch module are."""
    functions = {name for name in dcp_zoo.__all__ if inspect.isfunction(getattr(dcp_zoo, name))}
    assert functions <= calls.keys()
    for name, call in calls.items():
        random.random(), np.random.rand(), torch.rand(1)  # so that no state is the one after a seed
        with process_unchanged(name):
            call()


def test_a_fit_draws_from_the_random_state_that_it_is_given(pictures):
    """As in scikit-learn; of torch, Python and the caller's NumPy it draws nothing, also in a loop with splits."""
    np.random.seed(0)
    states = (3, np.int64(3), np.random.RandomState(3), np.random.default_rng(3), None)
    seeds = [seed_of(state) for state in states]
    assert seeds[:2] == [3, 3]
    assert len(set(seeds[1:])) == 4
    FewShotClassifier(method="zero-shot", random_state=np.random.RandomState(3)).fit(*pictures)
    for wrong in ("one", -1, 1.5):
        with pytest.raises(ZooError, match="Pass an integer from 0, a RandomState, a Generator or None"):
            seed_of(wrong)
