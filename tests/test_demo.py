"""What the demo computes and renders, without a browser."""

import json
import re
import socket
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dcp_zoo import create_model
from dcp_zoo.demo import DEFAULT_HEAD, answers, heads, launch, pages, photos, training
from dcp_zoo.demo.answers import Answer
from dcp_zoo.demo.session import MAX_PHOTOS, OWN_HEAD, Session, Sessions
from dcp_zoo.errors import ZooError

SAMPLES = photos.sample_photos()


def save(path, image=None, **options):
    (image or Image.new("RGB", (40, 30), "red")).save(path, **options)
    return str(path)


# -------------------------------------------------------------------------------------------------------------- photos


def test_every_kind_of_image_is_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    frames = [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue")]
    files = {
        "turned.jpg": {"exif": exif},
        "print.jpg": {"image": Image.new("CMYK", (40, 30))},
        "clear.png": {"image": Image.new("RGBA", (40, 30), (255, 0, 0, 0))},
        "moving.gif": {"image": frames[0], "save_all": True, "append_images": frames[1:]},
        "grey.tif": {"image": Image.new("L", (40, 30))},
    }
    paths = [save(tmp_path / name, **options) for name, options in files.items()]
    read, messages = photos.read_uploads(paths, limit=8)
    assert messages == []
    assert [photo.name for photo in read] == list(files)
    assert {photo.image.mode for photo in read} == {"RGB"}
    assert read[0].image.size == (30, 40)
    assert read[3].image.getpixel((0, 0))[0] > 200  # the first frame
    assert list(tmp_path.iterdir()) == []  # nothing is left on disk


def test_unreadable_files_are_named_and_removed(tmp_path, monkeypatch):
    (tmp_path / "broken.jpg").write_text("not an image")
    noise = Image.effect_noise((200, 200), 50)
    save(tmp_path / "cut.png", noise)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:9000])
    (tmp_path / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    monkeypatch.setattr(photos, "MAX_PIXELS", 30_000)
    save(tmp_path / "huge.png", noise)
    read, messages = photos.read_uploads(sorted(map(str, tmp_path.iterdir())), limit=8)
    assert read == []
    for message, expected in zip(
        messages,
        [r"broken.jpg: not an image .*JPEG", r"cut.png", r"huge.png: 200 x 200 pixels, .* 30,000", r"script.eps"],
        strict=True,
    ):
        assert re.search(expected, message)
        assert str(tmp_path) not in message
    assert list(tmp_path.iterdir()) == []


def test_photos_beyond_the_limit_are_skipped(tmp_path):
    read, messages = photos.read_uploads([save(tmp_path / f"{i}.png") for i in range(5)], limit=3)
    assert len(read) == 3
    assert messages == ["Skipped 2: only 3 more fit here. Remove some first."]
    assert list(tmp_path.iterdir()) == []


def test_large_photos_are_downscaled(tmp_path):
    (read,), _ = photos.read_uploads([save(tmp_path / "a.png", Image.new("RGB", (3000, 1000)))], limit=1)
    assert read.image.size == (3 * photos.KEPT_SIDE, photos.KEPT_SIDE)


# ------------------------------------------------------------------------------------------------------- heads, answers


def test_an_acquired_model_is_restored():
    with heads.acquire(DEFAULT_HEAD) as model:
        original = list(model.classnames)
    with heads.acquire(DEFAULT_HEAD, ["cat", "dog"]) as model:
        assert model.classnames == ["cat", "dog"]
        model.context = "batch"
    with heads.acquire(DEFAULT_HEAD) as model:
        assert (model.classnames, model.context) == (original, "calibrated")
    with pytest.raises(ZooError, match="cannot be told apart"), heads.acquire(DEFAULT_HEAD, ["cat", "Cat"]):
        pass
    with heads.acquire(DEFAULT_HEAD) as model:  # the lock is free, the classes are the head's
        assert model.classnames == original


def test_planned_heads_are_listed_last_and_rejected(monkeypatch):
    choices = heads.head_choices("dcp_vitb16")
    assert all("(planned)" in label for label, _ in choices)
    assert "(bundled)" in heads.head_choices("dcp_mini")[0][0]
    monkeypatch.setattr(heads, "create_model", lambda *_: pytest.fail("a planned head must not be loaded"))
    with pytest.raises(ZooError, match=r"planned.*dcp-zoo train --head dcp_vitb16"):
        heads.load("dcp_vitb16.imagenet-16shot")


def test_answers_are_those_of_the_command_line():
    from dcp_zoo.bulk.classifier import torch_classifier
    from dcp_zoo.bulk.rows import classify
    from dcp_zoo.data.find import find_images
    from dcp_zoo.data.samples import sample_images

    model = create_model("dcp_mini", DEFAULT_HEAD.split(".")[1]).eval()
    ((rows, _),) = classify(find_images(sample_images()[:2]), torch_classifier(model))
    for photo_answers, row in zip(answers.classify(model, SAMPLES), rows, strict=True):
        best, expected = answers.best(photo_answers), row["predictions"]
        assert [a.name for a in best] == [row["class"] for row in expected]
        assert [a.probability for a in best] == pytest.approx([row["probability"] for row in expected], abs=1e-4)


def test_zero_shot_is_plain_clip():
    model = create_model("dcp_mini", DEFAULT_HEAD.split(".")[1], classnames=["tower", "flower"]).eval()
    images = answers.to_batch(model, SAMPLES)
    text = model.clip.encode_text(model.tokenizer(["a photo of a tower.", "a photo of a flower."]), normalize=True)
    expected = model.clip.logit_scale.exp() * model.clip.encode_image(images, normalize=True) @ text.T
    logits = [[a.logit for a in row] for row in answers.zero_shot(model, SAMPLES)]
    torch.testing.assert_close(torch.tensor(logits), expected.detach())


def test_changes_pair_unchanged_and_replaced_names():
    def rows(**probabilities):
        return [Answer(name, 0.0, p) for name, p in probabilities.items()]

    pairs = answers.changes(rows(cat=0.5, dog=0.3, cow=0.2), rows(cat=0.1, wolf=0.4, cow=0.1, owl=0.4))
    names = [tuple(answer and answer.name for answer in pair) for pair in pairs]
    assert names == [("cat", "cat"), ("dog", "wolf"), (None, "owl"), ("cow", "cow")]
    pairs = answers.changes(rows(cat=0.7, dog=0.3), rows(sea=1.0))  # which of them became the sea is unknown
    assert [(a and a.name, b and b.name) for a, b in pairs] == [(None, "sea"), ("cat", None), ("dog", None)]


def test_the_batch_affects_a_logit_unless_calibrated():
    model = create_model("dcp_mini", DEFAULT_HEAD.split(".")[1]).eval()
    noise = photos.Photo("noise", Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)))
    with torch.inference_mode():
        images = answers.to_batch(model, [*SAMPLES, noise])
        expected = model(images)[1]
    names, rows = answers.batch_effects(model, [*SAMPLES, noise], 1)
    assert [row.name for row in rows] == ["calibrated", "alone", "with cat.jpg", "with noise", "with all"]
    assert rows[0].logits == pytest.approx([expected[model.classnames.index(n)].item() for n in names], abs=1e-3)
    assert rows[1].logits == sorted(rows[1].logits, reverse=True)
    assert max(abs(a - b) for a, b in zip(rows[1].logits, rows[3].logits, strict=True)) > 1e-3
    assert answers.calibrated_shift(model, SAMPLES, 1) < 1e-4


# --------------------------------------------------------------------------------------------------------------- pages


def test_names_are_escaped():
    evil = "<script>alert(1)</script>"
    photo = photos.Photo(evil, SAMPLES[0].image)
    row = [Answer(evil, 1.0, 0.5)]
    drawn = [
        pages.answers([photo], [row], [row], [[answers.Change(row[0], None)]]),
        pages.messages([evil]),
        pages.thumbnails([photo]),
        pages.batch_effect(photo, [evil], [answers.BatchEffect("alone", [1.0], evil)], None),
        pages.attention(photo, torch.full((2, 8), 1 / 8), evil, (2, 3), 1),
    ]
    for html in drawn:
        assert "<script" not in html
        assert "&lt;script&gt;" in html


def test_overlay_colours_the_strongest_patch():
    photo = photos.Photo("grey", Image.new("RGB", (100, 60), "grey"))
    picture = np.asarray(pages.overlay(photo, torch.tensor([[0.0, 0.0], [0.0, 0.3]])))
    assert np.ptp(picture[10, 10]) == 0  # still grey
    assert picture[-10, -10, 0] > picture[-10, -10, 2] + 100  # orange


# ------------------------------------------------------------------------------------------------------------- training


def coloured(colour, n=2):
    return [photos.Photo(f"{colour}{i}", Image.new("RGB", (50 + i, 50), colour)) for i in range(n)]


def test_a_head_is_trained_watched_and_zipped(tmp_path):
    classes = training.check_classes([("red", coloured("red")), ("", []), ("blue", coloured("blue"))])
    logs = list(training.fit_photos("dcp_mini", classes, 10, tmp_path / "my_head"))
    assert logs[-1].step.tolist() == list(range(1, 11))
    assert logs[-1].loss.iloc[-1] < logs[-1].loss.iloc[0]
    model = create_model(f"local-dir:{tmp_path / 'my_head'}", True).eval()
    assert model.classnames == ["red", "blue"]
    assert model.context == "calibrated"
    assert training.count_correct(model, classes) == (4, 4)
    info = json.loads((tmp_path / "my_head" / "config.json").read_text())["dcp"]
    assert info["recipe"]["epochs"] == 10
    assert "metrics" not in info  # nothing was measured
    archive = training.zip_checkpoint(tmp_path / "my_head")
    assert {"my_head/config.json", "my_head/model.safetensors"} <= set(zipfile.ZipFile(archive).namelist())


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([("cat", coloured("red"))], "at least two classes"),
        ([("cat", coloured("red")), ("dog", [])], "'dog' has no photographs"),
        ([("cat", coloured("red")), (" ", coloured("blue"))], "Class 2 has photographs but no name"),
        ([("cat", coloured("red")), ("Cat", coloured("blue"))], "cannot be told apart"),
    ],
)
def test_an_incomplete_form_is_explained(classes, message):
    with pytest.raises(ZooError, match=message):
        training.check_classes(classes)


# ------------------------------------------------------------------------------------------------- sessions, handlers


def test_sessions_are_apart_and_end(tmp_path):
    sessions = Sessions(lambda: Session(DEFAULT_HEAD, "dcp_mini"), capacity=2)
    first, second = sessions.of("a"), sessions.of("b")
    first.photos.append(SAMPLES[0])
    assert len(second.photos) == 2
    assert sessions.of("a") is first
    closed = []
    first.close, second.close = (lambda: closed.append("a")), (lambda: closed.append("b"))
    sessions.of("c")  # closes the least recently used one
    assert closed == ["b"]
    sessions.close("a")
    assert closed == ["b", "a"]
    assert len(sessions) == 1


@pytest.fixture
def handlers(tmp_path):
    pytest.importorskip("gradio")
    from dcp_zoo.demo.handlers import Handlers

    return Handlers(DEFAULT_HEAD, str(tmp_path / "cache"))


VISITOR, OTHER = SimpleNamespace(session_hash="a"), SimpleNamespace(session_hash="b")


def test_uploads_replace_the_samples_and_stay_with_their_visitor(handlers, tmp_path):
    assert handlers.add_photos([save(tmp_path / "mine.png")], VISITOR) == ""
    assert "mine.png" in handlers.answers(VISITOR)
    assert "cat.jpg" not in handlers.answers(VISITOR)
    assert "mine.png" not in handlers.answers(OTHER)
    many = [save(tmp_path / f"{i}.png") for i in range(MAX_PHOTOS)]
    assert "Skipped 1: only 7 more fit" in handlers.add_photos(many, VISITOR)
    handlers.use_samples(VISITOR)
    assert "cat.jpg" in handlers.answers(VISITOR)
    handlers.close(VISITOR)
    assert handlers.session(VISITOR).samples


def test_a_folder_gives_its_images(handlers, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert handlers.add_folder([str(tmp_path / "notes.txt"), save(tmp_path / "a.png")], VISITOR) == ""
    assert [photo.name for photo in handlers.session(VISITOR).photos] == ["a.png"]
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []
    assert "No images in this folder" in handlers.add_folder([], VISITOR)


def test_class_names_can_be_edited_and_reset(handlers):
    assert handlers.set_names("temple, flower\nsea", VISITOR) == ""
    html = handlers.answers(VISITOR)
    assert "before and after" in html
    assert "temple" in html
    assert "before and after" not in handlers.answers(OTHER)
    assert "same as before" in handlers.set_names("temple,flower,sea", VISITOR)
    assert "cannot be told apart" in handlers.set_names("sea, Sea", VISITOR)
    handlers.reset_names(VISITOR)
    assert "before and after" not in handlers.answers(VISITOR)


def test_menus_and_views(handlers):
    model, head, about, names, attention, batch, token = handlers.controls(VISITOR)
    assert (model["value"], head["value"]) == ("dcp_mini", DEFAULT_HEAD)
    assert "bundled, 100 classes" in about
    assert names.count(",") == 99
    assert [name for name, _ in attention["choices"]] == [name for name, _ in batch["choices"]]
    for _, choice in token["choices"]:
        assert handlers.attention(0, choice, VISITOR).count("<img") == 6
    assert "batch: alone" in handlers.batch_effect(0, VISITOR)


def test_models_without_a_trained_head_are_explained(handlers):
    assert "planned" in handlers.choose_model("dcp_vitb16", VISITOR)
    assert "planned" in handlers.choose_head("dcp_vitb16.imagenet-16shot", VISITOR)
    assert handlers.session(VISITOR).head == DEFAULT_HEAD
    assert handlers.choose_model("dcp_mini", VISITOR) == ""


def test_a_trained_head_belongs_to_its_visitor_and_is_removed_with_the_page(handlers, tmp_path):
    names = ["red", "blue", "", None, None, None]
    assert "has no photographs" in next(handlers.train("dcp_mini", 10, VISITOR, *names))[0]
    for number, colour in enumerate(["red", "blue"]):
        handlers.add_shots(
            number, [save(tmp_path / f"{i}.png", Image.new("RGB", (50, 50), colour)) for i in range(2)], VISITOR
        )
        assert handlers.shots(number, VISITOR).count("<img") == 2
    *_, (message, curve, download) = handlers.train("dcp_mini", 10, VISITOR, *names)
    assert "4 of its 4" in message
    assert len(curve["value"]) == 10
    assert download["value"].endswith("my_head.zip")
    assert handlers.session(VISITOR).head == OWN_HEAD
    assert ("yours, trained here", OWN_HEAD) in handlers.controls(VISITOR)[1]["choices"]
    assert ("yours, trained here", OWN_HEAD) not in handlers.controls(OTHER)[1]["choices"]
    assert "red" in handlers.answers(VISITOR)
    handlers.close(VISITOR)
    assert list((tmp_path / "cache").iterdir()) == []
    handlers.clear_shots(0, VISITOR)
    assert handlers.shots(0, VISITOR).count("<img") == 0


def test_a_taken_port_and_a_wrong_head_are_explained():
    pytest.importorskip("gradio")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ZooError, match="choose another with --port"):
            launch(port=other.getsockname()[1])
    with pytest.raises(ZooError, match="has no head 'nothing-1shot'"):
        launch("dcp_mini.nothing-1shot", port=0)
