"""One's own images, in a folder for each class or listed in a table."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import photo
from PIL import Image

import dcp_zoo
from dcp_zoo.data import Item, load_labelled, load_split
from dcp_zoo.errors import ZooWarning
from dcp_zoo.features.extract import FeatureExtractor
from dcp_zoo.features.photos import Photos
from dcp_zoo.probe.threshold import thresholds_of
from dcp_zoo.training.methods.text_probe import scores_of


def test_what_is_not_read_is_said(flowers, run, tmp_path, my_head):
    """Links to folders, other files, and parts that are called in another way."""
    (flowers / "rose" / "more").symlink_to(flowers / "tulip", target_is_directory=True)
    for name in ("rose/a.mov", "rose/b.MOV", "tulip/notes.txt", "tulip/README", "loose.jpg"):
        (flowers / name).touch()
    said = " ".join(run("train", flowers, "--method", "zero-shot", "--test", 0)[2].split())
    assert "rose/more is a link to a folder, and is not read: pass it itself" in said
    assert "2 .mov, 1 README, 1 .txt, 1 images in no class folder." in said
    assert re.search(r"Ignored in MY_PHOTOS: .*1 README, 1 \.txt", run("predict", "MY_PHOTOS", "--head", "my_head")[2])
    for command in ("inspect", "train"):
        assert "is among the images of" in run.refused(command, flowers, "--output", flowers / "new")
    for part in ("Train", "Test"):
        for name in ("tulip", "lily"):
            photo(tmp_path / "CAPITALS" / part / name / "0.jpg")
    said = run("train", tmp_path / "CAPITALS", "--output", "x")[2]
    assert "has no classes, but parts: rename Test, Train to train, test and val" in said


def test_subfolders_are_read_and_what_computers_add_is_skipped(flowers):
    before = load_split("folder", flowers)
    for name in ("__MACOSX/rose/._0.jpg", ".Trash/x.jpg", "rose/._0.jpg", "rose/.thumbs/y.jpg", "rose/__MACOSX/z.jpg"):
        photo(flowers / name)
    for name in (".DS_Store", "rose/.DS_Store", "rose/Thumbs.db", "tulip/desktop.ini"):
        (flowers / name).touch()
    assert load_split("folder", flowers) == before
    keys = [photo(flowers / "daisy" / place / "0.jpg") for place in ("day0/camera", "day1/camera", ".cache")][:2]
    found = load_labelled("folder", flowers)
    assert found.classnames == ["daisy", "rose", "tulip"]
    assert [item.path for item in found.items if item.label == 0] == list(map(str, keys))


def test_answers_are_no_classes(flowers, tmp_path):
    for folder in ("none of these", "Leave out"):
        photo(flowers / folder / "new.jpg")
    with pytest.warns(ZooWarning, match=r"Ignored in .*: 1 folder Leave out\."):
        found = load_labelled("folder", flowers)
    assert found.classnames == ["rose", "tulip"]
    assert [item.key for item in found.no_class] == ["none of these/new.jpg"]
    for part in ("train", "test"):
        for name in ("rose", "tulip", "none of these/day"):
            photo(tmp_path / "PARTS" / part / name / "a.jpg")
    with pytest.warns(ZooWarning, match="1 folder test/none of these"):
        found = load_labelled("folder", tmp_path / "PARTS")
    assert [item.key for item in found.no_class] == ["train/none of these/day/a.jpg"]


def test_what_is_like_an_image_of_none_of_the_classes_is_rejected(flowers, run):
    rng = np.random.default_rng(0)
    for name, hue in {"rose": 0, "tulip": 120, "none of these": 70}.items():
        (folder := flowers / name).mkdir(exist_ok=True)
        for i in range(14):
            color = Image.new("RGB", (130, 140), f"hsv({hue + 3 * i}, 90%, 90%)")
            noise = Image.fromarray(rng.normal(128, 60 + i, (140, 130)).clip(0, 255).astype(np.uint8)).convert("RGB")
            Image.blend(color, noise, 0.6).save(folder / f"{i}.jpg")
    (flowers / "none of these/0.jpg").rename("new.jpg")
    heads = {"with": [], "without": ["--labels", "labels.csv"]}
    rows = [f"{name}/{i}.jpg,{name}" for name in ("rose", "tulip") for i in range(14)]
    Path("labels.csv").write_text("\n".join(["file,class", *rows]))
    for head, options in heads.items():
        out = run.ok("train", flowers, *options, "--test", 0, "--output", head)
        assert ("It rejects what is much like its 13 examples of none of these." in out) == (head == "with")
        (answer,) = json.loads(run.ok("predict", "new.jpg", "--head", head, "--reject", "--json"))
        assert answer["rejected"] == (head == "with")
    code, _, err = run("train", flowers, "--method", "zero-shot", "--test", 0, "--output", "other")
    assert (code, "The 13 images of none of the classes are not used: only a text probe" in err) == (0, True)


@pytest.mark.parametrize("text", ["file,class\n{}", "Path;Label;Image\n{}", "class\tfile\n{}"])
def test_labels_in_a_table(flowers, text):
    separator = "\t" if "\t" in text else ";" if ";" in text else ","
    rows = [(f"{name}/{i}.jpg", {"rose": "r", "tulip": "t"}[name]) for name in ("rose", "tulip") for i in range(6)]
    cells = {"file,class": lambda row: row, "Path;Label": lambda row: ("", row[1], row[0]), "class\tfile": reversed}
    order = next(order for start, order in cells.items() if text.startswith(start))
    Path("labels.csv").write_text(text.format("\n".join(separator.join(order(row)) for row in rows)))
    found = load_labelled("folder", flowers, "labels.csv")
    assert [(item.key, found.classnames[item.label]) for item in found.items] == rows


def test_a_column_that_is_called_class_says_the_class(flowers):
    """Also beside one called label, which says it where it is alone."""
    Path("labels.csv").write_text("file,class,label,image\nrose/0.jpg,rose,0,a\ntulip/0.jpg,tulip,1,b\n")
    found = load_labelled("folder", flowers, "labels.csv")
    assert [(item.key, found.classnames[item.label]) for item in found.items] == [
        ("rose/0.jpg", "rose"),
        ("tulip/0.jpg", "tulip"),
    ]


def test_the_last_table_says_the_class(flowers, monkeypatch):
    """A link is its file, parts stay, and what the first table does not list is no sample."""
    for i in range(4):
        photo(Path(f"UNSORTED/{i}.jpg"), 20 + i)
    (flowers / "rose" / "link.jpg").symlink_to(Path("UNSORTED/0.jpg").absolute())
    keys = [f"{name}/{i}.jpg" for name in ("rose", "tulip") for i in range(6)] + ["rose/link.jpg"]
    rows = [f"{key},{key.split('/')[0]},{'test' if '0' in key else 'train'}\n" for key in keys]
    Path("0.csv").write_text("".join(["file,class,part\n", *rows]))
    answers = {f"UNSORTED/{i}.jpg": name for i, name in enumerate(("tulip", "rose", "daisy", "none of these"))}
    answers |= {"MY_PHOTOS/rose/0.jpg": "tulip", "MY_PHOTOS/rose/5.jpg": "None of these"}
    answers |= {"MY_PHOTOS/tulip/4.jpg": "Leave out", "MY_PHOTOS/tulip/5.jpg": ""}
    Path("1.csv").write_text("image,class\n" + "".join(f"{file},{name}\n" for file, name in answers.items()))
    Path("2.csv").write_text("file,class\nUNSORTED/1.jpg,daisy\n")
    found = load_labelled("folder", flowers, ["0.csv", "1.csv", "2.csv"])
    expected = {key: key.split("/")[0] for key in keys}
    expected |= {"rose/link.jpg": "tulip", "rose/0.jpg": "tulip"}
    expected |= {"../UNSORTED/1.jpg": "daisy", "../UNSORTED/2.jpg": "daisy"}
    for gone in ("rose/5.jpg", "tulip/4.jpg", "tulip/5.jpg"):
        del expected[gone]
    assert {item.key: found.classnames[item.label] for item in found.items} == expected
    assert [item.label for item in found.train] == sorted(item.label for item in found.train)
    assert {item.key for item in found.items if item.added} == {"../UNSORTED/1.jpg", "../UNSORTED/2.jpg"}
    assert [item.key for item in found.test] == ["rose/0.jpg", "tulip/0.jpg"]
    assert [item.key for item in found.no_class] == ["../UNSORTED/3.jpg", "rose/5.jpg"]
    assert "Left out of 1.csv: 2 images without a class." in found.note


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_labels_are_read_as_spreadsheets_save_them(flowers, encoding):
    """In Germany with semicolons, in an encoding of their choice; cells that are empty at the end may be
    missing."""
    text = 'file;class;note\r\nrose/0.jpg;"TV 32""";a\r\nrose/1.jpg;Märchen\r\ntulip/0.jpg;"a; b, c\nd";\r\n'
    Path("labels.csv").write_bytes(text.encode(encoding))
    with pytest.warns(UserWarning, match="Windows-1252") if encoding == "cp1252" else nullcontext():
        assert load_labelled("folder", flowers, "labels.csv").classnames == ["Märchen", 'TV 32"', "a; b, c\nd"]


def test_a_folder_val_sets_the_threshold(tmp_path, run):
    """By its own scores; of fewer than 20 images it does not."""
    rng = np.random.default_rng(0)
    for part, images in (("train", 12), ("val", 10), ("test", 2)):
        for name, colour in (("red", (200, 40, 40)), ("blue", (40, 40, 200))):
            (folder := tmp_path / "photos" / part / name).mkdir(parents=True)
            for i in range(images):
                pixels = np.clip(np.array(colour) + rng.integers(-40, 40, (8, 8, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).resize((64, 64)).save(folder / f"{i}.png")
    heads = []
    for number in (0, 1):
        out = run.ok("train", tmp_path / "photos", "--output", tmp_path / f"head{number}")
        assert re.search(r"--reject refuses [\d.]+ % of these images, where 5 % is promised", " ".join(out.split()))
        heads.append(dcp_zoo.create_model(f"local-dir:{tmp_path / f'head{number}'}", True))
        (tmp_path / "photos" / "val" / "red" / f"{number}.png").unlink()
    paths = sorted(map(str, (tmp_path / "photos" / "val").glob("*/*")))  # without two of the 20
    table = FeatureExtractor(heads[0].frozen)(Photos([Item(path, path, 0) for path in paths]), heads[0].readings)
    expected = thresholds_of(torch.from_numpy(scores_of(heads[0], table)))["0.05"]
    thresholds = [head.rejection_threshold() for head in heads]
    assert thresholds[0] == pytest.approx(expected, abs=0.15)
    assert thresholds[1] != pytest.approx(thresholds[0], abs=0.01)
    refused = dcp_zoo.evaluate(heads[0], str(tmp_path / "photos" / "test")).info["refused"]
    answers = dcp_zoo.predict(heads[0], sorted(map(str, (tmp_path / "photos" / "test").glob("*/*"))), reject=True)
    assert refused == 100 * answers.count(None) / len(answers)
    out = run.ok("eval", tmp_path / "photos", "--head", tmp_path / "head0")
    assert f"--reject refuses {refused:.1f} % of these" in out
