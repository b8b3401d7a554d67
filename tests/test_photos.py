"""A photographer's card: RAW and HEIC, sidecars, keywords, moving, and the way back."""

import os
import re
import shutil
import struct
import subprocess
from functools import cache
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from helpers import encoded, read_csv
from PIL import Image
from shared import BUNDLED

from dcp_zoo import DCP, ZooError, create_model
from dcp_zoo.data import load_image, load_labelled, paths
from dcp_zoo.data.find import find_images
from dcp_zoo.data.paths import companions
from dcp_zoo.deploy.bulk.journal import Journal, undo
from dcp_zoo.deploy.bulk.journal import _write as write
from dcp_zoo.deploy.bulk.sorted_folders import sort_into

LIGHTROOM = """<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="Adobe XMP Core 7.0">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:xmp="http://ns.adobe.com/xap/1.0/"
    xmlns:crs="http://ns.adobe.com/camera-raw-settings/1.0/" xmlns:lr="http://ns.adobe.com/lightroom/1.0/"
    xmlns:dc="http://purl.org/dc/elements/1.1/" xmp:Rating="4" crs:Exposure2012="+0.35">
   <dc:subject><rdf:Bag><rdf:li>Müritz</rdf:li><rdf:li>trip, 2024</rdf:li><rdf:li>007</rdf:li></rdf:Bag></dc:subject>
   <lr:hierarchicalSubject><rdf:Bag><rdf:li>places|Müritz</rdf:li></rdf:Bag></lr:hierarchicalSubject>
   <crs:Masks><rdf:Seq><rdf:li crs:What="Mask" crs:X="0.5"/></rdf:Seq></crs:Masks>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>"""
DARKTABLE = """<?xml version="1.0" encoding="UTF-8"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/" x:xmptk="XMP Core 4.4.0-Exiv2">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
  <rdf:Description rdf:about="" xmlns:exif="http://ns.adobe.com/exif/1.0/"
   xmlns:darktable="http://darktable.sf.net/" exif:DateTimeOriginal="2024:05:01 10:00:00.000" darktable:history_end="1">
   <darktable:history><rdf:Seq><rdf:li darktable:num="0" darktable:operation="colorin"
      darktable:params="gz48eJzjYhgFowABWAbaAaNgwAEAEDgABg==" darktable:multi_name=""/></rdf:Seq></darktable:history>
  </rdf:Description>
 </rdf:RDF>
</x:xmpmeta>"""


def dng(preview: bytes = b"", orientation: int = 1) -> bytes:
    """A RAW file: 400 x 300 levels of a sensor, and a preview."""
    sizes = {1: (1, "B"), 2: (1, "B"), 3: (2, "H"), 4: (4, "I"), 10: (8, "i")}

    def directory(start: int, tags: dict[int, tuple[int, list[int]]]) -> bytes:
        entries, data = b"", b""
        for tag, (kind, values) in sorted(tags.items()):
            size, code = sizes[kind]
            cell = struct.pack(f"<{len(values)}{code}", *values)
            count, more = len(cell) // size, start + 6 + 12 * len(tags) + len(data)
            if len(cell) > 4:
                cell, data = struct.pack("<I", more), data + cell + b"\0" * (len(cell) % 2)
            entries += struct.pack("<HHI", tag, kind, count) + cell.ljust(4, b"\0")
        return struct.pack("<H", len(tags)) + entries + b"\0" * 4 + data

    levels = bytes([90]) * (400 * 300)
    jpeg = 8 + len(levels)
    inner = jpeg + len(preview) + len(preview) % 2
    width, height = Image.open(BytesIO(preview)).size if preview else (0, 0)
    of_preview = {254: (4, [1]), 256: (4, [width]), 257: (4, [height]), 258: (3, [8] * 3), 259: (3, [7])}
    of_preview |= {262: (3, [6]), 273: (4, [jpeg]), 277: (3, [3]), 278: (4, [height]), 279: (4, [len(preview)])}
    second = directory(inner, of_preview) if preview else b""
    tags = {254: (4, [0]), 256: (4, [400]), 257: (4, [300]), 258: (3, [8]), 259: (3, [1]), 262: (3, [32803])}
    tags |= {271: (2, [*b"A\0"]), 272: (2, [*b"B\0"]), 273: (4, [8]), 274: (3, [orientation]), 277: (3, [1])}
    tags |= {278: (4, [300]), 279: (4, [len(levels)]), 33421: (3, [2, 2]), 33422: (1, [0, 1, 1, 2])}
    tags |= {50706: (1, [1, 4, 0, 0]), 50708: (2, [*b"C\0"]), 50721: (10, [1, 1, 0, 1, 0, 1, 0, 1] * 2 + [0, 1])}
    tags |= {330: (4, [inner])} if preview else {}
    first = inner + len(second)
    body = levels + preview + b"\0" * (len(preview) % 2) + second
    return b"II*\0" + struct.pack("<I", first) + body + directory(first, tags)


def picture(number: int, size: tuple[int, int] = (320, 240)) -> bytes:
    return encoded(Image.new("RGB", size, (10 * number, 90, 40)), "JPEG")


CARD = {
    "IMG_1.JPG": picture(1),
    "IMG_1.DNG": dng(picture(1)),
    "IMG_1.xmp": LIGHTROOM.encode(),
    "IMG_2.jpg": picture(2),
    "IMG_2.jpg.xmp": DARKTABLE.encode(),
    "IMG_2_01.jpg.xmp": DARKTABLE.encode(),
    "IMG_2.MOV": b"a live photo",
    "Müritz/Fähre 3.jpg": picture(3),
    "Müritz/IMG_1.JPG": picture(1),  # the same picture, and another one's name
    "Müritz/RAW_4.dng": dng(picture(4)),
    "IMG_5.jpg": picture(5),
    "bad.jpg": b"",
    "clip.mov": b"",
    "notes.txt": b"notes",
}


@cache
def head() -> DCP:
    return create_model(BUNDLED, True).eval()


@pytest.fixture
def card(tmp_path, monkeypatch) -> Path:
    """The working folder with `CARD`, and said.csv, by which a person names classes."""
    _, _, heif = (pytest.importorskip(module) for module in ("exiv2", "rawpy", "pillow_heif"))
    monkeypatch.chdir(tmp_path)
    loaded = head()
    monkeypatch.setattr("dcp_zoo.zoo.factory.create_model", lambda *args, **options: loaded)
    for name, content in CARD.items():
        (tmp_path / "CARD" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "CARD" / name).write_bytes(content)
    heif.from_pillow(Image.open("CARD/IMG_2.jpg")).save("CARD/phone.HEIC")
    said = {"IMG_1.JPG": "emu", "IMG_2.jpg": "crab", "Müritz/Fähre 3.jpg": "ant", "Müritz/IMG_1.JPG": "emu"}
    said |= {"Müritz/RAW_4.dng": "emu", "IMG_5.jpg": "none of these", "phone.HEIC": "crab"}
    Path("said.csv").write_text("file,class\n" + "".join(f"CARD/{name},{of}\n" for name, of in said.items()))
    return Path("CARD")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.*") if path.is_file()}


def predict(run, *args: object) -> str:
    """The messages of a run that ends with 1, as bad.jpg cannot be read."""
    code, _, err = run("predict", "CARD", "--head", BUNDLED, "--labels", "said.csv", *args)
    assert code == 1, err
    return err


def keywords(file: Path | str) -> dict[str, list[str]]:
    """As Exiv2 reads them, by property; the same by ExifTool where that is installed."""
    exiv2 = pytest.importorskip("exiv2")
    image = exiv2.ImageFactory.open(str(file))
    image.readMetadata()
    xmp = image.xmpData()
    parts = {"dc.subject": "XMP-dc:Subject", "lr.hierarchicalSubject": "XMP-lr:HierarchicalSubject"}
    parts |= {"digiKam.TagsList": "XMP-digiKam:TagsList"}
    found = {}
    for key, tag in parts.items():
        found[key] = [str(entry) for entry in xmp[f"Xmp.{key}"].getValue()] if f"Xmp.{key}" in xmp else []
        if shutil.which("exiftool"):
            shown = subprocess.run(["exiftool", "-sep", ";;", "-s3", f"-{tag}", file], capture_output=True, text=True)
            assert shown.stdout.strip("\n").split(";;") == (found[key] or [""])
    return found


MOVED = {
    *("emu/IMG_1.JPG", "emu/IMG_1.DNG", "emu/IMG_1.xmp", "emu/IMG_1-2.JPG", "emu/RAW_4.dng", "ant/Fähre 3.jpg"),
    *("crab/IMG_2.jpg", "crab/IMG_2.jpg.xmp", "crab/IMG_2_01.jpg.xmp", "crab/IMG_2.MOV", "crab/phone.HEIC"),
    "none of these/IMG_5.jpg",
}
NEW_SIDECARS = {"emu/IMG_1-2.JPG.xmp", "emu/RAW_4.xmp", "ant/Fähre 3.jpg.xmp", "crab/phone.HEIC.xmp"}


def test_keywords_in_the_images_themselves(card, run):
    before, pixels = tree(card), np.asarray(load_image("CARD/IMG_2.jpg"))
    for number in (9, 0):
        err = predict(run, "--xmp-embed", "--output", "p.csv", "--overwrite")
        assert f"Keywords were written into {number} files" in err
        assert "Files without" not in err
    for name in ("IMG_2.jpg", "IMG_2.jpg.xmp", "Müritz/Fähre 3.jpg"):
        assert keywords(card / name)["dc.subject"] == ["ant" if "Fähre" in name else "crab"]
    np.testing.assert_array_equal(np.asarray(load_image("CARD/IMG_2.jpg")), pixels)
    assert not Path("CARD/Müritz/Fähre 3.jpg.xmp").exists()
    run.ok("undo", "p.undo.jsonl")
    assert tree(card) == before


def test_keywords_of_people_stay(card, run):
    """What else is in a sidecar, what is in an image beside which a sidecar comes, and what was removed by hand."""
    exiv2 = pytest.importorskip("exiv2")

    def change(file: str, key: str, entries: list[str]) -> None:
        image = exiv2.ImageFactory.open(str(card / file))
        image.readMetadata()
        image.xmpData()[key] = exiv2.XmpArrayValue(entries, exiv2.TypeId.xmpBag)
        image.writeMetadata()

    change("Müritz/Fähre 3.jpg", "Xmp.dc.subject", ["holiday"])
    change("Müritz/IMG_1.JPG", "Xmp.lr.hierarchicalSubject", ["bird|emu"])  # of itself the same class
    Path("tree.json").write_text('{"animal": {"bird": ["emu"], "crab": null}}')
    repeat = ("--xmp", "--output", "p.csv", "--overwrite")
    predict(run, *repeat, "--hierarchy", "tree.json")
    assert keywords(card / "IMG_1.xmp") == {
        "dc.subject": ["Müritz", "trip, 2024", "007", "animal", "bird", "emu"],
        "lr.hierarchicalSubject": ["places|Müritz", "animal|bird|emu"],
        "digiKam.TagsList": ["places/Müritz", "animal/bird/emu"],
    }
    assert keywords(card / "Müritz/Fähre 3.jpg.xmp")["dc.subject"] == ["holiday", "ant"]
    assert not (card / "Müritz/IMG_1.JPG.xmp").exists()
    history = re.findall(r'darktable:\w+="[^"]*"', (card / "IMG_2.jpg.xmp").read_text())
    assert set(history) == set(re.findall(r'darktable:\w+="[^"]*"', DARKTABLE))
    kept = re.findall(r'crs:\w+="[^"]*"', (card / "IMG_1.xmp").read_text())
    assert kept == re.findall(r'crs:\w+="[^"]*"', LIGHTROOM)
    change("IMG_2.jpg.xmp", "Xmp.dc.subject", ["claw"])  # a person says no to it, in a program that changes all lists
    change("IMG_2.jpg.xmp", "Xmp.lr.hierarchicalSubject", ["claw"])
    change("IMG_2.jpg.xmp", "Xmp.digiKam.TagsList", ["claw"])
    predict(run, *repeat)
    assert set(map(tuple, keywords(card / "IMG_2.jpg.xmp").values())) == {("claw",)}
    assert keywords(card / "IMG_1.xmp")["digiKam.TagsList"] == ["places/Müritz", "emu"]
    Path("said.csv").write_text("file,class\nCARD/phone.HEIC,none of these\n")
    predict(run, *repeat)  # of the others the head is not certain
    assert keywords(card / "IMG_1.xmp")["dc.subject"] == ["Müritz", "trip, 2024", "007"]
    assert not (card / "phone.HEIC.xmp").exists()
    (card / "IMG_1.xmp").write_text("<x:xmp")
    err = predict(run, *repeat, "--error-rate", 0.49)
    assert "Files without the new keywords: 1. Cannot read the keywords of CARD/IMG_1.xmp" in err


def test_training_on_keywords(card, run):
    """Those of people, in images or sidecars, and not those of an earlier run."""
    predict(run, "--xmp", "--output", "p.csv")
    exiv2 = pytest.importorskip("exiv2")
    for file, keyword in {"IMG_5.jpg": "lake", "Müritz/Fähre 3.jpg": "boat"}.items():
        image = exiv2.ImageFactory.open(str(card / file))
        image.readMetadata()
        image.iptcData()["Iptc.Application2.Keywords"] = keyword
        image.writeMetadata()
    data = load_labelled("folder", card, "xmp:lake,Müritz")
    assert [(item.key, data.classnames[item.label]) for item in data.items] == [
        ("IMG_1.JPG", "Müritz"),
        ("IMG_5.jpg", "lake"),
    ]
    run.ok("inspect", card, "--labels", "xmp:lake,007", "--output", "inspection")
    err = run.refused("train", card, "--labels", "xmp")
    assert "Say which keywords are classes: --labels xmp:cat,dog. Those in " in err
    assert "CARD: 007 (1), Müritz (1), boat (1), lake (1), trip, 2024 (1)." in err
    assert "has the keyword 'lak'. Nearest: lake." in run.refused("train", card, "--labels", "xmp:lak,007")
    data = load_labelled("folder", card, 'xmp:lake,boat,007,"trip, 2024"')
    assert data.classnames == ["boat", "lake"]
    assert "Left out: 1 images with several" in data.note
    assert "Pass the folder of the photographs" in run.refused("train", "--labels", "xmp:lake,007")


def test_raw_files_are_read_by_their_preview(tmp_path, monkeypatch):
    pytest.importorskip("rawpy")
    monkeypatch.chdir(tmp_path)
    for orientation, size in ((1, (400, 300)), (6, (300, 400))):
        Path("a.DNG").write_bytes(dng(encoded(Image.new("RGB", (400, 300), "red"), "JPEG"), orientation))
        image = load_image("a.DNG")
        assert image.size == size
        assert image.getpixel((0, 0))[0] > 250
    Path("a.DNG").write_bytes(dng())
    assert load_image("a.DNG").size == (200, 150), "without a preview, it is developed"
    Path("a.DNG").write_bytes(dng()[:5000])
    with pytest.raises(ZooError, match="Cannot read the image a.DNG: "):
        load_image("a.DNG")


def test_a_raw_file_and_an_image_are_one_photo(tmp_path, monkeypatch):
    pytest.importorskip("rawpy")
    monkeypatch.chdir(tmp_path)
    for name in ("a/1.jpg", "a/1.CR2", "a/2.nef", "a/1.mov", "b/1.CR2"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")
    assert [image.name for image in find_images(["a", "b"])] == ["a/1.jpg", "a/2.nef", "b/1.CR2"]
    assert sorted(item.key for item in load_labelled("folder", ".").items) == ["a/1.jpg", "a/2.nef", "b/1.CR2"]


def test_without_rawpy_raw_files_are_ignored(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paths, "image_suffixes", lambda: paths.IMAGE_SUFFIXES)
    Path("1.jpg").write_bytes(picture(1))
    Path("2.cr2").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 .cr2. RAW files are read after pip install 'dcp_zoo\[photos\]'"):
        assert len(find_images(["."])) == 1


def test_what_belongs_to_an_image(tmp_path):
    for name in (
        "IMG_01.jpg IMG.jpg IMG.CR2 IMG.jpg.xmp IMG_01.jpg.xmp IMG_02.jpg.xmp a.b.jpg a.b.xmp a.b.txt .IMG.xmp".split()
    ):
        (tmp_path / name).touch()
    found = companions(tmp_path)
    assert found["IMG.jpg"] == ["IMG.CR2", "IMG.jpg.xmp", "IMG_02.jpg.xmp"], "the last is of darktable's duplicate"
    assert found["IMG_01.jpg"] == ["IMG_01.jpg.xmp"]
    assert found["a.b.jpg"] == ["a.b.xmp"], "and no text"


def test_copies_take_along_what_belongs_to_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in "ab":
        Path(folder).mkdir()
        Path(folder, "1.jpg").write_bytes(picture(ord(folder)))
        Path(folder, "1.xmp").write_text(folder)
    files = ["a/1.jpg", "b/1.jpg"]
    assert sort_into(files, ["x", "x"], Path("out"), names=files) == [Path("out/x/1.jpg"), Path("out/x/1-2.jpg")]
    Path("out/x/1-2.xmp").write_text("edited")
    sort_into(files, ["x", "y"], Path("out"), names=files)
    assert names(Path("out")) == {".copies.jsonl", "x/1.jpg", "x/1.xmp", "y/1.jpg", "y/1.xmp"}
    assert Path("out/y/1.xmp").read_text() == "edited"


def test_copies_get_keywords_of_their_own(card, run):
    before, place = tree(card), ("--sort-into", "out", "--xmp", "--overwrite")
    predict(run, *place)
    assert keywords("out/emu/IMG_1.xmp")["dc.subject"] == ["Müritz", "trip, 2024", "007", "emu"]
    Path("said.csv").write_text(Path("said.csv").read_text().replace("IMG_1.JPG,emu", "IMG_1.JPG,ant"))
    Path("out/crab/IMG_2.jpg").rename("out/ant/IMG_2.jpg")  # by hand
    predict(run, *place)
    assert keywords("out/ant/IMG_1.xmp")["dc.subject"] == ["Müritz", "trip, 2024", "007", "ant"]
    assert {"ant/IMG_1.JPG", "ant/IMG_1.DNG", "ant/IMG_1-2.JPG.xmp", "ant/IMG_2.jpg"} <= names(Path("out"))
    assert not {"emu/IMG_1.JPG", "emu/IMG_1.xmp", "crab/IMG_2.jpg"} & names(Path("out"))
    assert tree(card) == before


def test_a_move_that_was_stopped_is_taken_back(card, run, monkeypatch):
    before, rename, calls = tree(card), Path.rename, iter(range(100))
    move = ("CARD/IMG_2.jpg", "--sort-into", "SORTED", "--move")  # the first is also in CARD
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *files: 1 / 0 if next(calls) == 5 else rename(*files))
        with pytest.raises(ZeroDivisionError):
            predict(run, *move)
    again = run.refused("predict", "CARD", *move, "--head", BUNDLED, "--labels", "said.csv")
    assert "stopped while it moved these images: dcp-zoo undo SORTED/predictions.undo.jsonl, and then repeat" in again
    run.ok("undo", "SORTED/predictions.undo.jsonl")
    assert tree(card) == before
    predict(run, *move)
    assert names(Path("SORTED")) == MOVED | {"predictions.csv", "predictions.undo.jsonl"}


def test_keywords_after_a_kill_are_all_taken_back(card, run, monkeypatch):
    before, calls = tree(card), iter(range(100))
    with monkeypatch.context() as patch:
        patch.setattr("dcp_zoo.deploy.bulk.journal._write", lambda *file: 1 / 0 if next(calls) == 3 else write(*file))
        with pytest.raises(ZeroDivisionError):
            predict(run, "--xmp", "--output", "p.csv")
    with Path("p.undo.jsonl").open("a") as lines:
        lines.write('\n{"file": "/half')
    predict(run, "--xmp", "--output", "p.csv")
    assert keywords(card / "IMG_1.xmp")["digiKam.TagsList"] == ["places/Müritz", "emu"]
    run.ok("undo", "p.undo.jsonl")
    assert tree(card) == before


def test_undo_replaces_nothing(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    for name in "abcde":
        Path(name).write_text(name)
    journal = Journal(Path("t.undo.jsonl"))
    for name in "abc":
        journal.move(Path(name), Path("to", name))
    for name in "def":
        journal.write(Path(name), b"new " + name.encode())
    Path("a").write_text("another")
    Path("to/b").unlink()
    Path("d").write_text("edited since")
    code, _, err = run("undo", "t.undo.jsonl")
    assert code == 1
    assert "Taken back: 3 changes" in err
    for problem in ("a exists again: ", "to/b is not there any more", "d was changed since: it stays"):
        assert problem in err
    assert names(tmp_path) == {"t.undo.jsonl"}
    assert {name: Path(name).read_text() for name in ("a", "to/a", "c", "d", "e")} == {
        **{"a": "another", "to/a": "a", "c": "c", "d": "edited since", "e": "e"}
    }
    Path("a").unlink()
    Path("d").write_text("new d")
    Path("to/b").write_text("b")
    assert undo(Path("t.undo.jsonl")) == (3, [])
    assert {name: Path(name).read_text() for name in "abcde"} == {name: name for name in "abcde"}
    assert names(tmp_path) == set()
    for content in ("", "[1]\n", '{"x": 1}\n'):
        Path("other").write_text(content)
        if content:
            assert "other is not the undo file of a run" in run.refused("undo", "other")
    assert "missing is not the undo file" in run.refused("undo", "missing")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--move"], "--move works only with --sort-into FOLDER: add it."),
        (["--by-date", "--output", "x.csv"], "--by-date works only with --sort-into FOLDER: add it."),
        (["--only-new"], "--only-new needs a .csv to go by: pass --output FILE.csv or --sort-into FOLDER"),
        (["--xmp"], "--xmp and --xmp-embed need a table: pass --output FILE, or --sort-into FOLDER."),
        (["--xmp-embed", "--sort-into", "x"], "--xmp-embed changes the images, not copies: add --move"),
        (
            ["--xmp", "--output", "x.csv"],
            "is a link, or in an archive: only files themselves can be moved or get keywords.",
        ),
    ],
)
def test_options_that_do_not_fit(card, run, args, message):
    shutil.make_archive("a", "zip", "CARD")
    assert message in run.refused("predict", "a.zip", "--head", BUNDLED, *args)


def test_links_are_not_moved(card, run):
    Path("links").mkdir()
    Path("links/1.jpg").symlink_to(Path("CARD/IMG_1.JPG").absolute())
    err = run.refused("predict", "links", "--head", BUNDLED, "--sort-into", "x", "--move")
    assert "links/1.jpg is a link, or in an archive: only files themselves can be moved" in err


def test_only_what_the_table_lacks(card, run):
    """What is in it stays, also where a person moved the copy; what could not be read is tried again."""
    only_new = ("--sort-into", "SORTED", "--only-new")
    predict(run, *only_new)
    first = read_csv("SORTED/predictions.csv")
    Path("SORTED/ant/Fähre 3.jpg").rename("SORTED/emu/Fähre 3.jpg")
    shutil.copy(card / "IMG_5.jpg", card / "IMG_9.jpg")
    (card / "bad.jpg").write_bytes(picture(8))
    with Path("said.csv").open("a") as said:
        said.write("CARD/IMG_9.jpg,none of these\nCARD/bad.jpg,ant\n")
    out = run("predict", "CARD", "--head", BUNDLED, "--labels", "said.csv", *only_new)
    assert out[0] == 0
    assert "2 images, of which 2 labelled by --labels: SORTED/predictions.csv" in out[2]
    rows = read_csv("SORTED/predictions.csv")
    assert rows[:-2] == [row for row in first if not row["error"]]
    assert [(row["image"], row["class"]) for row in rows[-2:]] == [
        ("CARD/IMG_9.jpg", "none of these"),
        ("CARD/bad.jpg", "ant"),
    ]
    assert {"ant/bad.jpg", "emu/Fähre 3.jpg", "none of these/IMG_9.jpg"} <= names(Path("SORTED"))
    assert "ant/Fähre 3.jpg" not in names(Path("SORTED"))
    again = run("predict", "CARD", "--head", BUNDLED, *only_new)
    assert "0 images: SORTED/predictions.csv" in again[2]
    assert read_csv("SORTED/predictions.csv") == rows
    Path("p.csv").write_text("a,b\n1,2\n")
    err = run.refused("predict", "CARD", "--head", BUNDLED, "--output", "p.csv", "--only-new")
    assert "Cannot read p.csv ('error'): --only-new adds to a .csv that predict wrote." in err


def test_a_photograph_that_was_replaced_is_new(card, run):
    """Its row is another then; after the rest was moved, a name that is free again is not given twice."""
    sort = ("--sort-into", "SORTED", "--sheet", "SORTED/sheet.html")
    predict(run, *sort, "--only-new")
    for path in ("CARD/IMG_1.JPG", "CARD/IMG_5.jpg"):
        Path(path).write_bytes(picture(7))
    os.utime("CARD/IMG_1.JPG", (1_500_000_000, 1_500_000_000))  # before the table was written
    os.utime("CARD/IMG_5.jpg", (2_500_000_000, 2_500_000_000))
    err = predict(run, *sort, "--only-new", "--overwrite")
    assert "Changed since SORTED/predictions.csv, and classified again: 2 images." in " ".join(err.split())
    images = [row["image"] for row in read_csv("SORTED/predictions.csv")]
    assert sorted(images) == sorted({*images})
    assert Path("SORTED/emu/IMG_1-3.JPG").read_bytes() == picture(7)
    shutil.rmtree("SORTED")
    predict(run, *sort, "--move")
    Review(Path("SORTED/sheet.html")).say("SORTED/emu/IMG_1.JPG", "crab")
    for number, free in ((8, "emu/IMG_1-3.JPG"), (9, "emu/IMG_1-4.JPG")):
        (card / "IMG_1.JPG").write_bytes(picture(number))
        predict(run, *sort, "--move", "--only-new", "--overwrite")
        assert Path("SORTED", free).read_bytes() == picture(number)
    images = [row["image"] for row in read_csv("SORTED/predictions.csv") if not row["error"]]
    assert sorted(images) == sorted({*images})


# -------------------------------------------------------------------------------------------------------------- review
