"""`dcp-zoo train` on one's own images: natural calls work, and every mistake is explained."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import open_clip
import pytest
from helpers import Count, photo

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo.heads.config import read_config
from dcp_zoo.prediction.outputs import TABLES
from dcp_zoo.tables import read_csv
from dcp_zoo.training.methods import text_probe


def test_a_head_is_not_tested_on_images_it_was_trained_on(run, flowers, image_work, monkeypatch):
    monkeypatch.setenv("DCP_ZOO_CACHE", "cache")
    code, _, err = run("train", "MY_PHOTOS", "--test", 0)
    assert (code, err.count("Text probe on dcp_mini")) == (0, 1), err  # without test images, once is enough
    assert "dcp_mini is a miniature for trying things out. For real use: train --model small" in err
    photo(Path("MY_PHOTOS/rose/6.jpg"), 6)
    image_work.reset()
    code, _, err = run("train", "MY_PHOTOS", "--test", 0, "--output", "again")
    assert (code, image_work.decoded) == (0, 1), "features are kept"
    Path("MY_PHOTOS/rose/6.jpg").unlink()
    err = run.refused("eval", "MY_PHOTOS", "--head", "MY_PHOTOS_head")
    assert "was trained on these images" in err
    shutil.copytree("MY_PHOTOS", "OTHERS", ignore=shutil.ignore_patterns("5.jpg"))
    assert "was trained on these images: pass others" in run.refused("eval", "OTHERS", "--head", "MY_PHOTOS_head")
    for name in ("rose", "tulip"):
        photo(Path("OTHERS", name, "5.jpg"))  # another picture
    code, out, err = run("eval", "--head", "MY_PHOTOS_head", "--data-root", "OTHERS")
    assert (code, "on 2 images of OTHERS" in out) == (0, True), err
    assert "Left out: 10 of 12 images, as MY_PHOTOS_head was trained on them" in err


def test_a_head_of_own_images_is_trained_on_all_of_them_in_the_end(run, flowers, monkeypatch):
    """Unless the user says otherwise, or has chosen the training images. CLIP is loaded once for all
    fits."""
    loads = Count(monkeypatch, open_clip, "CLIP")
    apart = ("--method", "ss-text", "--test", 0.3)
    prompts = ("--method", "coop", "--set", "epochs=1")
    none = ("--method", "zero-shot")  # which learns from no image
    for args, tested, fits in (((), 12, 1), (apart, 4, 2), (prompts, 4, 2), (none, 4, 2)):
        loads.calls = 0
        code, out, err = run("train", "MY_PHOTOS", *args, "--overwrite")
        assert (code, out.count("test top-1"), len(re.findall(" on dcp_mini: ", err)), loads.calls) == (0, 1, fits, 1)
        assert "After the accuracy is measured, the head is trained on all images and saved" in err
        details = json.loads(run.ok("info", "MY_PHOTOS_head", "--json"))
        assert (details["class_images"], details["test_images"]) == ({"rose": 6, "tulip": 6}, tested)
        assert "test top-1, measured before training on all images: at least" in out
        assert ("measured before" in run.ok("info", "MY_PHOTOS_head")) == (tested == 4)
    err = run.refused("eval", "MY_PHOTOS", "--head", "MY_PHOTOS_head")
    assert "What is known: dcp-zoo info MY_PHOTOS_head" in err
    for number, args in enumerate((["MY_PHOTOS", "--no-refit"], ["MY_PHOTOS", "--shots", 2])):
        code, out, err = run("train", *args, "--method", "ss-text", "--output", f"head{number}")
        assert (code, err.count(" on dcp_mini: "), "trained on all" in err) == (0, 1, False), err
        assert "measured before" not in out
    for part in ("train", "test"):
        shutil.copytree("MY_PHOTOS", Path("PARTS", part))
    run.ok("train", "PARTS", "--method", "ss-text", "--refit", "--output", "whole")
    assert "trained on these images" in run.refused("eval", "PARTS", "--head", "whole")


def test_the_accuracy_of_a_text_probe_costs_no_further_heads(run, flowers, monkeypatch):
    """What it says of images that were left out to weigh its candidates is measured."""
    heads = []
    fit_probe = text_probe.fit_probe
    monkeypatch.setattr(text_probe, "fit_probe", lambda head, *args: heads.append(head) or fit_probe(head, *args))
    for path in flowers.glob("*/[3-9].jpg"):  # of four pictures of one colour it is asked whether they show few things
        path.unlink()
    assert "of 6; 95 % interval" in run.ok("train", flowers)
    assert len(heads) == 1
    assert heads[0].text_probe.held_out is None, "it is not kept with the head"


def test_the_smallest_classes_have_their_recall_told(run, flowers, small_model):
    """By images that were left out, or by those of a test part; not where classes are about as large."""
    quick = ["--model", small_model, "--overwrite"]
    assert "smallest classes" not in run("train", flowers, *quick, "--method", "ss-text")[2]
    for path in flowers.glob("tulip/[2-9].jpg"):
        path.unlink()
    err = run("train", flowers, *quick)[2]
    assert re.search(r"smallest classes: tulip 2 images, recall (0|50|100) %", " ".join(err.split())), err
    err = run("train", flowers, *quick, "--method", "ss-text", "--test", 0.5)[2]
    assert re.search(r"smallest classes: tulip 1 image, recall (0|100) %", " ".join(err.split())), err


def test_one_image_per_class_trains_and_is_not_measured(run, flowers):
    for path in flowers.glob("*/[1-9].jpg"):
        path.unlink()
    for args in ([], ["--no-refit"], ["--method", "coop", "--set", "epochs=1"]):
        code, out, err = run("train", flowers, "--report", "mistakes.html", *args, "--overwrite")
        assert (code, "test top-1" in out, Path("mistakes.html").exists()) == (0, False, False), err
        assert "the accuracy is not known" in " ".join(err.split())
        assert "mistakes.html is not written" in err
    photo(flowers / "rose" / "1.jpg")
    out = " ".join(run("train", flowers, "--overwrite")[1].split())
    assert "of 2; 95 % interval" in out
    assert "both without tulip)" in out
    assert "predict --reject will be refused: it needs 20 images" in out


def test_notes_are_of_the_head_that_is_saved(run, flowers):
    """Not of those that folds measure, which have fewer images. One image in two classes is named."""
    for name in ("rose", "tulip"):
        for i in range(6, 10):
            photo(flowers / name / f"{i}.jpg", i)
    photo(flowers / "none of these" / "0.jpg")
    shutil.copy(flowers / "rose" / "0.jpg", flowers / "tulip" / "0.jpg")
    code, out, err = run("train", flowers)
    assert (code, "are not used" in err, "will be refused" in out) == (0, False, False), err
    assert "It rejects what is much like its 1 examples" in " ".join(out.split())
    pair = "The same image is in several classes: MY_PHOTOS/rose/0.jpg and MY_PHOTOS/tulip/0.jpg."
    assert err.count(pair) == 1, err


def test_photographs_of_one_group_are_on_one_side(run, flowers, small_model):
    """By folder, by a match in the path, by a column of a table; else found by what they show, and when."""
    for name in ("rose", "tulip"):
        for i in range(3):
            (flowers / name / f"day{i}").mkdir()
            for j in range(2):
                (flowers / name / f"{2 * i + j}.jpg").rename(flowers / name / f"day{i}" / f"{j}.jpg")
    rows = [
        (path.relative_to(flowers), path.parts[-3], path.parent.name + path.parts[-3])
        for path in flowers.rglob("*.jpg")
    ]
    Path("table.csv").write_text("\n".join(["file,class,group", *(",".join(map(str, row)) for row in rows)]))
    by, matched, listed = ["--group-by", "folder"], ["--group-by", r"\w+/day\d"], ["--labels", "table.csv"]
    quick = ["--model", small_model, "--method", "ss-text", "--overwrite"]
    for args, counts in ((by, (12, 6)), ([*matched, "--test", 0.3], (4, 2)), (listed, (12, 6))):
        code, out, err = run("train", "MY_PHOTOS", *args, *quick)
        assert code == 0, err
        assert "12 images in 6 groups that were taken together" in " ".join(err.split())
        assert "of {}, in groups, which count as {};".format(*counts) in " ".join(out.split())
        assert read_config("MY_PHOTOS_head")["dcp"]["independent_images"] == counts[1]
    err = run("train", "MY_PHOTOS", "--group-by", "rose|tulip", *quick)[2]
    assert "too few images, or groups, of a class to leave any out: the accuracy is not known" in " ".join(err.split())
    assert "metrics" not in read_config("MY_PHOTOS_head")["dcp"]
    for args, images in (([], 6), (["--test", 0.4], 2)):  # but if all tulips are one group, those of the rose are known
        code, out, err = run("train", "MY_PHOTOS", "--group-by", r"rose/day\d|tulip", *args, *quick)
        assert re.search(rf"of {images}, in groups, .* both without tulip\)", " ".join(out.split()))
        assert read_config("MY_PHOTOS_head")["dcp"]["untested"] == ["tulip"]
        assert "both without tulip)" in " ".join(run.ok("info", "MY_PHOTOS_head").split())
    for how, why in (("(", "is neither folder nor a regular expression"), ("night", "finds no group in the paths")):
        assert why in run.refused("train", "MY_PHOTOS", "--group-by", how, "--overwrite")


def test_labels_are_used_and_checked(run, flowers, small_model):
    labels = flowers / "labels.csv"
    for text, message in (
        ("name,year\na,b", "has the columns name, year: a labels file is a CSV"),
        ("file,class\n,rose", "row 2: ['', 'rose'] is not a file, its class and perhaps its part"),
        ("file,class\na.jpg,x\nrose/0.jpg,y", "lists 2 images, of which 1 are not in"),
        ("file,class\nrose/0.jpg,", "lists 1 images, none with a class: fill in its column class"),
        ("file,class\nrose/0.jpg,x\n./rose/../rose/0.jpg,y", "rose/0.jpg has two classes, 'x' and 'y'"),
        ('file,class\nrose/0.jpg,"rose', "unexpected end of data"),
    ):
        labels.write_text(text)
        assert message in run.refused("train", "--labels", labels)
    labels.write_text("file,class\n" + "\n".join(f"{n}/{i}.jpg,{n}" for n in ("rose", "tulip") for i in range(6)))
    for number, place in enumerate(([], [flowers])):
        quick = ("--model", small_model, "--method", "ss-text", "--test", 0)
        run.ok("train", *place, "--labels", labels, *quick, "--output", f"head{number}")
        assert read_config(f"head{number}")["dcp"]["class_images"] == {"rose": 6, "tulip": 6}
    assert "--labels is for your own images" in run("train", "digits", "--labels", labels)[2]


def test_what_predict_wrote_are_labels(run, flowers):
    """What has no class is left out, with a count, and what is rejected is an example of that."""
    pairs = (("rose", "-20C"), ("tulip", "a, b"))
    named = [(f"MY_PHOTOS/{folder}/{i}.jpg", name) for folder, name in pairs for i in range(6)]
    rows = [
        {"image": file, "class": name, "predictions": [{"class": name, "probability": 0.9}]} for file, name in named
    ]
    rows += [{"image": "x.jpg", "error": "damaged"}]
    rows[0]["class"] = "none of these"
    rows[1]["class"] = "leave out"
    TABLES[".csv"]("predictions.csv", rows)
    err = run("train", flowers, "--labels", "predictions.csv", "--method", "ss-text", "--test", 0, "--output", "head")[
        2
    ]
    assert "Left out of predictions.csv: 1 images without a class." in err
    assert "predictions.csv has the answers of a head: unless you corrected" in err
    assert read_config("head")["dcp"]["class_images"] == {"-20C": 4, "a, b": 6}


@pytest.fixture
def interruptible():
    """Handles Ctrl-C as in a terminal: a test run in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_at_once_and_says_how_to_go_on(run, flowers, monkeypatch, interruptible):
    """In any part of a training: a step that is stopped is taken again."""

    def stopped(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr("dcp_zoo.training.run.train_on_all", stopped)
    code, _, err = run("train", flowers, "--method", "dcp")
    said = "What was computed is kept: repeat the command to go on." in " ".join(err.split())
    assert (code, said) == (130, True)


def test_file_names_that_are_not_text(run, flowers, monkeypatch):
    """They are of another system's encoding, and stay as they are; class names in it cannot be read by
    CLIP."""
    (flowers / "rose" / "0.jpg").rename(os.fsdecode(os.fsencode(flowers / "rose") + b"/\xe4.jpg"))
    run.ok("train", flowers, "--method", "zero-shot", "--test", 0)
    monkeypatch.setenv("DCP_ZOO_CACHE", "cache")
    _, table = dcp_zoo.inspect(flowers).write("found")
    assert {os.fsdecode(b"rose/\xe4.jpg"), "rose/1.jpg"} < {row[0] for row in read_csv(table)}
    (flowers / "rose").rename(os.fsdecode(os.fsencode(flowers) + b"/ros\xe4"))
    with pytest.raises(ZooError, match=r"CLIP cannot read 'a photo of a ros\\udce4.', which is not in UTF-8: rename"):
        dcp_zoo.inspect(flowers)
