"""One's own images, in a folder for each class or listed in a table."""

import json
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
from helpers import photo
from PIL import Image

from dcp_zoo import ZooError
from dcp_zoo.data import load_image, load_labelled, load_split, readers

pytestmark = pytest.mark.usefixtures("quick_probe")


def test_one_class_is_refused(flowers):
    shutil.rmtree(flowers / "tulip")
    with pytest.raises(ZooError, match="one class only, 'rose': pass a place with a folder of images for each class"):
        load_split("folder", flowers)


def test_a_folder_too_far_up_or_of_videos_is_explained(flowers):
    with pytest.raises(ZooError, match="one class only, 'MY_PHOTOS': pass a place"):
        load_split("folder", flowers.parent)
    (flowers / "lily" / "day").mkdir(parents=True)
    (flowers / "lily" / "day" / "a.MP4").touch()
    with pytest.raises(ZooError, match=r"lily has no image .* Add one or remove it"):
        load_split("folder", flowers)


def test_what_is_not_read_is_said(flowers, run, tmp_path):
    """Reserved names, links to folders, and parts that are called in another way."""
    shutil.copytree(flowers / "rose", flowers / "leave out")
    (flowers / "rose" / "more").symlink_to(flowers / "tulip", target_is_directory=True)
    (flowers / "rose" / "gone.jpg").symlink_to("nowhere.jpg")
    said = " ".join(run("inspect", flowers)[2].split())
    assert "Left out: the images in leave out, as these names are reserved" in said
    assert "rose/more is a link to a folder, and is not read: pass it itself" in said
    for command in ("inspect", "train"):
        assert "is among the images of" in run.refused(command, flowers, "--output", flowers / "new")
    for part in ("Train", "Test"):
        shutil.copytree(flowers / "tulip", tmp_path / "CAPITALS" / part / "tulip")
        shutil.copytree(flowers / "tulip", tmp_path / "CAPITALS" / part / "lily")
    found = load_labelled("folder", tmp_path / "CAPITALS")
    assert "these do not look like one: Test, Train" in readers.unlike_classes(found.classnames, found.items)
    assert not readers.unlike_classes(["bus", "train"], [])


def test_what_computers_add_to_folders_is_skipped(flowers):
    before = load_split("folder", flowers)
    for name in ("__MACOSX/rose/._0.jpg", ".Trash/x.jpg", "rose/._0.jpg", "rose/.thumbs/y.jpg", "rose/__MACOSX/z.jpg"):
        photo(flowers / name)
    for name in (".DS_Store", "rose/.DS_Store", "rose/Thumbs.db", "tulip/desktop.ini"):
        (flowers / name).touch()
    assert load_split("folder", flowers) == before


def test_a_sweep_tells_folders_of_the_same_name_apart(run, flowers, tmp_path):
    """Their classes and files have the same names, too, but in the other folder, each photograph is of both classes."""
    copy, other = (shutil.copytree(flowers, tmp_path / place / "MY_PHOTOS") for place in ("copy", "other"))
    shutil.copytree(flowers / "rose", other / "tulip", dirs_exist_ok=True)

    def sweep(place, seed, refused=False):
        grid = ("benchmark", "few-shot", "--datasets", "folder", "--methods", "linear-probe", "--shots", 2)
        return (run.refused if refused else run.ok)(*grid, "--seeds", seed, "--data-root", place, "--output", "SWEEP")

    sweep(flowers, 1)
    results = {path: path.read_text() for path in Path("SWEEP/results").iterdir()}
    sweep(copy, 1)
    error = sweep(other, 1, refused=True)
    named = r"MY_PHOTOS \(\w{8}\)"
    assert re.search(rf"linear-probe.json was made with folder {named}, not {named}: choose another --output", error), (
        error
    )
    assert results == {path: path.read_text() for path in Path("SWEEP/results").iterdir()}

    sweep(other, 2)
    run.ok("report", "SWEEP")
    report = Path("SWEEP/report/report.md").read_text()
    assert len(set(re.findall(named, report))) == 2
    assert not re.search(r"\d ± \d", report)  # it would be of two folders


def test_files_that_are_not_used_are_counted(run, flowers, my_head):
    for name in ("rose/a.mov", "rose/b.MOV", "tulip/notes.txt", "tulip/README", "loose.jpg"):
        (flowers / name).touch()
    with pytest.warns(UserWarning, match=r"2 \.mov, 1 README, 1 \.txt, 1 \.jpg in no class folder\.") as seen:
        load_split("folder", flowers)
    assert len(seen) == 1
    assert re.search(r"Ignored in MY_PHOTOS: .*1 README, 1 \.txt", run("predict", "MY_PHOTOS", "--head", "my_head")[2])


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


def test_given_parts_with_subfolders(tmp_path):
    for part in ("train", "test", "__MACOSX/train"):
        photo(tmp_path / part / "rose" / "day" / "a.jpg")
        photo(tmp_path / part / "tulip" / "a.jpg")
    split = load_split("folder", tmp_path)
    assert [item.key for item in split.test] == ["test/rose/day/a.jpg", "test/tulip/a.jpg"]


def test_answers_are_no_classes(flowers, tmp_path):
    for folder in ("none of these", "Leave out"):
        photo(flowers / folder / "new.jpg")
    found = load_labelled("folder", flowers)
    assert found.classnames == ["rose", "tulip"]
    assert [item.key for item in found.none] == ["none of these/new.jpg"]
    assert "Left out: the images in Leave out, as these names are reserved." in found.note
    for part in ("train", "test"):
        photo(tmp_path / "PARTS" / part / "none of these" / "day" / "a.jpg")
        for name in ("rose", "tulip"):
            photo(tmp_path / "PARTS" / part / name / "a.jpg")
    found = load_labelled("folder", tmp_path / "PARTS")
    assert [item.key for item in found.none] == ["train/none of these/day/a.jpg"]
    assert "Left out: the images in test/none of these, as" in found.note


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


def test_corrections_are_added_to_class_folders(flowers, monkeypatch):
    """Those of a sheet of other images; a link is its file, and the last class counts."""
    for i in range(4):
        photo(Path(f"UNSORTED/{i}.jpg"), 20 + i)
    (flowers / "rose" / "link.jpg").symlink_to(Path("UNSORTED/0.jpg").absolute())
    (flowers / "None of these").mkdir()
    shutil.copy("UNSORTED/1.jpg", flowers / "None of these" / "x.jpg")
    photo(flowers / "None of these" / "y.jpg", 30)
    answers = ("tulip", "rose", "daisy", "none of these")
    rows = "".join(f"UNSORTED/{i}.jpg,{name}\n" for i, name in enumerate(answers))
    answered = "MY_PHOTOS/rose/1.jpg,tulip\nMY_PHOTOS/rose/5.jpg,none of these\nMY_PHOTOS/None of these/x.jpg,rose\n"
    Path("1.csv").write_text(f"file,class\n{rows}{answered}")
    Path("2.csv").write_text("file,class\nUNSORTED/1.jpg,daisy\n")
    found = load_labelled("folder", flowers, ["1.csv", "2.csv"])
    labels = {item.key: found.classnames[item.label] for item in found.items}
    expected = {f"{name}/{i}.jpg": name for name in ("rose", "tulip") for i in range(6)}
    expected |= {"rose/link.jpg": "tulip", "rose/1.jpg": "tulip", "None of these/x.jpg": "rose"}
    del expected["rose/5.jpg"]
    assert labels == expected | {"../UNSORTED/1.jpg": "daisy", "../UNSORTED/2.jpg": "daisy"}
    assert [item.label for item in found.items] == sorted(item.label for item in found.items)
    added = {item.key for item in found.items if item.added}
    assert added == {"../UNSORTED/1.jpg", "../UNSORTED/2.jpg", "None of these/x.jpg"}
    assert [item.key for item in found.none] == ["None of these/y.jpg", "../UNSORTED/3.jpg", "rose/5.jpg"]
    for text in ("1.csv: 3 images added, 2 labelled again, 2 of none of these.", "2.csv: 0 images added, 1 labelled"):
        assert text in found.note
    Path("inside.csv").write_text("file,class\nrose/0.jpg,a\nrose/2.jpg,b\n")
    assert len(load_labelled("folder", flowers, "inside.csv").items) == 2, "in place of the class folders"
    shutil.move("1.csv", flowers)
    in_place = load_labelled("folder", flowers, [flowers / "1.csv", "2.csv"])
    assert (len(in_place.items), in_place.classnames) == (5, ["daisy", "rose", "tulip"])
    Path("outside.csv").write_text("file,class\nMY_PHOTOS/rose/0.jpg,a\n")
    Path("Downloads").mkdir()
    listed = "".join(f"MY_PHOTOS/rose/{i}.jpg,{name}\n" for i, name in enumerate("ab"))
    Path("Downloads/corrections.csv").write_text(f"file,class\n{listed}")
    monkeypatch.chdir("Downloads")  # the paths start with the folder's name
    items = load_labelled("folder", flowers, "corrections.csv").items
    assert [item.key for item in items] == ["rose/0.jpg", "rose/1.jpg"]
    monkeypatch.chdir("..")
    with pytest.raises(ZooError, match="UNSORTED has no class folders"):
        load_labelled("folder", "UNSORTED", "outside.csv")


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_labels_are_read_as_spreadsheets_save_them(flowers, encoding):
    """In Germany with semicolons, in an encoding of their choice; cells that are empty at the end may be missing."""
    text = 'file;class;note\r\nrose/0.jpg;"TV 32""";a\r\nrose/1.jpg;Märchen\r\ntulip/0.jpg;"a; b, c\nd";\r\n'
    Path("labels.csv").write_bytes(text.encode(encoding))
    with pytest.warns(UserWarning, match="Windows-1252") if encoding == "cp1252" else nullcontext():
        assert load_labelled("folder", flowers, "labels.csv").classnames == ["Märchen", 'TV 32"', "a; b, c\nd"]
