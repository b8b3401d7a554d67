"""Images that cannot be read cost no answer for the others: each door names all of them, or leaves them
out."""

import io
import json
import pickle
import re
import warnings
from copy import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import photo
from PIL import Image
from sklearn.base import clone

import dcp_zoo
from dcp_zoo import FewShotClassifier, UnreadableImages, ZooError
from dcp_zoo.data import load_image


def cut(path: Path) -> bytes:
    """A file without its end, which few of its bytes tell."""
    return path.read_bytes()[:-100]


def broken_inside(path: Path) -> bytes:
    """A PNG that only those find who decode it."""
    content = bytearray(path.read_bytes())
    middle = content.index(b"IDAT") + 40
    content[middle : middle + 20] = bytes(20)
    return bytes(content)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[list[str], list[str]]:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("rose", "tulip"):
        for i in range(6):
            photo(folder / name / f"{i}.jpg", i)
    return dcp_zoo.list_labelled_images(folder)


@pytest.fixture
def bad(request, tmp_path: Path) -> list[str]:
    """Two images cut short, unless a test asks for other kinds."""
    places = [photo(tmp_path / "bad" / name) for name in ("a.png", "b.png")]
    for place, spoil in zip(places, getattr(request, "param", (cut, cut)), strict=True):
        place.write_bytes(spoil(place))
    return [str(place) for place in places]


@pytest.fixture(scope="module")
def trained(pictures) -> FewShotClassifier:
    return FewShotClassifier().fit(*pictures)


@pytest.fixture
def fitted(trained) -> FewShotClassifier:
    return copy(trained)  # with options of its own


@pytest.mark.parametrize("bad", [(cut, broken_inside)], indirect=True)
def test_all_unreadable_images_are_named_at_once(pictures, bad, fitted):
    """Whoever leaves these out is done. Those in memory are named by their position."""
    (paths, labels), head = pictures, fitted.model_
    broken = [bad[1], b"no image", None, np.full((9, 9), 300), Image.open(bad[0]), float("nan")]
    images, named = [*paths, *broken], [*labels, *["rose"] * 6]
    for call in (
        lambda: dcp_zoo.predict(head, images),
        lambda: dcp_zoo.evaluate(head, images, named),
        lambda: dcp_zoo.train("dcp_mini", images, named),
        lambda: FewShotClassifier().fit(images, named),
        lambda: fitted.predict(images),
        lambda: fitted.predict_proba(images),
        lambda: fitted.decision_function(images),
        lambda: fitted.transform(images),
        lambda: fitted.score(images, named),
    ):
        with pytest.raises(UnreadableImages, match=r'6 of 18 images cannot be read: .*errors="keep"') as failure:
            call()
        error = pickle.loads(pickle.dumps(failure.value))  # as it comes from another process
        assert sorted(error.reasons) == [bad[1], *(f"image {i}" for i in range(13, 18))]
        assert all(error.reasons.values())
    keep = fitted.set_params(errors="keep")
    with pytest.warns(UserWarning, match=r"6 of 18 images .*no image \(None or NaN\)"):
        assert [isinstance(label, str) for label in keep.predict(images)] == [*[True] * 12, *[False] * 6]


def test_a_file_is_opened_once_and_nothing_is_computed_behind_a_bad_one(pictures, bad, fitted, image_work):
    (paths, labels), head = pictures, fitted.model_
    for call, files in (
        (lambda: dcp_zoo.predict(head, paths), 12),
        (lambda: dcp_zoo.evaluate(head, paths, labels), 12),
        (lambda: fitted.predict(paths), 0),  # what is known of them since they were fitted
    ):
        image_work.reset()
        call()
        assert sum(image_work.opened.values()) == files
    image_work.reset()
    with pytest.raises(UnreadableImages, match=r"2 of 14 images .*a\.png.*b\.png"):
        dcp_zoo.predict(head, [*paths[:2], *bad, *paths[2:]], batch_size=2)
    assert image_work.encoded == 2  # the first batch


def test_the_others_are_answered_as_if_alone(pictures, bad, fitted):
    (paths, labels), head = pictures, fitted.model_
    images, good = [*paths[:3], bad[0], *paths[3:], bad[1]], [i for i in range(14) if i not in (3, 13)]
    keep, named = clone(fitted).set_params(errors="keep"), [*labels[:3], "rose", *labels[3:], "rose"]
    weights = np.arange(14.0)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        keep.fit(images, named)
        for door in (FewShotClassifier.predict_proba, FewShotClassifier.decision_function, FewShotClassifier.transform):
            values = door(keep, images)
            np.testing.assert_array_equal(values[good], door(fitted, paths))
            assert np.isnan(values[[3, 13]]).all()
        found, score = keep.predict(images), keep.score(images, named, weights)
        weighted = clone(keep).fit(images, named, weights)  # one has the weight 0
        evaluation = dcp_zoo.evaluate(head, images, named, errors="keep")
        info = dcp_zoo.train("dcp_mini", images, named, errors="keep").info
        rows = dcp_zoo.predict(head, images, errors="keep")
    assert sum(bool(re.match(r"2 of 1\d images .*a\.png", str(warning.message))) for warning in warned) == 10
    assert [rows[i] for i in good] == dcp_zoo.predict(head, paths)
    assert [[*rows[i].reasons] for i in (3, 13)] == [[path] for path in bad]
    assert info["class_images"] == {"rose": 6, "tulip": 6}
    assert found[good].tolist() == fitted.predict(paths).tolist()
    assert found[3] != found[3], "NaN"
    assert score == pytest.approx(fitted.score(paths, labels, weights[good]))
    alone = clone(fitted).fit(paths, labels, weights[good])
    np.testing.assert_array_equal(weighted.predict_proba(paths), alone.predict_proba(paths))
    assert torch.equal(evaluation.logits, dcp_zoo.evaluate(head, paths, labels).logits)
    assert [item.path for item in evaluation.items] == paths


def test_a_batch_without_a_readable_image_has_an_answer_and_such_a_class_is_refused(pictures, bad, fitted):
    keep = fitted.set_params(errors="keep")
    for together in (False, True):
        with pytest.warns(UserWarning, match="2 of 2 images cannot be read"):
            assert np.isnan(keep.predict_proba(bad, together=together)).all()
        with pytest.warns(UserWarning, match="2 of 2 images cannot be read"):
            rows = dcp_zoo.predict(keep.model_, bad, together=together, errors="keep")
        assert [type(row) for row in rows] == [UnreadableImages] * 2
    with pytest.warns(UserWarning, match="2 of 2"), pytest.raises(ZooError, match="None of these images can be read"):
        keep.score(bad, ["rose", "tulip"])
    with pytest.raises(ZooError, match=r"2 of 14 images cannot be read: .* lily has no other image"):
        dcp_zoo.train("dcp_mini", [*pictures[0], *bad], [*pictures[1], "lily", "lily"], errors="keep")


@pytest.mark.parametrize("bad", [(broken_inside, broken_inside)], indirect=True)
def test_train_leaves_out_what_cannot_be_read(run, flowers, bad):
    """As if the files were not there; without the option, it is named."""
    others = flowers / "none of these"
    others.mkdir()
    for i, path in enumerate(bad):
        Path(path).rename((flowers / "rose", others)[i] / Path(path).name)
    photo(others / "0.jpg")
    err = run.refused("train", "MY_PHOTOS")
    assert "2 of 15 images cannot be read: " in err
    assert "rose/a.png" in err
    assert "none of these/b.png" in err
    assert "leave them out: in train by --skip-unreadable" in err
    assert not Path("MY_PHOTOS_head").exists()
    code, _, err = run("train", "MY_PHOTOS", "--skip-unreadable")
    assert (code, err.count("2 of 15 images cannot be read: ")) == (0, 1), err
    info = json.loads(Path("MY_PHOTOS_head/config.json").read_text())["dcp"]
    assert info["class_images"] == {"rose": 6, "tulip": 6}


def test_load_image_takes_every_form(flowers):
    path = flowers / "rose" / "0.jpg"
    expected, content = np.asarray(load_image(str(path))), path.read_bytes()
    tensor = torch.from_numpy(expected.copy()).permute(2, 0, 1)
    for form in (
        *(path, content, io.BytesIO(content), Image.open(path), expected, expected / 255, tensor),
        *({"bytes": content, "path": "gone.jpg"}, {"bytes": None, "path": str(path)}, {"bytes": content, "path": None}),
    ):
        assert np.array_equal(np.asarray(load_image(form)), expected), type(form)
    with path.open("rb") as file:
        assert load_image(file).size == (expected.shape[1], expected.shape[0])
    Path("cut.jpg").write_bytes(content[: len(content) // 2])
    for form, message in (
        (Image.open("cut.jpg"), r"Cannot read the image .*cut\.jpg: image file is truncated"),
        ({"bytes": b"no image", "path": "a.jpg"}, r"Cannot read the image a\.jpg: not in a supported format"),
        (Path("a.jpg"), r"Cannot read the image a\.jpg: there is no such file"),
        (None, r"no image \(None or NaN\)"),
        (object(), "object is not an image: an image is a path"),
        (np.zeros(7), r"shape \(7,\) is not an image: an image is a path"),
        (np.full((4, 4), 200), "An array of int64 is not an image"),
        (torch.full((3, 4, 4), -1.5), "float32 is not an image, or not of these levels"),
    ):
        with pytest.raises(ZooError, match=message):
            load_image(form)
