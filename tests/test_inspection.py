"""Photographs inspected before training: wrong labels, duplicates, bad images."""

import csv
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import read_csv
from PIL import ExifTags, Image, ImageEnhance, ImageFilter, ImageOps
from torch.nn import functional as F

import dcp_zoo
from dcp_zoo import ZooError
from dcp_zoo.backbone.towers.open_clip import EMBEDDING, HIDDEN
from dcp_zoo.data import load_image, load_labelled
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.heads.config import read_config
from dcp_zoo.inspection.inspection import learning_curve, of_no_class, out_of_fold, suspected
from dcp_zoo.probe import ReadingFeatures, fit_on_features

NAME = '<b>cup & "saucer"'


def parts_of(image: Image.Image) -> list[Image.Image]:
    """The four quarters of a picture, which are not the same."""
    w, h = image.size
    places = ((0, 0), (w // 2, 0), (0, h // 2), (w // 2, h // 2))
    return [image.crop((x, y, x + w // 2, y + h // 2)) for x, y in places]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of four images; besides a wrong label, a mirrored copy, a blurred, a black and a broken
    one."""
    root = tmp_path_factory.mktemp("data") / "photos"
    photos = [load_image(sample_images()[i]) for i in (1, 0, 5)]
    for name, photo in zip((NAME, "cat", "flower"), photos, strict=True):
        (root / name).mkdir(parents=True)
        for i, part in enumerate(parts_of(photo)):
            part.save(root / name / f"{i}.jpg")
    photos[0].save(root / "cat" / "wrong.png")
    ImageOps.mirror(load_image(str(root / "cat" / "0.jpg"))).resize((150, 120)).save(root / "cat" / "twin.png")
    photos[2].filter(ImageFilter.GaussianBlur(30)).save(root / "flower" / "blurred.png")
    Image.new("RGB", (300, 100)).save(root / "flower" / "black <i>.png")
    (root / "flower" / "broken.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DCP_ZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def test_the_command_finds_what_is_wrong(folder, cache, tmp_path, run, monkeypatch, image_work):
    _, out, err = run("inspect", folder, "--output", tmp_path / "found")
    assert re.search(r"1 of 17 images cannot be read: \S+flower/broken.jpg \(not in a supported", " ".join(err.split()))
    rows = {row["file"]: row for row in read_csv(tmp_path / "found" / "inspection.csv")}
    assert len(rows) == 17
    wrong = rows["cat/wrong.png"]
    assert "label?" in wrong["problems"]
    assert wrong["looks_like"] == wrong["suggestion"] == NAME
    assert float(wrong["label_probability"]) < 0.05
    assert (rows["cat/0.jpg"]["same_as"], rows["cat/0.jpg"]["suggestion"]) == ("cat/twin.png", "")
    assert (rows["cat/twin.png"]["same_as"], rows["cat/twin.png"]["suggestion"]) == ("cat/0.jpg", "leave out")
    assert rows["flower/broken.jpg"]["problems"] == "cannot be read"
    page = (tmp_path / "found" / "inspection.html").read_text()
    assert "<b>cup" not in page
    assert "black <i>" not in page
    assert "cat/wrong.png" in page
    assert ("the text probe that" in page, "Gaussian" in page) == (True, False)
    with monkeypatch.context() as patch:  # before anything slow is imported
        patch.setitem(sys.modules, "dcp_zoo.inspection.inspection", None)
        assert "exists already" in run.refused("inspect", folder, "--output", tmp_path / "found")  # perhaps edited
    image_work.reset()
    assert run.ok("inspect", folder, "--output", tmp_path / "found", "--overwrite") == out
    assert image_work.encoded == 0, "what is known of the images is kept"


def test_changed_copies_are_the_same_picture(cache):
    """Smaller, mirrored and cropped ones; here in memory."""
    photos = [load_image(path) for path in sample_images()]
    copies = [photo.resize((photo.width // 3, photo.height // 4)) for photo in photos[:3]]
    copies += [ImageOps.mirror(p.crop((0, 0, p.width * 19 // 20, p.height * 19 // 20))) for p in photos[3:]]
    others = parts_of(photos[0])[:2]
    found = dcp_zoo.inspect([*photos, *copies, *others], ["a", "b"] * 7)
    same = {row.file: row.same_as for row in found.rows if row.same_as}
    expected = {f"image {i}": f"image {i + 6}" for i in range(6)}
    assert same == expected | {copy: photo for photo, copy in expected.items()}


def test_an_image_whose_class_has_a_copy_of_it_is_superfluous(cache):
    """It is not moved there, where it would be twice."""
    cup, cat, flower = (load_image(sample_images()[i]) for i in (1, 0, 5))
    classes = {"cup": [*parts_of(cup), ImageOps.mirror(cup)], "cat": [*parts_of(cat), cup], "flower": parts_of(flower)}
    images = [image for each in classes.values() for image in each]
    labels = [name for name, each in classes.items() for _ in each]
    wrong = dcp_zoo.inspect(images, labels).in_order[9]
    assert (wrong.label, wrong.looks_like, wrong.same_as) == ("cat", "cup", "image 4")
    assert (wrong.problems, wrong.suggestion) == ("label?;twice", "leave out")


def test_swapped_labels_and_images_of_no_class_are_found():
    shown = torch.arange(5).repeat(8)
    labels = shown.clone()
    shown[[5, 26]] = 5  # a sixth thing, which is no class
    labels[[0, 11]] = torch.tensor([3, 4])
    features = torch.eye(6, 16)[shown] + 0.1 * torch.randn(40, 16, generator=torch.Generator().manual_seed(0))
    says_nothing = torch.zeros(5, 16), torch.zeros(5)  # the text
    views = F.normalize(features, dim=1)[None]
    found = out_of_fold(ReadingFeatures(views, says_nothing), labels, torch.arange(40))
    assert {0, 11} <= {*suspected(found)} <= {0, 11, 5, 26}
    assert sorted(of_no_class(found)[:2]) == [5, 26]


def noise(per_class: int, seed: int) -> tuple[ReadingFeatures, torch.Tensor]:
    """Images of four classes that show nothing, as two parts of features, with texts that say nothing;
    labels."""
    labels, generator = torch.arange(4).repeat(per_class), torch.Generator().manual_seed(seed)
    features = F.normalize(torch.randn(1, len(labels), 2, 8, generator=generator), dim=-1).flatten(2)
    text = 5 * torch.randn(4, 8, generator=generator), torch.zeros(4)
    return ReadingFeatures(features, text, dict.fromkeys((EMBEDDING, HIDDEN), 8)), labels


def test_the_learning_curve_is_of_probes_that_know_nothing_of_what_they_are_tested_on():
    """Each is the probe that `train` fits to the images that were drawn, and to nothing else."""
    given, labels = noise(4, seed=0)
    curve = learning_curve(out_of_fold(given, labels, torch.arange(16)))
    assert [point.images for point in curve] == [1, 2]
    for point in curve:
        generator, right = torch.Generator().manual_seed(0), []
        for _ in range(5):
            order = torch.randperm(16, generator=generator)
            few = torch.cat([order[labels[order] == label][: point.images] for label in range(4)]).sort().values
            others = order[~torch.isin(order, few)]
            read = given._replace(features=given.features[:, few])
            probe, _ = fit_on_features([*"abcd"], labels[few], [read])
            x = given.features[0, others]
            answers = probe(F.linear(x[:, :8], *given.start), x / 2**0.5, probe.classes).argmax(1)
            right.append((answers == labels[others]).float().mean().item())
        assert point.accuracy == pytest.approx(100 * np.mean(right), abs=1e-3)


def test_what_cannot_be_inspected_says_why(tmp_path, cache, run):
    for name in "ab":
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "1.jpg").write_bytes(b"no image")
    with pytest.raises(ZooError, match="No image of a, b can be read"):
        dcp_zoo.inspect(tmp_path / "all")
    (tmp_path / "all" / "b" / "2.jpg").symlink_to(tmp_path / "gone" / "b" / "2.jpg")
    with pytest.raises(ZooError, match=r"b/2.jpg \(there is no such file\)"):
        dcp_zoo.inspect(tmp_path / "all")
    assert "Pass a folder" in run("inspect")[2]


def test_the_table_is_a_labels_file_with_the_changes_of_a_person(folder, cache, tmp_path, run):
    """Also of a folder with parts, and with examples of none of the classes; and no image is touched."""
    place = tmp_path / "photos"
    for part in ("train", "test"):
        shutil.copytree(folder, place / part)
    for path in (place / "test").glob("*/[1-3].jpg"):
        path.unlink()
    shutil.copytree(folder / "cat", place / "train" / "none of these")
    before = {path: path.read_bytes() for path in place.rglob("*.*")}
    run.ok("inspect", place, "--output", tmp_path / "found")
    said = {"train/cat/wrong.png": NAME, "test/cat/twin.png": "leave out"}
    rows = read_csv(table := tmp_path / "found" / "inspection.csv")
    for row in rows:
        row["class"] = "leave out" if row["problems"] == "cannot be read" else said.get(row["file"], row["class"])
    with table.open("w", newline="") as file:
        (writer := csv.DictWriter(file, [*rows[0]])).writeheader()
        writer.writerows(rows)
    found, old = load_labelled("folder", place, table), load_labelled("folder", place)
    for part in ("train", "test"):
        keys = {item.key: old.classnames[item.label] for item in getattr(old, part) if "broken" not in item.key}
        keys |= {"train/cat/wrong.png": NAME} if part == "train" else {}
        keys.pop("test/cat/twin.png", None)
        assert {item.key: found.classnames[item.label] for item in getattr(found, part)} == keys
    assert [item.key for item in found.no_class] == [item.key for item in old.no_class]
    assert {path: path.read_bytes() for path in place.rglob("*.*")} == before


def test_train_says_that_copies_in_the_test_make_the_accuracy_too_high(cache, tmp_path, run, monkeypatch, image_work):
    """And not how accurate the head is without them: there may be others. After `inspect`, only
    the mirror images of the training are missing."""
    monkeypatch.chdir(tmp_path)
    for name, place in (("cat", 1), ("flower", 5)):
        parts = parts_of(load_image(sample_images()[place]))
        for part, own in (("train", parts[:3]), ("test", [ImageOps.mirror(parts[0]), parts[3]])):
            for i, image in enumerate(own):
                file = Path("photos") / part / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
    run.ok("inspect", "photos", "--output", "found")
    image_work.reset()
    code, _, err = run("train", "photos", "--output", "head")
    assert code == 0, err
    assert (image_work.decoded, image_work.encoded) == (6, 6), "inspect has kept the plain view"
    said = " ".join(err.split())
    assert "2 of 4 test images were taken together with training images or are copies of them, such as" in said
    assert "the accuracy is too high" in said
    assert read_config("head")["dcp"]["test_images"] == 4
    for file in Path("photos/test").glob("*/0.png"):
        file.unlink()
    assert "taken together" not in run("train", "photos", "--output", "other")[2]


def test_groups_are_near_copies_and_bursts_of_one_camera(tmp_path, cache):
    """A photograph turned, cropped, brighter and saved again; in a frame, and turned by 90 and 180 degrees,
    with three others; and two that look unlike, two seconds apart."""
    photo, other, third = (load_image(sample_images()[i]) for i in (1, 5, 3))
    w, h = photo.size
    turned = photo.rotate(3, Image.Resampling.BICUBIC).crop((w // 12, h // 12, w - w // 15, h - h // 15))
    exif = Image.Exif()
    exif[ExifTags.Base.Model] = "camera"
    for i, (image, second) in enumerate(((photo, 1), (ImageEnhance.Brightness(turned).enhance(1.15), 40), (other, 3))):
        exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = f"2026:01:02 10:00:{second:02}"
        image.save(tmp_path / f"{i}.jpg", quality=70, exif=exif)
    third.save(tmp_path / "3.jpg")
    paths, labels = [str(tmp_path / f"{i}.jpg") for i in range(4)], ["a", "a", "b", "b"]
    found = dcp_zoo.inspect(paths, labels)
    assert (found.together, found.across_classes, found.copies) == ([[0, 1, 2]], [[0, 1, 2]], [[0, 1]])
    assert "groups that were taken together: 1; of these across classes: 1" in found.summary
    given = dcp_zoo.inspect(paths, labels, groups=["x", "y", "x", "z"])
    assert given.together == [[0, 2]]
    assert (given.answers.untested, [item.path for item in given.answers.items]) == (["b"], paths[1:2])
    assert len(given.rows) == 4
    page = " ".join(given.page().split())
    assert "both without b)" in page
    assert "Of b there are no two images, or groups" in page
    turned = [photo.transpose(way) for way in (Image.Transpose.ROTATE_90, Image.Transpose.TRANSVERSE)]
    framed = [*turned, photo, ImageOps.expand(photo.rotate(180), 90, "navy"), other, third, *parts_of(other)[:2]]
    assert dcp_zoo.inspect(framed, ["a", "b"] * 4).copies == [[0, 1, 2, 3]]
    sky = Image.fromarray(np.tile(np.linspace(190, 230, 128, dtype=np.uint8), (128, 1))).convert("RGB")
    sky.paste(photo.resize((40, 40)), (20, 60))
    lighter = ImageEnhance.Brightness(sky).enhance(1.4)  # whose sky is white, as a frame is
    assert dcp_zoo.inspect([sky, lighter, other], ["a", "a", "b"]).copies == [[0, 1]]
    tiny = [photo.resize((24, 24)), photo.resize((24, 24)), other]
    assert dcp_zoo.inspect(tiny, ["a", "a", "b"]).together == []


def test_search_finds_by_text_and_by_photo(folder, cache, tmp_path, run, image_work):
    photo = folder / "cat" / "0.jpg"
    assert run.ok("search", folder, photo).split("\n")[0] == f"1.000  {photo}"
    code, out, err = run("search", folder, "cat", "--count", 4, "--output", tmp_path / "cats")
    assert code == 0, err
    files = [line.split(maxsplit=1)[1] for line in out.splitlines()]
    assert {Path(file).parent.name for file in files} == {"cat"}
    assert "does not understand sentences" in err
    assert [row["path"] for row in read_csv(tmp_path / "cats" / "found.csv")] == files
    assert (tmp_path / "cats" / "found.html").read_text().count("<img") == 4
    assert {path.name for path in (tmp_path / "cats").iterdir()} == {"found.csv", "found.html"}
    image_work.reset()
    best = dcp_zoo.search(folder, like=folder / "cat" / "0.jpg", count=2)
    assert (image_work.decoded, image_work.encoded) == (0, 0)  # features are kept
    assert [Path(match.path).name for match in best] == ["0.jpg", "twin.png"]
    assert best[0].similarity == pytest.approx(1, abs=1e-3)


def test_what_cannot_be_searched_says_why(folder, cache, tmp_path, run):
    for options in ({}, {"text": "cat", "like": folder / "cat" / "0.jpg"}):
        with pytest.raises(ZooError, match="Say what to find"):
            dcp_zoo.search(folder, **options)
    with pytest.raises(ZooError, match="is among the images"):
        dcp_zoo.search(folder, "cat", output=folder / "cats")
    (table := tmp_path / "found.csv").write_text("file,class\ncat/0.jpg,\n")
    for args, message in (
        (("--to-label", "--labels", table), "found.csv lists 1 images, none with a class: fill in its column class"),
        (("cat", "--to-label"), "Pass what to find, or --to-label"),
        (("cat", "--labels", folder), "--to-label, which alone takes --head and --labels"),
        (("--to-label", "--labels", folder), "left to label: all have a label, or cannot be read"),
    ):
        assert message in run.refused("search", folder, *args)


def test_suggested_images_are_labelled_in_the_table_and_trained_on(folder, cache, tmp_path, run):
    first, second, head = tmp_path / "first", tmp_path / "second", "dcp_mini.caltech101-1shot"
    out = run.ok("search", folder, "--to-label", "--count", 3, "--output", first)
    found = out.splitlines()
    assert len({Path(file).parent for file in found}) == 3  # pictures of three things
    said = [[row["file"], Path(row["file"]).parent.name, row["guess"]] for row in read_csv(first / "found.csv")]
    with (labels := first / "found.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["file", "class", "guess"], *said])
    run.ok("search", folder, "--to-label", "--head", head, "--labels", labels, "--count", 99, "--output", second)
    rows = read_csv(second / "found.csv")
    files = {row["file"] for row in rows}
    assert not files & set(found)
    assert len(files) == 17 - len(found) - 1  # without the broken one
    assert all(0 < float(row["guess_probability"]) <= 1 and row["guess"] and not row["class"] for row in rows)
    page = (second / "found.html").read_text()
    assert NAME not in page
    assert page.count("<img") == len(rows)
    table = tmp_path / "corrections.csv"
    table.write_text("file,class\n" + "".join(f"{file},none of these\n" for file in sorted(files)[1:]))
    assert run.ok("search", folder, "--to-label", "--labels", table, "--labels", labels).strip() == min(files)
    with labels.open("a") as file:
        csv.writer(file).writerow([max(files), "none of these", ""])
    _, _, err = run("train", folder, "--labels", labels, "--test", 0, "--output", tmp_path / "head")
    assert "are not used" in err  # by a head of so few images
    of_head = dcp_zoo.suggest(folder, str(tmp_path / "head"), count=99)
    assert {row.file for row in of_head} == files - {max(files)}  # the head knows what it was trained on
