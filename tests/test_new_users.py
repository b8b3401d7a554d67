"""The command line for somebody with a folder of photographs: natural calls work, and every mistake is explained."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
from helpers import png_that_claims, use_endpoint
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from safetensors.torch import load_file, save_file

import dcp_zoo
import dcp_zoo.benchmark.sweep  # before a test replaces what it imports
from dcp_zoo import ZooError, threads
from dcp_zoo.cli.benchmark import split_commas
from dcp_zoo.cli.deploy import export_format, file_stem
from dcp_zoo.cli.options import class_list, head_name
from dcp_zoo.data import check_images, load_image, load_labelled, load_split, readers, subset_sha256, training_split
from dcp_zoo.data.images import check_complete, thumbnails
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.data.paths import picture_formats
from dcp_zoo.deploy.bulk.outputs import TABLES
from dcp_zoo.deploy.export import EXPORT_SUFFIXES
from dcp_zoo.files import check_writable
from dcp_zoo.hub import explained
from dcp_zoo.texts import class_folders, read_csv, write_csv
from dcp_zoo.zoo.registry import WEIGHTS

BUNDLED = "dcp_mini.caltech101-1shot"


def photo(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((130, 140), 30 + number).convert("RGB").save(path)
    return path


@pytest.fixture
def flowers(tmp_path, monkeypatch) -> Path:
    """The working folder, with MY_PHOTOS in it: two classes of six photographs."""
    monkeypatch.chdir(tmp_path)
    for name in ("rose", "tulip"):
        for i in range(6):
            photo(tmp_path / "MY_PHOTOS" / name / f"{i}.jpg", i)
    return tmp_path / "MY_PHOTOS"


@pytest.fixture
def my_head(tmp_path, monkeypatch) -> Path:
    """A checkpoint folder in the working folder, as training on MY_PHOTOS writes it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(WEIGHTS / BUNDLED, tmp_path / "my_head")
    path = tmp_path / "my_head" / "config.json"
    config = json.loads(path.read_text())
    config["label_names"] = ["rose", "tulip"]
    weights = tmp_path / "my_head" / "model.safetensors"  # without the text probe of other classes
    save_file({name: t for name, t in load_file(weights).items() if "classifier" not in name}, weights)
    config["dcp"] |= {"dataset": "folder", "shots": 3}
    path.write_text(json.dumps(config))
    return tmp_path / "my_head"


@pytest.fixture
def trained(monkeypatch) -> dict:
    """What `dcp-zoo train` would train, without doing so."""
    calls: dict = {}

    def load_for_training(dataset, data_root, *args):
        calls.update(dataset=dataset, data_root=data_root)
        return SimpleNamespace(note="", classnames=[], items=[], held_out=False)

    def plan(split, *args, **options):
        return SimpleNamespace(split=split)

    def train_head(run, output, options):
        calls["output"] = output
        return SimpleNamespace(info={}), {}

    monkeypatch.setattr("dcp_zoo.training.run.load_for_training", load_for_training)
    monkeypatch.setattr("dcp_zoo.training.run.plan", plan)
    monkeypatch.setattr("dcp_zoo.training.run.train_head", train_head)
    return calls


@pytest.fixture
def planned(monkeypatch) -> dict:
    """The run that `dcp-zoo train` planned, without training."""
    calls: dict = {}

    def train_head(run, *args):
        calls["run"] = run
        return SimpleNamespace(info={}), {}

    for name in ("train_head", "train_and_refit"):
        monkeypatch.setattr(f"dcp_zoo.training.run.{name}", train_head)
    return calls


@pytest.fixture
def no_work(monkeypatch) -> None:
    """Fails the test when a model or a dataset is loaded."""

    def work(*args, **options):
        pytest.fail("the error should have come first")

    for name in ("zoo.factory.create_model", "training.run.load_labelled", "benchmark.sweep.sweep"):
        monkeypatch.setattr(f"dcp_zoo.{name}", work)


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("args", "output"),
    [
        (["MY_PHOTOS", "--output", "my_head"], "my_head"),
        (["MY_PHOTOS"], "MY_PHOTOS_head"),
        (["MY_PHOTOS/"], "MY_PHOTOS_head"),
        (["--dataset", "folder", "--data-root", "MY_PHOTOS", "--output", "my_head"], "my_head"),
    ],
)
def test_a_folder_is_the_data(run, flowers, trained, args, output):
    run.ok("train", *args)
    assert trained == {"dataset": "folder", "data_root": trained["data_root"], "output": Path(output)}
    assert trained["data_root"].resolve() == flowers


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to train on. For your own images in one folder per class: dcp-zoo train MY_PHOTOS --output"),
        ([], "dcp-zoo train --dataset caltech101 --data-root DATA --output my_head"),
        (["--data-root", "MY_PHOTOS"], "needs --dataset NAME. For your own .*: dcp-zoo train MY_PHOTOS --output"),
        (["--dataset", "digits", "--data-root", "MY_PHOTOS"], "digits needs no --data-root: omit it"),
        (["--dataset", "hf://datasets/a/b", "--data-root", "MY_PHOTOS"], "hf://datasets/a/b needs no --data-root"),
        (["--dataset", "wds:///flowers", "--data-root", "MY_PHOTOS"], "wds:///flowers needs no --data-root"),
        (["MY_PHOTOS", "--dataset", "folder"], "MY_PHOTOS is the data already: omit --dataset"),
        (["MY_PHOTOS", "--data-root", "."], "MY_PHOTOS is the data already"),
        (["digits"], "digits is not a folder here. .* pass --dataset digits"),
        (["hf://datasets/a/b"], "pass --dataset hf://datasets/a/b"),
        (["MY_FOTOS"], "no folder MY_FOTOS. Pass one with one folder of images per class, or --dataset NAME"),
        (["MY_PHOTOS", "--head", "dcp_vitb16.dtd-1shot"], "already sets PHOTOS"),
        (["--head", "my_head"], "my_head is a checkpoint. To train on your own images: dcp-zoo train MY_PHOTOS"),
        (["--head", "hf-hub:a/b"], "hf-hub:a/b is a checkpoint"),
    ],
)
def test_train_needs_its_data_named_once(run, flowers, my_head, trained, args, message):
    err = run.refused("train", "--output", "out", *args)
    assert not trained
    assert err.count("Error:") == 1
    assert re.search(message, err)


def test_a_head_is_not_tested_on_images_it_was_trained_on(run, flowers):
    code, _, err = run("train", "MY_PHOTOS", "--test", 0)
    assert (code, err.count("Text probe on dcp_mini")) == (0, 1), err  # without test images, once is enough
    err = run.refused("eval", "MY_PHOTOS", "--head", "MY_PHOTOS_head")
    assert "was trained on all of these images" in err
    shutil.copytree("MY_PHOTOS", "OTHERS", ignore=shutil.ignore_patterns("5.jpg"))
    code, out, err = run("eval", "--head", "MY_PHOTOS_head", "--data-root", "OTHERS", "--report", "page.html")
    assert code == 0, err
    assert "on 10 test images of OTHERS" in out
    assert re.search(r"top-1: \d+\.\d % \(\d+ of 10; 95 % interval", out)
    assert "if it saw some of these, the accuracy is too high" in err
    assert "95 % interval" in Path("page.html").read_text()


def test_a_head_of_own_images_is_fitted_on_all_of_them_in_the_end(run, flowers):
    """Unless the user says otherwise, or has chosen the training images."""
    code, out, err = run("train", "MY_PHOTOS")
    assert (code, out.count("test top-1"), err.count("Text probe on dcp_mini")) == (0, 1, 2), err
    assert "The accuracy is measured first; the head that is saved is then fitted on all images" in err
    assert "Fitting again, now on all 12 images; the first fit took" in err
    details = json.loads(run.ok("info", "MY_PHOTOS_head", "--json"))
    assert (details["class_images"], details["test_images"]) == ({"rose": 6, "tulip": 6}, 4)
    err = run.refused("eval", "MY_PHOTOS", "--head", "MY_PHOTOS_head")
    assert re.search(
        r"trained on all of these images\. Its accuracy, \d+\.\d %, was measured before, on 4 held out", err
    )
    for part in ("train", "test"):
        shutil.copytree("MY_PHOTOS", f"PARTS/{part}")
    for number, args in enumerate((["MY_PHOTOS", "--no-refit"], ["MY_PHOTOS", "--shots", 2], ["PARTS"])):
        code, _, err = run("train", *args, "--output", f"head{number}")
        assert (code, err.count("Text probe on dcp_mini"), "fitted on all" in err) == (0, 1, False), err


def test_flags_take_no_value_in_help(run):
    for command in ([], ["train"], ["classes", "add"]):
        assert "<bool>" not in run.ok(*command, "--help")


def test_train_alone_is_explained(run):
    assert "There is nothing to train on" in run.refused("train")


def test_a_relative_shard_folder_may_have_a_data_root(run, trained, tmp_path):
    run.ok("train", "--dataset", "wds://flowers", "--data-root", tmp_path, "--output", tmp_path / "out")
    assert trained["data_root"] == tmp_path


def test_one_class_is_refused(flowers):
    shutil.rmtree(flowers / "tulip")
    with pytest.raises(ZooError, match="one class only, 'rose': at least two are needed"):
        load_split("folder", flowers)


def test_a_folder_too_far_up_or_of_videos_is_explained(flowers):
    with pytest.raises(ZooError, match=r"one class only, 'MY_PHOTOS'.* Perhaps you mean .*/MY_PHOTOS"):
        load_split("folder", flowers.parent)
    (flowers / "lily" / "day").mkdir(parents=True)
    (flowers / "lily" / "day" / "a.MP4").touch()
    with pytest.raises(ZooError, match=r"lily has no image .* Take pictures from its videos, add some, or remove it"):
        load_split("folder", flowers)


# --------------------------------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    "name", ["my_head", "my_head/", "my_head/model.safetensors", "my_head/config.json", "local-dir:my_head"]
)
def test_every_name_of_a_checkpoint_works(my_head, name):
    assert Path(head_name(name).removeprefix("local-dir:")).resolve() == my_head
    assert dcp_zoo.create_model(head_name(name), True).classnames == ["rose", "tulip"]
    assert dcp_zoo.create_model(name, True).classnames == ["rose", "tulip"]


def test_other_heads_keep_their_names(my_head):
    for name in (BUNDLED, "dcp_mini", "hf-hub:org/name", "hf-hub:org/name@v1"):
        assert head_name(name) == name
    with pytest.raises(ZooError, match="neither a checkpoint folder nor a head of the zoo"):
        dcp_zoo.create_model("x" * 1000, True)
    Path("dcp_mini").mkdir()  # any folder with the name of a model
    assert head_name("dcp_mini") == "dcp_mini"


COMMANDS = [["predict", "--sample"], ["eval", "--dataset", "digits"], ["explain"], ["export"]]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_every_command_takes_a_head_in_the_same_way(run, my_head, no_work, command):
    for name, message in {
        "my_haed": "'my_haed' is neither a checkpoint folder nor a head of the zoo. Nearest: my_head",
        "local-dir:nothing": "nothing is not a checkpoint: it has no config.json",
        "s3:bucket/head": "neither a checkpoint folder nor a head",
    }.items():
        assert message in run.refused(*command, "--head", name)


def test_a_file_of_a_checkpoint_is_a_head(run, my_head):
    out = run.ok("predict", "--sample", "--head", "my_head/model.safetensors", "--json")
    assert {p["class"] for p in json.loads(out)[0]["predictions"]} == {"rose", "tulip"}
    run.ok("explain", "--head", "my_head/config.json")


# -------------------------------------------------------------------------------------------------------------- images


@pytest.fixture
def damaged(tmp_path) -> list[Path]:
    """A truncated photograph, a text, and a file that does not exist."""
    cut = photo(tmp_path / "cut.jpg")
    cut.write_bytes(cut.read_bytes()[:2000])
    (tmp_path / "text.jpg").write_text("not an image")
    return [cut, tmp_path / "text.jpg", tmp_path / "nothing.jpg"]


def test_predict_goes_on_after_damaged_images(run, damaged, my_head):
    good = sample_images()[:2]
    paths = [damaged[0], good[0], *damaged[1:], good[1]]
    for batch_size in (1, 2, 32):
        code, out, err = run("predict", *paths, "--head", "my_head", "--json", "--batch-size", batch_size)
        assert code == 1
        answers = json.loads(out)
        assert [answer["image"] for answer in answers] == list(map(str, paths))
        assert [answer["image"] for answer in answers if "error" in answer] == list(map(str, damaged))
        assert all(str(path) in answers[paths.index(path)]["error"] for path in damaged)
        assert err.count("Error:") == 3
        assert "3 of 5 images cannot be read" in err
    code, out, err = run("predict", *paths, "--head", "my_head")
    assert code == 1
    assert "cat.jpg" in out
    assert "coffee.jpg" in out
    assert err.count("Error:") == 3
    code, out, err = run("predict", damaged[1], "--head", "my_head")
    assert (code, out.strip(), err.count("text.jpg")) == (1, "", 1)


def test_all_damaged_images_are_named_before_training(run, flowers, monkeypatch):
    for i in range(12):
        broken = photo(flowers / "rose" / f"broken{i:02}.png")
        broken.write_bytes(broken.read_bytes()[:-100] if i % 2 else b"")
    monkeypatch.setattr("dcp_zoo.training.run.train_head", lambda *args, **options: pytest.fail("training started"))
    err = run.refused("train", "MY_PHOTOS")
    assert "12 of 24 images cannot be read: " in err
    assert all(f"broken{i:02}.png" in err for i in range(12))
    assert re.search(r"broken00.png, .*broken10.png \(not in a supported format", err)  # each with its own reason
    assert re.search(r"broken01.png, .*broken11.png \(\w", err)
    assert "Replace them, or leave them out by moving them out of their class folders" in err
    assert not Path("MY_PHOTOS_head").exists()


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "gif", "webp", "tif"])
def test_truncated_files_are_found_and_whole_ones_are_not_decoded_twice(tmp_path, monkeypatch, suffix):
    path = photo(tmp_path / f"a.{suffix}")
    content = path.read_bytes()
    check_complete(str(path))
    path.write_bytes(content + b"\0" * 100)  # appended by some cameras
    check_complete(str(path))
    path.write_bytes(content + b"MotionPhoto")  # appended by some phones
    check_complete(str(path))
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ZooError, match=f"a.{suffix}"):
        check_complete(str(path))
    path.write_bytes(content)
    if suffix in ("jpg", "png", "webp"):
        monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: pytest.fail("decoded"))
        check_complete(str(path))


def test_photographs_above_pils_limit_are_read(tmp_path, monkeypatch):
    """And that limit, which is the whole process's, is left alone: other threads open images of their own."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # a photograph has 18,200 pixels: PIL warns
    path = str(photo(tmp_path / "a.jpg"))
    limits, opened = [], JpegImageFile._open
    monkeypatch.setattr(JpegImageFile, "_open", lambda self: limits.append(Image.MAX_IMAGE_PIXELS) or opened(self))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(path).size == (130, 140)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000)  # PIL raises
        assert load_image(path).size == (130, 140)
    assert limits == [10_000, 1_000]


def test_our_own_limit_is_explained(tmp_path):
    for side, fits in ((13_000, True), (14_000, False), (60_000, False)):
        path = tmp_path / f"{side}.png"
        path.write_bytes(png_that_claims(side))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if fits:
                check_complete(str(path))
            else:
                with pytest.raises(ZooError, match=f"{side} x {side} pixels, more than the limit of 180,000,000"):
                    load_image(str(path))


# ------------------------------------------------------------------------------------------------- formats and folders

HEIC_START = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.fixture
def no_heif(monkeypatch):
    """As if pillow-heif were not installed."""
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    picture_formats.cache_clear()
    yield
    picture_formats.cache_clear()


def test_heic_names_the_plugin(flowers, no_heif):
    for name in ("rose/a.HEIC", "rose/b.heif", "tulip/c.heic"):
        (flowers / name).write_bytes(HEIC_START)
    message = r"3 of 15 images cannot be read: .*rose/a.HEIC.*PIL cannot read HEIC .*\(pip install pillow-heif\)"
    with pytest.raises(ZooError, match=message):
        check_images(load_split("folder", flowers).items)
    renamed = flowers / "rose" / "c.jpg"
    renamed.write_bytes(HEIC_START)
    with pytest.raises(ZooError, match=r"c.jpg: PIL cannot read HEIC without a plugin \(pip install pillow-heif\)"):
        load_image(str(renamed))


def test_heic_is_read_where_the_plugin_is_installed(flowers):
    pytest.importorskip("pillow_heif")
    assert "HEIF" in picture_formats()
    photo(flowers / "rose" / "a.heic")
    assert load_image(str(flowers / "rose" / "a.heic")).size == (130, 140)
    assert len(load_split("folder", flowers).items) == 13


def test_the_plugin_is_registered_once(flowers, monkeypatch):
    calls: list[str] = []
    plugin = SimpleNamespace(register_heif_opener=lambda: calls.append("registered"))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    picture_formats.cache_clear()
    for path in flowers.rglob("*.jpg"):
        load_image(str(path))
    picture_formats.cache_clear()
    assert calls == ["registered"]


def test_avif_is_read(flowers):
    photo(flowers / "rose" / "a.avif")
    assert len(load_split("folder", flowers).items) == 13
    assert load_image(str(flowers / "rose" / "a.avif")).size == (130, 140)


def test_what_computers_add_to_folders_is_skipped(flowers):
    before = load_split("folder", flowers)
    for name in ("__MACOSX/rose/._0.jpg", ".Trash/x.jpg", "rose/._0.jpg", "rose/.thumbs/y.jpg", "rose/__MACOSX/z.jpg"):
        photo(flowers / name)
    for name in (".DS_Store", "rose/.DS_Store", "rose/Thumbs.db", "tulip/desktop.ini"):
        (flowers / name).touch()
    assert load_split("folder", flowers) == before


def test_files_that_are_not_used_are_counted(run, flowers, my_head):
    for name in ("rose/a.mov", "rose/b.MOV", "tulip/notes.txt", "tulip/README", "loose.jpg"):
        (flowers / name).touch()
    with pytest.warns(UserWarning, match=r"2 \.mov, 1 README, 1 \.txt, 1 \.jpg in no class folder\.") as seen:
        load_split("folder", flowers)
    assert len(seen) == 1
    assert re.search(r"Not used of MY_PHOTOS: .*1 README, 1 \.txt", run("predict", "MY_PHOTOS", "--head", "my_head")[2])


def test_class_folders_with_subfolders(flowers):
    for i in range(4):
        photo(flowers / "daisy" / f"day{i % 2}" / "camera" / f"{i}.jpg", i)
        photo(flowers / "daisy" / ".cache" / f"{i}.jpg", i)
    photo(flowers / "rose" / "night" / "0.jpg")
    split = load_split("folder", flowers)
    assert split.classnames == ["daisy", "rose", "tulip"]
    assert sorted(item.key for item in split.items if item.label == 0) == [
        *("daisy/day0/camera/0.jpg", "daisy/day0/camera/2.jpg"),
        *("daisy/day1/camera/1.jpg", "daisy/day1/camera/3.jpg"),
    ]
    assert len(split.items) == 17
    assert all(load_image(item.path).size == (130, 140) for item in split.items)


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_an_archive_is_like_its_folder(run, flowers, planned, my_head, kind):
    """Whether the folder itself is in it or only what it holds."""
    for base, name in (("MY_PHOTOS", "outer"), (None, "inner")):
        file = Path(shutil.make_archive(name, kind, *((".", base) if base else ("MY_PHOTOS",)))).name
        assert f"Saved in {name}_head" in run.ok("train", file)
        assert planned["run"].split.sha256 == training_split(load_labelled("folder", flowers)).sha256
        assert dcp_zoo.list_labelled_images(file)[1] == dcp_zoo.list_labelled_images(flowers)[1]
    code, out, err = run("predict", file, "--head", "my_head", "--json")
    assert (code, len(json.loads(out)), json.loads(out)[0]["image"]) == (0, 12, f"{file}/rose/0.jpg"), err
    Path("broken.zip").write_bytes(b"PK")
    assert "broken.zip cannot be unpacked" in run("train", "broken.zip")[2]


@pytest.mark.parametrize("text", ["file,class\n{}", "Path;Label;note\n{}", "{}", "class\tfile\n{}"])
def test_labels_in_a_table(flowers, text):
    separator = "\t" if "\t" in text else ";" if ";" in text else ","
    rows = [(f"{name}/{i}.jpg", {"rose": "r", "tulip": "t"}[name]) for name in ("rose", "tulip") for i in range(6)]
    lines = [separator.join(row[::-1] if text.startswith("class") else row) for row in rows]
    Path("labels.csv").write_text(text.format("\n".join(lines)))
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (["file", "class"], *rows):
        book.active.append(row)
    book.save("labels.xlsx")
    for file in ("labels.csv", "labels.xlsx"):
        found = load_labelled("folder", flowers, file)
        assert [(item.key, found.classnames[item.label]) for item in found.items] == rows
    Path("broken.xlsx").write_bytes(b"PK")
    with pytest.raises(ZooError, match="Cannot read broken.xlsx"):
        load_labelled("folder", flowers, "broken.xlsx")


def test_spreadsheets_that_are_no_tables_say_why(flowers, monkeypatch):
    openpyxl = pytest.importorskip("openpyxl")
    monkeypatch.setattr(readers, "MAX_BYTES", 50_000)
    monkeypatch.setattr(readers, "MAX_CELLS", 10_000)
    book = openpyxl.Workbook()
    book.active.append(["file", "class"])
    book.save("good.xlsx")
    book.active["A20000"] = "x"
    book.save("rows.xlsx")
    chart = openpyxl.chart.BarChart()
    chart.add_data(openpyxl.chart.Reference(book.active, min_row=1, max_row=1, min_col=1))
    book.active = book.create_chartsheet()
    book.active.add_chart(chart)
    book.save("chart.xlsx")
    changes = {
        "entities": ("<worksheet", '<!DOCTYPE a [<!ENTITY b "ha">]><worksheet'),
        "size": ("<sheetData>", "<sheetData>" + 50_000 * " "),
    }
    for name, (old, new) in changes.items():
        with ZipFile("good.xlsx") as before, ZipFile(f"{name}.xlsx", "w", ZIP_DEFLATED) as after:
            for part in before.namelist():
                text = before.read(part).decode()
                after.writestr(part, text.replace(old, new) if part == "xl/worksheets/sheet1.xml" else text)
    for name, message in (
        ("chart", "its active sheet is no table"),
        ("entities", "Unable to read"),
        ("rows", "more than 10,000 cells: save it as CSV"),
        ("size", "unpacked, it has more than 50,000 bytes"),
    ):
        with pytest.raises(ZooError, match=rf"Cannot read {name}.xlsx \(.*{message}"):
            load_labelled("folder", flowers, f"{name}.xlsx")


def test_labels_are_used_and_checked(run, flowers, planned):
    labels = flowers / "labels.csv"
    photo(flowers.parents[1] / "photo.jpg")
    for text, message in (
        ("name,year\na,b", "has the columns name, year: a labels file is a CSV"),
        ("file,class\nrose/0.jpg,", "row 2: ['rose/0.jpg', ''] is not a file and one class"),
        ("file,class\na.jpg,x\nrose/0.jpg,y", "lists 2 images with a class, of which 1 are not in"),
        (f"file,class\n{'a' * 5000}.jpg,x\nrose/0.jpg,y", "lists 2 images with a class, of which 1 are not in"),
        ("file,class\nrose/0.jpg,x\n./rose/../rose/0.jpg,y", "row 3: ['./rose/../rose/0.jpg', 'y'] has another class"),
        ("file,class\n../../photo.jpg,x", "MY_PHOTOS: ../../photo.jpg. Pass the folder"),
        (f"file,class\n{flowers.parents[1]}/photo.jpg,x", "of which 1 are not in"),
        ("file,class\nrose/0.jpg,dandelion, yellow", "row 2: ['rose/0.jpg', 'dandelion', 'yellow'] is not a file"),
        ('file,class\nrose/0.jpg,"rose', "unexpected end of data"),
        ("file,class\n", "lists 0 images with a class"),
        ("file,class,rejected\nrose/0.jpg,x,WAHR", "row 2"),
    ):
        labels.write_text(text)
        assert message in run.refused("train", "--labels", labels)
    labels.write_text("file,class\n" + "\n".join(f"{n}/{i}.jpg,{n}" for n in ("rose", "tulip") for i in range(6)))
    for place in ([], [flowers]):
        code, _, err = run("train", *place, "--labels", labels)
        assert (code, len(planned["run"].split.items)) == (0, 12), err
    assert "--labels is for your own images" in run("train", "--labels", labels, "--dataset", "digits")[2]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_labels_are_read_as_spreadsheets_save_them(flowers, encoding):
    """In Germany with semicolons, in an encoding of their choice; cells that are empty at the end may be missing."""
    text = 'file;class;note\r\nrose/0.jpg;"TV 32""";a\r\nrose/1.jpg;Märchen\r\ntulip/0.jpg;"a; b, c\nd";\r\n'
    Path("labels.csv").write_bytes(text.encode(encoding))
    with pytest.warns(UserWarning, match="Windows-1252") if encoding == "cp1252" else nullcontext():
        assert load_labelled("folder", flowers, "labels.csv").classnames == ["Märchen", 'TV 32"', "a; b, c\nd"]


def test_what_predict_and_inspect_wrote_are_labels(run, flowers, planned):
    """Answers that are no class are left out, with a count, and corrections are read."""
    pairs = (("rose", "-20C"), ("tulip", "a, b"))
    named = [(f"MY_PHOTOS/{folder}/{i}.jpg", name) for folder, name in pairs for i in range(6)]
    rows = [{"image": file, "rejected": False, "predictions": [{"class": name}]} for file, name in named]
    rows += [{"image": "x.jpg", "error": "damaged"}, {"image": "y.mp4#t=1", "predictions": [{"class": "a, b"}]}]
    rows[0]["rejected"] = True
    rows[1]["predictions"] = [{"class": "not sure"}]
    Path("SORTED").mkdir()
    TABLES[".csv"]("SORTED/predictions.csv", rows, ["image", "rejected", "class", "error"])
    for place in ([], [flowers]):
        err = run("train", *place, "--labels", "SORTED/predictions.csv")[2]
        assert "csv: 1 'none of these', 1 'not sure', 1 that cannot be read, 1 of videos." in err
        split = planned["run"].split
        assert (len(split.items), split.classnames) == (10, ["-20C", "a, b"])
        assert all(Path(item.path).is_file() for item in split.items)
    changes = [(f"rose/{i}.jpg", "rose", change) for i, change in enumerate(("tulip", "leave out", ""))]
    write_csv("inspection.csv", ["file", "class", "change", "suggestion"], [(*row, "") for row in changes])
    found = load_labelled("folder", flowers, "inspection.csv")
    assert [(item.key, item.label) for item in found.items] == [("rose/2.jpg", 0), ("rose/0.jpg", 1)]


def test_sorted_images_are_classes_again(flowers, tmp_path):
    """More images of a class may be sorted into its folder, whatever it is called; answers are no classes."""
    (flowers / "tulip").rename(flowers / "red: white?")
    for folder in (*class_folders(["red: white?", "none of these"]).values(), "Not sure"):
        photo(flowers / folder / "new.jpg")
    found = load_labelled("folder", flowers)
    assert found.classnames == ["red: white?", "rose"]
    assert [item.label for item in found.items] == [0] * 7 + [1] * 6
    assert "Left out: 2 images in Not sure, none of these" in found.note


def test_file_names_that_are_not_text(run, flowers, planned, monkeypatch):
    """They are of another system's encoding, and stay as they are; class names in it cannot be read by CLIP."""
    (flowers / "rose" / "0.jpg").rename(os.fsdecode(os.fsencode(flowers / "rose") + b"/\xe4.jpg"))
    run.ok("train", flowers)
    assert len(planned["run"].split.sha256) == len(subset_sha256(planned["run"].split.train)) == 64
    monkeypatch.setenv("DCP_ZOO_CACHE", "cache")
    _, table = dcp_zoo.inspect(flowers).write("found")
    assert {os.fsdecode(b"rose/\xe4.jpg"), "rose/1.jpg"} < {row[0] for row in read_csv(table)}
    (flowers / "rose").rename(os.fsdecode(os.fsencode(flowers) + b"/ros\xe4"))
    with pytest.raises(ZooError, match=r"CLIP cannot read 'a photo of a ros\\udce4.', which is not in UTF-8: rename"):
        dcp_zoo.inspect(flowers)


def test_folders_that_are_no_classes_are_asked_about(run, flowers, planned, monkeypatch):
    for year in ("2024", "2025-01"):
        photo(flowers / year / "rose" / "0.jpg")
    shutil.rmtree(flowers / "tulip")
    args = ("train", flowers, "--test", "0")
    err = run.refused(*args)
    for text in ("do not look like one: 2024, 2025-01", "--labels", "--yes"):
        assert text in err
    run.ok(*args, "--yes")
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("dcp_zoo.cli.train.confirm", lambda question: "2024" in question)
    run.ok(*args)
    shutil.rmtree(flowers / "rose")
    with pytest.warns(UserWarning, match=r"2024, 2025-01. If the classes are the folders in them \(rose\)"):
        dcp_zoo.list_labelled_images(flowers)


def test_given_parts_with_subfolders(tmp_path):
    for part in ("train", "test", "__MACOSX/train"):
        photo(tmp_path / part / "rose" / "day" / "a.jpg")
        photo(tmp_path / part / "tulip" / "a.jpg")
    split = load_split("folder", tmp_path)
    assert [item.key for item in split.test] == ["test/rose/day/a.jpg", "test/tulip/a.jpg"]


# ------------------------------------------------------------------------------------------------- classes and formats


def test_classes_are_names_or_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert class_list("cat, dog,tea cup") == ["cat", "dog", "tea cup"]
    assert class_list(",".join(f"name {i}" for i in range(500)))[499] == "name 499"
    assert class_list('cat, "dandelion, yellow", 32""') == ["cat", "dandelion, yellow", '32""']
    assert split_commas(["wds:///d/{train,test}-*.tar,dtd", "eurosat"]) == [
        "wds:///d/{train,test}-*.tar",
        "dtd",
        "eurosat",
    ]
    assert class_list(None) is None
    assert class_list("") == [""]  # which is refused
    Path("cats.txt").write_text("Siamese\nPersian cat\n \n")
    Path("cats.json").write_text('["Siamese", "Persian cat"]')
    assert class_list("cats.txt") == class_list("cats.json") == ["Siamese", "Persian cat"]
    for name in ("cat.txt", "lists/cats.JSON"):
        with pytest.raises(ZooError, match=f"There is no file {name}. --classes takes one, or names"):
            class_list(name)


def test_names_are_shown_as_they_are(run, flowers):
    photo(flowers / "rose" / "x [/y].jpg")
    code, out, err = run("predict", "MY_PHOTOS/rose", "--classes", "[red]rose,[/b]")
    assert (code, "y].jpg" in out, "[red]rose" in out) == (0, True, True), err
    code, out, err = run("predict", flowers / "rose" / "x [/y].jpg", "--classes", "[red]rose,[/b]")
    assert (code, "[red]rose" in out, "[/b]" in out) == (0, True, True), err


def test_predict_and_export_read_the_file(run, my_head):
    Path("names.txt").write_text("hall\nflower\n")
    _, out, _ = run("predict", "--sample", "--head", "my_head", "--classes", "names.txt", "--json")
    assert {p["class"] for p in json.loads(out)[0]["predictions"]} == {"hall", "flower"}
    run.ok("export", "--head", "my_head", "--classes", "names.txt", "--output", "my.safetensors")
    assert run("export", "--head", "my_head", "--classes", "name.txt")[0] == 2


@pytest.mark.parametrize(
    ("file", "format", "expected"),
    [
        (None, None, "onnx"),
        (None, "safetensors", "safetensors"),
        ("x.onnx", None, "onnx"),
        ("x.pt2", None, "torch-export"),
        ("x.safetensors", None, "safetensors"),
        ("x", None, "onnx"),
        ("x.bin", "safetensors", "safetensors"),
        ("x.pt2", "torch-export", "torch-export"),
        ("x.pt2", "onnx", "--format onnx contradicts x.pt2, which is named like torch-export"),
        ("x.pth", None, r"No format has the suffix .pth: choose .onnx, .pt2, .safetensors, or pass --format"),
        ("x.onnx", "tflite", "onnx, torch-export, safetensors"),
    ],
)
def test_the_suffix_decides_the_format(file, format, expected):
    file = Path(file) if file else None
    if expected in EXPORT_SUFFIXES:
        assert export_format(file, format, EXPORT_SUFFIXES) == expected
    else:
        with pytest.raises(ZooError, match=expected):
            export_format(file, format, EXPORT_SUFFIXES)


def test_a_contradiction_is_found_before_the_model_is_loaded(run, my_head, no_work):
    assert "contradicts x.pt2" in run.refused("export", "--head", "my_head", "--output", "x.pt2", "--format", "onnx")


def test_the_default_file_is_named_after_the_head(my_head, monkeypatch):
    assert file_stem(head_name("my_head/model.safetensors")) == "my_head"
    assert file_stem(head_name(BUNDLED)) == BUNDLED
    assert file_stem("hf-hub:org/name") == "name"
    monkeypatch.chdir(my_head)
    assert file_stem(head_name(".")) == "my_head"


# ---------------------------------------------------------------------------------------------------- eval and info


def test_eval_says_that_the_classes_differ(run, my_head, flowers):
    shutil.copytree(flowers / "rose", flowers / "daisy")
    code, out, err = run("eval", "--head", "my_head", "--data-root", "MY_PHOTOS")
    assert code == 0
    assert "Note: my_head was trained on 2 classes. It is tested with the 3 class names of MY_PHOTOS" in err
    assert "on 18 test images of MY_PHOTOS" in out  # all, as these are other images than it was trained on
    assert "trained on other images; if it saw some of these, the accuracy is too high" in err
    shutil.rmtree(flowers / "daisy")
    assert "Note:" not in run("eval", "--head", "my_head", "--data-root", "MY_PHOTOS")[2]


def test_eval_names_the_folder_it_needs(run, my_head, flowers):
    err = run.refused("eval", "--head", "my_head")
    assert "my_head was trained on your own images of the classes rose, tulip. Pass their folder" in err
    err = run.refused("eval", "--head", "my_head", "--dataset", "digits", "--data-root", "MY_PHOTOS")
    assert "digits needs no --data-root" in err


def test_eval_names_all_damaged_images(run, my_head, flowers):
    tests = load_split("folder", flowers).test
    for item in tests:
        Path(item.path).write_bytes(b"")
    err = run.refused("eval", "--head", "my_head", "--data-root", "MY_PHOTOS")
    assert f"{len(tests)} of 12 images cannot be read" in err


@pytest.mark.parametrize("name", ["my_head", "my_head/model.safetensors", "local-dir:my_head"])
def test_info_on_a_checkpoint(run, my_head, name):
    out = run.ok("info", name)
    for text in ("my_head", "dcp_mini", "folder", "2: rose, tulip", "top1_stored", "epochs: ", "torch: "):
        assert text in out
    details = json.loads(run("info", name, "--json")[1])
    assert (details["classes"], details["shots"]) == (["rose", "tulip"], 3)
    assert "my_head" in details["head"]


def test_a_server_does_not_tell_where_its_head_is(run, my_head, monkeypatch):
    names = []
    monkeypatch.setattr("dcp_zoo.deploy.server.application", lambda *args: names.append(args[4]))
    for name in ("onnx_file", "listen", "server"):
        monkeypatch.setattr(f"dcp_zoo.cli.deploy.{name}", MagicMock())
    for head in (my_head, my_head / "config.json", BUNDLED):
        run.ok("serve", "--head", head)
    assert names == ["my_head", "my_head", BUNDLED]


@pytest.mark.parametrize("labels", [{"rose": "R", "tulip": "T"}, {"rose": 0, "tulip": 1}, None])
def test_info_on_a_head_saved_from_python(run, flowers, labels):
    """Labels are shown where they are not the names; lists of numbers, such as class weights, are too."""
    paths, names = dcp_zoo.list_labelled_images(flowers)
    labels = labels or dict(zip(names, names, strict=True))
    weights = {label: 1 + (name == "rose") for name, label in labels.items()}
    classifier = dcp_zoo.FewShotClassifier(
        method="dcp",
        recipe={"epochs": 1, "depth": 2, "n_ctx": 2},
        classnames={label: name for name, label in labels.items()},
        class_weight=weights,
    )
    classifier.fit(paths, [labels[name] for name in names]).save("python_head")
    out = run.ok("info", "python_head")
    assert re.search(r"class_weight.*2: 1\.3\d+, 0\.6", out)
    assert ("rose: " in out) == (labels["rose"] != "rose")


def test_accuracies_that_no_longer_hold_are_not_saved(run, tmp_path):
    """They are those of the classes they were measured for, in any order."""
    one, photos = dcp_zoo.create_model(BUNDLED, True).classnames[0], torch.zeros(1, 3, 192, 192)
    for change, reason in (
        (lambda model: model.set_classnames(model.classnames[::-1]), ""),
        (lambda model: model.set_classnames(["rose", "daisy"]), "the classes were changed"),
        (lambda model: model.add_class("daisy", photos), "the class daisy was added"),
        (lambda model: model.add_class(one, photos), f"the class {one} got other images"),
        (lambda model: model.remove_class(one), f"the class {one} was removed"),
    ):
        model = dcp_zoo.create_model(BUNDLED, True)
        change(model)
        model.save_pretrained(tmp_path)
        details = json.loads(run("info", tmp_path, "--json")[1])
        assert ("metrics" in details) == (not reason)
        assert details.get("not_measured", "").startswith(reason)
    dcp_zoo.create_model(BUNDLED, True, classnames=["rose", "daisy"]).save_pretrained(tmp_path)
    assert "the classes were changed" in json.loads(run("info", tmp_path, "--json")[1])["not_measured"]


def test_classes_are_changed_on_the_command_line(run, flowers):
    """Each command says what becomes of the accuracy and the threshold, and stores what it says."""

    def config(head: str) -> dict:
        return json.loads(run("info", head, "--json")[1])

    paths, labels = dcp_zoo.list_labelled_images(flowers)
    classifier = dcp_zoo.FewShotClassifier(method="zero-shot", classifier="text-probe").fit(paths, labels)
    classifier.model_.info |= {"metrics": {"top1_stored": 50.0}, "test_images": 4}
    classifier.save("head")
    for i in range(3):
        photo(flowers / "daisy" / f"{i}.jpg", 9)
    command = ("classes", "rename", "rose", "wild rose", "--head", "head", "--output", "renamed")
    assert "accuracy and the rejection threshold stay" in run.ok(*command)
    assert "already holds a checkpoint" in run(*command)[2]
    assert config("renamed")["class_images"] == {"wild rose": 6, "tulip": 6}
    assert config("renamed")["metrics"]
    assert "2: 6 of wild rose, 6 of tulip" in " ".join(run("info", "renamed")[1].split())
    renamed = dcp_zoo.FewShotClassifier.load("renamed")
    assert [name.replace("wild ", "") for name in renamed.predict(paths)] == classifier.predict(paths).tolist()
    code, out, err = run("classes", "add", "daisy", flowers / "daisy", "--head", "head", "--output", "bigger")
    assert (code, "so it is gone" in out, "by 3 images: 3 classes" in out) == (0, True, True), err
    assert "the class daisy was added" in config("bigger")["not_measured"]
    out = run.ok("classes", "add", "daisy", flowers / "daisy/0.jpg", "--head", "bigger", "--output", "more")
    assert "1 images added to the 3 of daisy" in out
    assert config("more")["class_images"] == {"rose": 6, "tulip": 6, "daisy": 4}
    code, _, _ = run("classes", "remove", "rose", "--head", "more", "--output", "more", "--overwrite")
    assert (code, config("more")["classes"]) == (0, ["tulip", "daisy"])
    assert config("more")["class_images"] == {"tulip": 6, "daisy": 4}
    run.ok("classes", "add", "chair", flowers / "daisy", "--head", BUNDLED, "--output", "other")


def test_info_on_a_wrong_name(run, my_head):
    assert "Nearest: my_head" in run.refused("info", "my_haed")


# -------------------------------------------------------------------------------------------------- writing, the Hub

REASONS = [
    (errno.EACCES, "permission denied. Get write permission, or choose another --output"),
    (errno.EROFS, "the file system is read-only. Choose another --output"),
    (errno.ENOSPC, "no space left. Free disk space, or choose another --output"),
]


@pytest.mark.parametrize(("number", "message"), REASONS)
@pytest.mark.parametrize(
    "command",
    [
        ["train", "MY_PHOTOS"],
        ["export", "--head", "my_head", "--output", "out/my.onnx"],
        ["explain", "--head", "my_head", "--output", "out/moves.png"],
        ["benchmark", "few-shot", "--datasets", "folder", "--data-root", "MY_PHOTOS", "--output", "out"],
        ["report", "out"],
        ["convert", "x", "--model", "dcp_mini", "--classnames", "x", "--output", "out"],
    ],
    ids=lambda command: command[0] if isinstance(command, list) else None,
)
def test_a_folder_that_is_not_writable_is_found_first(
    run, flowers, my_head, no_work, monkeypatch, command, number, message
):
    def refuse(*args, **options):
        raise OSError(number, errno.errorcode[number])

    monkeypatch.setattr("dcp_zoo.files.TemporaryFile", refuse)
    monkeypatch.setattr("dcp_zoo.files.Path.touch", refuse)  # of a lock
    err = run.refused(*command)
    assert f"Cannot write to {'MY_PHOTOS_head' if command[0] == 'train' else 'out'}" in err
    assert message in err


def test_the_check_leaves_nothing_behind(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match="file/head: Not a directory. Choose another --output"):
        check_writable(tmp_path / "file" / "head")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_read_only_cache_names_hf_home(number):
    with pytest.raises(ZooError, match="Hub cache is not writable .*cache/hub.*Set HF_HOME"), explained("org/name"):
        raise OSError(number, "no", "cache/hub")


def test_without_a_network_there_is_one_try(tmp_path, monkeypatch):
    use_endpoint(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("the client waits for another try"))
    for name, pretrained in (("hf-hub:org/name", True), ("dcp_vitb16", "clip")):
        started = time.perf_counter()
        message = r"http://127.0.0.1:9 cannot be reached.*HF_ENDPOINT.*local-dir:PATH.*HF_HUB_OFFLINE=1"
        with pytest.raises(ZooError, match=message):
            dcp_zoo.create_model(name, pretrained)
        assert time.perf_counter() - started < 5


# ------------------------------------------------------------------------------------------------------------- threads


def test_threads_are_those_asked_for_or_the_cores(monkeypatch):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("joblib.cpu_count", lambda: 3)  # which knows the quota of a container
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads.use_threads(None)
    threads.use_threads(5)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    threads.use_threads(None)
    threads.use_threads(2)
    assert chosen == [3, 5, 7, 2]


def test_functions_choose_the_threads_of_their_own_thread_only():
    """Otherwise one that starts meanwhile keeps what another has set for itself, and all later ones with it."""

    def elsewhere() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    before = torch.get_num_threads(), elsewhere()
    with threads.fair_threads(before[1] + 2):
        assert (torch.get_num_threads(), elsewhere()) == (before[1] + 2, before[1])
    assert (torch.get_num_threads(), elsewhere()) == before


def test_images_are_read_on_the_cores_of_the_container(monkeypatch, flowers):
    pools: list[int] = []
    for kind, place in ((ThreadPoolExecutor, "dcp_zoo.data.images"), (ThreadPool, "dcp_zoo.data.load")):
        monkeypatch.setattr(f"{place}.{kind.__name__}", lambda n, kind=kind: pools.append(n) or kind(n))
    monkeypatch.setattr("joblib.cpu_count", lambda: 3)
    for granted in ("", "2,1"):
        monkeypatch.setenv("OMP_NUM_THREADS", granted)
        check_images(load_split("folder", flowers).items)
        thumbnails([str(flowers / "rose" / "0.jpg")])
    assert pools == [3, 3, 2, 2]


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "--sample", "--head", "my_head"],
        ["train", "MY_PHOTOS", "--shots", "2"],
        ["eval", "--head", "my_head", "--data-root", "MY_PHOTOS"],
        ["benchmark", "few-shot", "--datasets=folder", "--data-root=MY_PHOTOS", "--methods=zero-shot", "--output=out"],
    ],
    ids=lambda command: command[0],
)
def test_commands_that_compute_take_threads(run, flowers, my_head, monkeypatch, command):
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    run.ok(*command, "--threads", 3)
    assert chosen == [3]


def test_threads_on_ray_are_cores(run, flowers, no_work):
    args = ["--datasets", "folder", "--data-root", "MY_PHOTOS", "--output", "out", "--ray", "local", "--threads", 2]
    assert "with --ray, use --cpus" in run.refused("benchmark", "few-shot", *args)


@pytest.mark.parametrize("own", [{}, {"KMP_BLOCKTIME": "200"}])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(own):
    """In Python as on the command line, as both import the package before torch."""
    env = {name: value for name, value in os.environ.items() if name not in threads.PASSIVE} | own
    program = "import os, sys, dcp_zoo; print('torch' in sys.modules, *map(os.environ.get, dcp_zoo.threads.PASSIVE))"
    found = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "passive", own.get("KMP_BLOCKTIME", "0")]


# -------------------------------------------------------------------------------------------------------------- extras


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        (["export", "--head", "my_head"], "onnx", "export"),
        (["export", "--head", "my_head", "--output", "x.onnx"], "onnxscript", "export"),
        (["export", "--head", "my_head", "--format", "onnx"], "onnxruntime", "export"),
        (["explain", "--head", "my_head", "--output", "moves.png"], "matplotlib", "plots"),
        (["report", "out"], "pandas", "plots"),
        (["report", "out"], "matplotlib", "plots"),
        (["benchmark", "few-shot", "--datasets", "dtd", "--output", "out"], "pandas", "plots"),
        (["benchmark", "few-shot", "--datasets", "dtd", "--output", "out", "--ray", "local"], "ray", "ray"),
        (["train", "--dataset", "hf://datasets/a/b", "--output", "out"], "datasets", "data"),
        (["train", "--dataset", "wds://flowers", "--output", "out"], "webdataset", "data"),
    ],
)
def test_a_missing_extra_is_named_before_the_work(run, my_head, monkeypatch, command, module, extra):
    def work(*args, **options):
        pytest.fail("the error should have come first")

    for name in ("zoo.factory.create_model", "benchmark.sweep.execute", "benchmark.store.gather"):
        monkeypatch.setattr(f"dcp_zoo.{name}", work)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", work)
    monkeypatch.setitem(sys.modules, module, None)
    assert f"pip install 'dcp_zoo[{extra}]'" in run.refused(*command)
    assert not Path("out").exists()
