"""The answers of a head on labelled images: intervals, classes, confusions, mistakes, and the page that
shows them."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import noisy_picture
from PIL import Image

import dcp_zoo
from dcp_zoo import FewShotClassifier
from dcp_zoo.accuracy import Accuracy
from dcp_zoo.answers import Outputs
from dcp_zoo.data import Item, load_split
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.features import FeatureExtractor, ImageLoader, Photos
from dcp_zoo.heads.config import read_config
from dcp_zoo.training.evaluation import Confusion, Evaluation, evaluations
from dcp_zoo.training.mistakes import write_mistakes


@pytest.fixture
def evaluation(tmp_path) -> Evaluation:
    """Six images of three classes, two of the four cats wrong; class 2 has no image."""
    items = []
    for i, label in enumerate([0, 0, 0, 0, 1, 1]):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (300, 200), (40 * i, 0, 0)).save(path)
        items.append(Item(str(path), path.name, label))
    answers = [(0, 3.0), (1, 1.0), (0, 2.0), (1, 4.0), (1, 1.0), (1, 5.0)]
    logits = torch.zeros(6, 3)
    for row, (label, value) in zip(logits, answers, strict=True):
        row[label] = value
    return Evaluation(["cat", "dog & co", "owl"], items, logits)


@pytest.mark.filterwarnings("ignore:dcp_mini:dcp_zoo.errors.ZooWarning")
def test_a_head_is_measured_as_in_eval_mode_and_a_layer_of_its_own_in_no_other_way():
    """In training mode, too, by the stored statistics; a layer answers with and without a text probe alike."""
    head = dcp_zoo.create_model("dcp_mini", "caltech101-16shot").train()
    images = ImageLoader(
        Photos([Item(path, path, i % 2) for i, path in enumerate(sample_images()[:2])]),
        FeatureExtractor(head.frozen),
    )
    told = next(iter(evaluations(head, images, all_modes=False).values()))
    assert torch.equal(told.logits, next(iter(evaluations(head.eval(), images).values())).logits)
    head.reset_classifier(2)
    assert {one.logits.shape for one in evaluations(head, images).values()} == {(2, 2)}


def test_the_interval_is_wilsons():
    """Both ends p solve |correct / n - p| = z sqrt(p (1 - p) / n), except where they are 0 or 1."""
    for end in (p / 100 for p in Accuracy("", 4, 6).interval):
        assert abs(4 / 6 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 6), abs=1e-6)
    ends = [end for n in range(1, 60) for correct in (0, n) for end in Accuracy("", correct, n).interval]
    assert min(ends) >= 0
    assert max(ends) <= 100


def test_accuracy_confusions_and_mistakes_worst_first(evaluation):
    assert evaluation.accuracy == Accuracy("", 4, 6, untested=["owl"])
    assert (
        str(evaluation.accuracy)
        == "at least 29 % (97.5 % sure); estimate 66.7 % (4 of 6; 95 % interval 29 to 91; both without owl)"
    )
    assert evaluation.per_class == [Accuracy("cat", 2, 4), Accuracy("dog & co", 2, 2)]
    same = replace(evaluation, classnames=["cat", "cat", "owl"])
    assert same.per_class == [Accuracy("cat", 2, 4), Accuracy("cat (1)", 2, 2)]
    assert evaluation.confusion_matrix.tolist() == [[2, 2, 0], [0, 2, 0], [0, 0, 0]]
    assert evaluation.confused_pairs == [Confusion("cat", "dog & co", 2, 4)]
    first, second = evaluation.mistakes
    assert (first.item, second.item) == (evaluation.items[3], evaluation.items[1])
    assert first.probability == pytest.approx(math.exp(4) / (math.exp(4) + 2), abs=1e-4)
    assert (first.name, first.predicted) == ("cat", "dog & co")


def test_the_page_shows_every_mistake_as_a_picture(evaluation, tmp_path):
    page = tmp_path / "new" / "mistakes.html"
    write_mistakes(evaluation, page, "my <head>")
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 2
    assert "my &lt;head&gt;" in text
    assert "cat, predicted as dog &amp; co: 2 of 4" in text
    assert (evaluation.balanced, "the mean of the classes' accuracies: 75.0 %" in text) == (75.0, True)
    assert Evaluation(["cat"], evaluation.items[:4], evaluation.logits[:4]).balanced is None
    assert str(tmp_path) not in text  # paths are those in the folder
    assert "calibration" not in text  # six images say nothing about it
    many = Evaluation(evaluation.classnames, evaluation.items * 40, evaluation.logits.repeat(40, 1))
    write_mistakes(many, page, "many")
    assert "Expected calibration error" in page.read_text()


def test_predictions_are_sorted_and_ties_keep_the_order_of_the_classes():
    logits = np.log(np.float32([[0.2, 0.3, 0.2, 0.3], [1e-9, 1 - 1e-7, 1e-7, 1e-9]]))
    rows = [row["predictions"] for row in Outputs(logits).rows(["a", "b", "c", "d"], 3)]
    assert [[row["class"] for row in found] for found in rows] == [["b", "d", "a"], ["b", "c", "a"]]
    assert [row["probability"] for row in rows[0]] == [0.3, 0.3, 0.2]
    assert [row["probability"] for row in rows[1]] == [1, 0, 0]


def test_eval_keeps_the_classes_of_the_head(run, my_head, flowers):
    shutil.copytree(flowers / "rose", flowers / "daisy")
    err = run.refused("eval", "--head", "my_head")
    assert "my_head was trained on your own images: pass a folder with images of its classes, rose, tulip" in err
    err = run.refused("eval", "--head", "my_head", "--data-root", "MY_PHOTOS")
    assert "No class daisy: the classes are rose, tulip. Pass images of these only." in err
    shutil.rmtree(flowers / "daisy")
    _, out, err = run("eval", "--head", "my_head", "--data-root", "MY_PHOTOS")
    assert "on 12 images of MY_PHOTOS" in out  # all, as this head does not say which it has seen
    assert "does not say which images it was trained on: if these are among them, the accuracy is too high" in err


def test_eval_on_a_dataset_of_other_classes_is_the_cross_dataset_protocol(run, flowers, small_model):
    """The head gets the dataset's class names, in its template, as in `dcp-zoo benchmark`."""
    FewShotClassifier(small_model, method="zero-shot").fit(flowers).save("head")
    code, out, err = run("eval", "digits", "--head", "head", "--precision", "float32", "--json")
    assert code == 0, err
    assert "Note: head is tested with the class names of digits" in err
    digits = load_split("digits")
    images, labels = [item.path for item in digits.test], [digits.classnames[item.label] for item in digits.test]
    head = dcp_zoo.create_model("head", True).eval()
    found = []
    for template in ("a photo of the number {}.", "{}"):
        head.set_classnames(digits.classnames, template)
        evaluated = dcp_zoo.evaluate(head, images, labels, precision="float32")
        found.append({row.name: [row.correct, row.images] for row in evaluated.per_class})
    assert json.loads(out)["per_class"] == found[0] != found[1]


@pytest.mark.parametrize("form", ["folder", "images"])
def test_no_image_of_a_training_in_python_is_tested(run, flowers, small_model, form):
    """Whether it was given by its folder or in memory, and wherever the same file is now."""
    paths, labels = dcp_zoo.list_labelled_images(flowers)
    data = ([Image.open(path) for path in paths], labels) if form == "images" else (flowers,)
    head = dcp_zoo.train(small_model, *data, method="ss-text")
    if form == "folder":  # its hashes are those of the command
        options = ("--model", small_model, "--method", "ss-text", "--test", 0)
        run.ok("train", "MY_PHOTOS", *options, "--output", "by_command")
        names = ("split_sha256", "subset_sha256", "image_hashes")
        assert [read_config("by_command")["dcp"][name] for name in names] == [head.info[name] for name in names]
    head.save_pretrained("head")
    assert "head was trained on these images: pass others" in run.refused("eval", "MY_PHOTOS", "--head", "head")


def test_a_folder_of_some_classes_is_judged_among_all(run, tmp_path, monkeypatch):
    """By the command, also with a table of the images, and in Python: classes without images stay possible
    answers."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    colors = {"crane": (200, 30, 30), "lake": (30, 30, 200), "leaf": (20, 120, 20), "snow": (230, 230, 230)}
    for name, color in colors.items():
        for i in range(2):
            noisy_picture(Path("known", name, f"{i}.png"), color, rng)
            # half of these are of classes without a folder
            noisy_picture(Path("some", ["leaf", "snow"][i], f"{name}.png"), color, rng)
    head = FewShotClassifier().fit("known").model_
    head.save_pretrained("head")
    found = dcp_zoo.evaluate(head, "some")
    assert head.classnames == found.classnames
    assert {pair.predicted for pair in found.confused_pairs} - {"leaf", "snow"}, "otherwise nothing is tested"
    rows = [f"{path},{path.parent.name}" for path in Path("some").rglob("*.png")]
    Path("table.csv").write_text("\n".join(["file,class", *rows]))
    for given in (["some"], ["--labels", "table.csv"]):
        shown = json.loads(run.ok("eval", *given, "--head", "head", "--json"))
        assert shown["top1"] == round(found.accuracy.percent, 2)
        assert shown["per_class"] == {row.name: [row.correct, row.images] for row in found.per_class}
        assert shown["confused_pairs"] == [list(pair) for pair in found.confused_pairs]
