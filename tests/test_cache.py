"""What is kept of images from fit to fit, in memory and in folders."""

import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from helpers import in_distribution, stopped_in_image_tower
from PIL import Image
from sklearn.base import clone

import dcp_zoo
from dcp_zoo import FewShotClassifier
from dcp_zoo.data.packaged import everyday_pictures
from dcp_zoo.features import cache
from dcp_zoo.features.extract import VIEW_BATCH
from dcp_zoo.features.photos import image_key


def test_features_are_kept_from_fit_to_fit(folder, tmp_path, image_work):
    """By image: a changed file is read again. In a folder for other processes, as far as it is not
    damaged."""
    place = shutil.copytree(folder, tmp_path / "photos")
    paths, labels = dcp_zoo.list_labelled_images(place)
    features = FewShotClassifier(method="gda", memory=tmp_path / "kept")
    expected = features.fit(paths[1:], labels[1:]).predict_proba(paths)
    image_work.reset()
    again = clone(features).fit(paths[1:], labels[1:])
    assert np.array_equal(again.predict_proba(paths), expected)
    assert image_work.encoded == 0  # not even the image that was only predicted
    Image.open(paths[-1]).save(paths[0])
    os.utime(paths[0], (1, 1))
    for file in (tmp_path / "kept").rglob("*.safetensors"):
        file.write_bytes(b"damaged")
    assert not np.array_equal(clone(features).fit(paths[1:], labels[1:]).predict_proba(paths), expected)
    assert image_work.encoded > 0


def test_a_training_does_not_encode_the_everyday_pictures(image_work):
    """By which a head says what it accepts: the package has the miniature's features of them, as they are
    now. Here it is trained on some of them, which it accepts."""
    everyday = everyday_pictures()
    labels = ["a photo", "another"] * 12
    head = (
        FewShotClassifier(memory=False).fit(everyday[:24], labels, groups=range(24)).model_
    )  # parts of few photographs
    assert image_work.encoded == 2 * 24, "the images, and their mirror images"
    transform = dcp_zoo.create_transform(head)
    scores = in_distribution(head, torch.stack([transform(picture) for picture in everyday])).numpy()
    info = head.info["text_probe"]
    accepted = {rate: 100 * float((scores >= threshold).mean()) for rate, threshold in info["thresholds"].items()}
    assert len({*accepted.values()}) > 1
    one = 100 / len(scores)  # rounding may move an image over a threshold
    assert info["others_accepted"] == pytest.approx(accepted, abs=1.01 * one)


def test_the_cache_gives_what_was_put_there_or_nothing(tmp_path):
    """Damaged files are passed over; the oldest go when a folder is opened, or memory is full."""
    values = {str(i): torch.full((2, 1000), float(i)) for i in range(5)}
    kept = cache.FeatureCache(tmp_path)
    for key, value in values.items():
        kept.put("tower", {key: value})
    assert all(torch.equal(value, values[key]) for key, value in kept.get("tower", set(values)).items())
    assert not kept.get("other tower", set(values))
    for path, size in zip(sorted(tmp_path.rglob("*.safetensors")), (0, 100, -100), strict=False):
        path.write_bytes(path.read_bytes()[:size])
    assert len(kept.get("tower", set(values))) == 2
    in_memory = cache.FeatureCache(limit=10_000)
    in_memory.put("tower", values)
    assert in_memory.get("tower", set(values)).keys() == {"4"}
    assert not cache.FeatureCache(tmp_path, limit=1).get("tower", set(values))


def test_a_cache_that_cannot_be_written_is_gone_around(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    kept = cache.FeatureCache(tmp_path / "file")
    with pytest.warns(UserWarning, match="not cached for the next run. Cannot write to .* Choose another DCP_ZOO"):
        kept.put("tower", {"1": torch.ones(1, 3)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept.put("tower", {"1": torch.ones(1, 3)})
        assert kept.get("tower", {"1"}) == {}


def test_features_are_kept_by_what_an_image_shows(tmp_path):
    """Not by how it is stored: a palette gives the same indices other colours, EXIF turns an image."""

    def in_palette(color):
        image = Image.new("P", (8, 6))
        image.putpalette(color)
        return image

    red, blue = in_palette((255, 0, 0)), in_palette((0, 0, 255))
    assert image_key(red) != image_key(blue)
    assert image_key(red) == image_key(red.convert("RGB"))
    turned, upright = red.convert("RGB"), red.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    turned.getexif()[0x112] = 6  # by a quarter
    turned.save(tmp_path / "1.png", exif=turned.getexif())
    assert image_key(Image.open(tmp_path / "1.png")) == image_key(upright)


def test_features_are_kept_as_they_come(small_model, tmp_path, image_work):
    """A fit that was stopped computes only the others; what it has computed serves the answers, too."""
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(VIEW_BATCH + 6)]
    labels = [i % 2 for i in range(len(images))]
    options = {"method": "linear-probe", "classnames": ["dark", "light"]}
    whole = FewShotClassifier(small_model, **options).fit(images, labels).predict_proba(images)
    few = FewShotClassifier(small_model, memory=tmp_path, **options)
    with pytest.raises(KeyboardInterrupt), stopped_in_image_tower(after=2 * VIEW_BATCH):  # with mirror images
        few.fit(images, labels)
    image_work.reset()
    few.fit(images, labels)
    assert image_work.encoded == 2 * 6, "those of the first batch were kept"
    image_work.reset()
    assert np.allclose(few.predict_proba(images), whole, atol=1e-3)  # in other batches, features round otherwise
    assert image_work.encoded == 0
