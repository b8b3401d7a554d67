"""Datasets: every loader on a tiny tree in the real layout, all rejections, and the check of a data root."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from trees import WNIDS, picture, rows, touch, variant_folders, write_folders, write_listed, write_tree

import dcp_zoo
from dcp_zoo.data import DATASETS, check, classnames, few_shot, load_image, load_labelled, load_split, training_split
from dcp_zoo.data.packaged import split_rows
from dcp_zoo.data.splits import PARTS, check_test_share, split_sha256
from dcp_zoo.errors import ZooError


def test_list_datasets_are_the_eleven(tmp_path):
    names = (
        "imagenet caltech101 oxford_pets stanford_cars oxford_flowers food101 fgvc_aircraft sun397 dtd eurosat ucf101"
    )
    assert " ".join(dcp_zoo.list_datasets()) == names
    for name, place, message in (
        ("caltech-101", "anywhere", "Nearest: caltech101"),
        ("folder", tmp_path / "no", r"no does not exist.*one folder per class"),
    ):
        with pytest.raises(ZooError, match=message):
            load_split(name, place)


@pytest.mark.parametrize("name", [name for name, spec in DATASETS.items() if spec.part_of])
def test_a_part_is_read_from_the_folder_of_the_whole(name, tmp_path):
    """Its images are the whole's, in the same parts and classes, and it says how many."""
    spec = DATASETS[name]
    whole = {(part, key, known) for part, rows in split_rows(spec.part_of).items() for key, _, known in rows}
    folder = tmp_path / DATASETS[spec.part_of].folder / DATASETS[spec.part_of].images
    for key in (key for part in split_rows(name).values() for key, *_ in part):
        touch(folder / key)
    split = load_split(name, tmp_path)
    own = {(part, item.key, split.classnames[item.label]) for part in PARTS for item in getattr(split, part)}
    assert own < whole
    assert f"{name} is a part of {spec.part_of}: " in spec.part_note
    assert split_sha256(name) == split.sha256 != split_sha256(spec.part_of)


def test_table_is_consistent():
    for name, spec in DATASETS.items():
        assert spec.template.format("cat").count("cat") == 1, name
        assert spec.source in spec.where, name
        assert not spec.names or len(classnames(name)) == spec.num_classes, name
    with pytest.raises(ZooError, match="define its classes: use load_split"):
        classnames("folder")


FOURTH = {"dtd": "sub/1_train_1.jpg", "fgvc_aircraft": "0000003.jpg", "imagenet": f"train/{WNIDS[1]}/b.JPEG"}


@pytest.mark.parametrize("name", FOURTH)
def test_a_tree_in_the_real_layout(tmp_path, name):
    write_tree(tmp_path, name)
    split = load_split(name, tmp_path)
    assert split.classnames == classnames(name)
    assert split.train[3].key == FOURTH[name]
    assert [item.label for item in split.test] == list(range(len(split.classnames)))
    assert (split.val == []) == (name == "imagenet")
    assert all(Path(item.path).is_absolute() and Path(item.path).is_file() for item in split.items)


def test_sha256_depends_only_on_contents(tmp_path):
    write_listed(tmp_path / "a", "eurosat")
    write_listed(tmp_path / "b", "eurosat").write_text(json.dumps(rows("eurosat"), indent=3))
    a, b = load_split("eurosat", tmp_path / "a"), load_split("eurosat", tmp_path / "b")
    assert a.sha256 == b.sha256
    hashes = {a.sha256, replace(a, train=a.train[::-1]).sha256, replace(a, val=[], test=a.val + a.test).sha256}
    hashes.add(replace(a, classnames=[*a.classnames[:9], "Lake"]).sha256)
    assert len(hashes) == 4


@pytest.mark.parametrize("name", ["imagenetv2", "imagenet_a"])
def test_imagenet_variants(tmp_path, name):
    write_tree(tmp_path, name)
    folders = variant_folders(name)
    images = tmp_path / DATASETS[name].folder / DATASETS[name].images
    touch(images / "README.txt")
    split = load_split(name, tmp_path)
    assert split.classnames == [classnames("imagenet")[label] for label in folders.values()]
    assert [item.key for item in split.test] == [f"{folder}/a.jpg" for folder in folders]
    assert [item.label for item in split.test] == list(range(len(folders)))
    assert (split.train, split.val) == ([], [])
    with pytest.raises(ZooError, match=r"no training image for .* more"):
        few_shot(split, 1, 1)


def test_pacs_trains_on_photos_and_tests_on_the_other_styles(tmp_path):
    source = DATASETS["pacs_photo"]
    for name in (source.name, *source.shifts):
        write_folders(tmp_path / "pacs" / DATASETS[name].images, classnames(name), ("b.jpg", "a.jpg", "c.jpg"))
    split = load_split("pacs_photo", tmp_path)
    assert (len(split.train), len(split.test)) == (14, 7)
    assert "split 50/20/30" in split.note
    for name in source.shifts:
        style = load_split(name, tmp_path)
        assert style.classnames == split.classnames
        assert [item.key for item in style.test] == [f"{c}/{f}.jpg" for c in split.classnames for f in "abc"]
        assert (style.train, style.val, style.note) == ([], [], "")


def test_folder_without_splits_is_split(tmp_path):
    write_folders(tmp_path, ["dog", "cat"], tuple(f"{i}.jpg" for i in range(10)))
    split = load_split("folder", tmp_path)
    assert split.classnames == ["cat", "dog"]
    for part, size in ((split.train, 5), (split.val, 2), (split.test, 3)):
        assert Counter(item.label for item in part) == {0: size, 1: size}
    assert len({item.path for item in split.items}) == 20
    assert "50/20/30" in split.note
    assert load_split("folder", tmp_path) == split

    write_folders(tmp_path, ["ant"], ("a.png", "b.PNG"))  # another class does not change these draws
    assert {item.key for item in split.train} < {item.key for item in load_split("folder", tmp_path).train}


def test_training_holds_out_test_images_only_and_as_many_as_asked(tmp_path):
    write_folders(tmp_path, ["dog", "cat"], tuple(f"{i}.jpg" for i in range(10)))
    split, images = load_split("folder", tmp_path), load_labelled("folder", tmp_path)
    usual = training_split(images)
    assert (usual.test, usual.val) == (split.test, [])
    assert sorted(usual.train) == sorted(split.train + split.val)
    assert "split 70/30 into training and test" in usual.note
    for share, count in ((0, 0), (0.2, 4), (0.95, 18)):
        other = training_split(images, share)
        assert (len(other.train), len(other.test)) == (20 - count, count)
        assert sorted(other.items) == sorted(split.items)
    assert "all images are for training" in training_split(images, 0).note
    with pytest.raises(ZooError, match="--test 1.5 must be a share"):
        check_test_share(images, 1.5)
    with pytest.raises(ZooError, match="--test 0.04 of these classes is less than one image each"):
        check_test_share(images, 0.04)
    write_folders(tmp_path / "few", ["dog", "cat"], tuple(f"{i}.jpg" for i in range(4)))
    assert len(training_split(load_labelled("folder", tmp_path / "few")).test) == 2  # of 4 images per class, one


def test_folder_rejects(tmp_path):
    for number, (files, message) in enumerate((
        (["a.jpg"], "has no class folders"),
        (["cat/a.jpg", "dog/notes.txt"], "class folder .*dog has no image"),
        (["cat/a.jpg"], "has one class only, 'cat'"),
        (["train/cat/a.jpg"], "There is no folder .*test"),
        (["train/cat/a.jpg", "test/dog/a.jpg"], "must have the same class folders as train/; they differ in: cat, dog"),
    )):  # fmt: skip
        for file in files:
            touch(tmp_path / str(number) / file)
        with pytest.raises(ZooError, match=message):
            load_split("folder", tmp_path / str(number))


def test_a_class_with_one_image_trains_but_cannot_test(tmp_path):
    for file in ("cat/a.jpg", "dog/a.jpg", "dog/b.jpg"):
        touch(tmp_path / file)
    images = load_labelled("folder", tmp_path)
    check_test_share(images, 0)
    assert len(training_split(images, 0).train) == 3
    check_test_share(images, 0.5)
    assert {item.label for item in training_split(images, 0.5).test} == {1}


def test_digits_come_from_memory():
    from sklearn.datasets import load_digits

    split = load_split("digits")
    assert split.classnames == classnames("digits")
    assert sorted(item.key for item in split.items) == sorted(map(str, range(1797)))
    digits = load_digits()
    item = split.test[40]
    assert item.label == digits.target[int(item.key)]
    pixels = np.asarray(load_image(item.path))
    np.testing.assert_allclose(pixels, np.repeat(digits.images[int(item.key)][..., None], 3, 2) * 255 / 16, atol=0.5)


def test_check_reports_every_dataset(tmp_path, monkeypatch):
    write_listed(tmp_path, "eurosat", make=picture)
    write_listed(tmp_path, "dtd", make=str)  # makes no file
    found = {row.name: row for row in check(tmp_path)}
    assert list(found) == [name for name, spec in DATASETS.items() if spec.folder and not spec.part_of]
    assert {name for name, row in found.items() if row.status != "missing"} == {"eurosat", "dtd"}
    assert "Get it from" in found["ucf101"].message
    assert found["dtd"].status == "broken"
    assert "188 images (the first:" in found["dtd"].message
    assert (found["eurosat"].status, found["eurosat"].counts) == ("broken", [20, 10, 10])
    assert "[20, 10, 10] train, val and test images instead of [13500, 5400, 8100]" in found["eurosat"].message

    monkeypatch.setitem(DATASETS, "eurosat", replace(DATASETS["eurosat"], counts=[20, 10, 10]))
    row = {row.name: row for row in check(tmp_path)}["eurosat"]
    assert (row.status, row.message) == ("ok", "")
