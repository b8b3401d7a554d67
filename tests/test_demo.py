"""What the demo computes and draws, without a browser."""

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
    read, messages = photos.read_uploads(paths, room=8)
    assert messages == []
    assert [photo.name for photo in read] == list(files)
    assert {photo.image.mode for photo in read} == {"RGB"}
    assert read[0].image.size == (30, 40)
    assert read[3].image.getpixel((0, 0))[0] > 200  # the first frame
    assert list(tmp_path.iterdir()) == []  # nothing is left on disk


def test_what_cannot_be_read_is_named_and_removed(tmp_path, monkeypatch):
    (tmp_path / "broken.jpg").write_text("not an image")
    noise = Image.effect_noise((200, 200), 50)
    save(tmp_path / "cut.png", noise)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:9000])
    (tmp_path / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    monkeypatch.setattr(photos, "MAX_PIXELS", 30_000)
    save(tmp_path / "huge.png", noise)
    read, messages = photos.read_uploads(sorted(map(str, tmp_path.iterdir())), room=8)
    assert read == []
    for message, expected in zip(
        messages,
        [r"broken.jpg: not an image .*JPEG", r"cut.png", r"huge.png: 200 x 200 pixels, and 30,000", r"script.eps"],
        strict=True,
    ):
        assert re.search(expected, message)
        assert str(tmp_path) not in message
    assert list(tmp_path.iterdir()) == []


def test_no_more_photos_than_there_is_room_for(tmp_path):
    read, messages = photos.read_uploads([save(tmp_path / f"{i}.png") for i in range(5)], room=3)
    assert len(read) == 3
    assert messages == ["2 more left out: there is room for 3 here. Remove some first."]
    assert list(tmp_path.iterdir()) == []


def test_large_photos_are_kept_small(tmp_path):
    (read,), _ = photos.read_uploads([save(tmp_path / "a.png", Image.new("RGB", (3000, 1000)))], room=1)
    assert read.image.size == (3 * photos.KEPT_SIDE, photos.KEPT_SIDE)


# ------------------------------------------------------------------------------------------------------- heads, answers


def test_a_lent_model_is_given_back_as_it_was():
    with heads.acquire(DEFAULT_HEAD) as model:
        own = list(model.classnames)
    with heads.acquire(DEFAULT_HEAD, ["cat", "dog"]) as model:
        assert model.classnames == ["cat", "dog"]
        model.context = "batch"
    with heads.acquire(DEFAULT_HEAD) as model:
        assert (model.classnames, model.context) == (own, "calibrated")
    with pytest.raises(ZooError, match="cannot be told apart"), heads.acquire(DEFAULT_HEAD, ["cat", "Cat"]):
        pass
    with heads.acquire(DEFAULT_HEAD) as model:  # the lock is free, the classes are the head's
        assert model.classnames == own


def test_planned_heads_are_listed_last_and_refused(monkeypatch):
    choices = heads.head_choices("dcp_vitb16")
    assert all("(planned)" in label for label, _ in choices)
    assert "(bundled)" in heads.head_choices("dcp_mini")[0][0]
    monkeypatch.setattr(heads, "create_model", lambda *_: pytest.fail("a planned head must not be looked for"))
    with pytest.raises(ZooError, match=r"planned.*dcp-zoo train --head dcp_vitb16"):
        heads.load("dcp_vitb16.imagenet-16shot")


def test_answers_are_those_of_the_command_line():
    from dcp_zoo.cli.predict import classify, sample_images

    model = create_model("dcp_mini", DEFAULT_HEAD.split(".")[1]).eval()
    for photo_answers, path in zip(answers.classify(model, SAMPLES), sample_images(), strict=True):
        best = answers.best(photo_answers)
        expected = classify(model, path, 5)
        assert [a.name for a in best] == [row["class"] for row in expected]
        assert [a.probability for a in best] == pytest.approx([row["probability"] for row in expected], abs=1e-4)


def test_zero_shot_is_plain_clip():
    model = create_model("dcp_mini", DEFAULT_HEAD.split(".")[1], classnames=["tower", "flower"]).eval()
    images = answers.to_batch(model, SAMPLES)
    text = model.clip.encode_text(model.tokenizer(["a photo of a tower.", "a photo of a flower."]), normalize=True)
    expected = model.clip.logit_scale.exp() * model.clip.encode_image(images, normalize=True) @ text.T
    logits = [[a.logit for a in row] for row in answers.zero_shot(model, SAMPLES)]
    torch.testing.assert_close(torch.tensor(logits), expected.detach())


def test_changes_pair_names_that_stay_and_names_that_were_replaced():
    def rows(**probabilities):
        return [Answer(name, 0.0, p) for name, p in probabilities.items()]

    pairs = answers.changes(rows(cat=0.5, dog=0.3, cow=0.2), rows(cat=0.1, wolf=0.4, cow=0.1, owl=0.4))
    names = [tuple(answer and answer.name for answer in pair) for pair in pairs]
    assert names == [("cat", "cat"), ("dog", "wolf"), (None, "owl"), ("cow", "cow")]
    pairs = answers.changes(rows(cat=0.7, dog=0.3), rows(sea=1.0))  # nothing says which of them became the sea
    assert [(a and a.name, b and b.name) for a, b in pairs] == [(None, "sea"), ("cat", None), ("dog", None)]


def test_company_moves_a_logit_in_the_batch_and_not_when_calibrated():
    model = create_model("dcp_mini", DEFAULT_HEAD.split(".")[1]).eval()
    noise = photos.Photo("noise", Image.fromarray(np.random.default_rng(0).integers(0, 255, (99, 99, 3), np.uint8)))
    with torch.inference_mode():
        images = answers.to_batch(model, [*SAMPLES, noise])
        expected = model(images)[1]
    names, rows = answers.companies(model, [*SAMPLES, noise], 1)
    assert [row.name for row in rows] == ["calibrated", "alone", "with china.jpg", "with noise", "with all"]
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
        pages.company(photo, [evil], [answers.Company("alone", [1.0], evil)], None),
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
    assert training.count_right(model, classes) == (4, 4)
    info = json.loads((tmp_path / "my_head" / "config.json").read_text())["dcp"]
    assert info["recipe"]["epochs"] == 10
    assert "metrics" not in info  # nothing was measured
    archive = training.zip_checkpoint(tmp_path / "my_head")
    assert {"my_head/config.json", "my_head/model.safetensors"} <= set(zipfile.ZipFile(archive).namelist())


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([("cat", coloured("red"))], "two classes or more"),
        ([("cat", coloured("red")), ("dog", [])], "'dog' has no photographs"),
        ([("cat", coloured("red")), (" ", coloured("blue"))], "Class 2 has photographs and no name"),
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
    sessions.of("c")  # the longest unused one goes
    assert closed == ["b"]
    sessions.close("a")
    assert closed == ["b", "a"]
    assert len(sessions) == 1


@pytest.fixture
def do(tmp_path):
    pytest.importorskip("gradio")
    from dcp_zoo.demo.handlers import Handlers

    return Handlers(DEFAULT_HEAD, str(tmp_path / "cache"))


VISITOR, OTHER = SimpleNamespace(session_hash="a"), SimpleNamespace(session_hash="b")


def test_uploads_replace_the_samples_and_stay_with_their_visitor(do, tmp_path):
    assert do.add_photos([save(tmp_path / "mine.png")], VISITOR) == ""
    assert "mine.png" in do.answers(VISITOR)
    assert "china.jpg" not in do.answers(VISITOR)
    assert "mine.png" not in do.answers(OTHER)
    many = [save(tmp_path / f"{i}.png") for i in range(MAX_PHOTOS)]
    assert "1 more left out" in do.add_photos(many, VISITOR)
    do.use_samples(VISITOR)
    assert "china.jpg" in do.answers(VISITOR)
    do.close(VISITOR)
    assert do.session(VISITOR).samples


def test_a_folder_gives_its_images(do, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert do.add_folder([str(tmp_path / "notes.txt"), save(tmp_path / "a.png")], VISITOR) == ""
    assert [photo.name for photo in do.session(VISITOR).photos] == ["a.png"]
    assert [path for path in tmp_path.iterdir() if path.is_file()] == []
    assert "No images in this folder" in do.add_folder([], VISITOR)


def test_class_names_change_and_come_back(do):
    assert do.set_names("temple, flower\nsea", VISITOR) == ""
    html = do.answers(VISITOR)
    assert "before and after" in html
    assert "temple" in html
    assert "before and after" not in do.answers(OTHER)
    assert "same as before" in do.set_names("temple,flower,sea", VISITOR)
    assert "cannot be told apart" in do.set_names("sea, Sea", VISITOR)
    do.reset_names(VISITOR)
    assert "before and after" not in do.answers(VISITOR)


def test_menus_and_drawings(do):
    model, head, about, names, looking, beside, token = do.controls(VISITOR)
    assert (model["value"], head["value"]) == ("dcp_mini", DEFAULT_HEAD)
    assert "bundled, 100 classes" in about
    assert names.count(",") == 99
    assert [name for name, _ in looking["choices"]] == [name for name, _ in beside["choices"]]
    for _, choice in token["choices"]:
        assert do.attention(0, choice, VISITOR).count("<img") == 6
    assert "batch: alone" in do.company(0, VISITOR)


def test_models_without_a_trained_head_are_explained(do):
    assert "planned" in do.choose_model("dcp_vitb16", VISITOR)
    assert "planned" in do.choose_head("dcp_vitb16.imagenet-16shot", VISITOR)
    assert do.session(VISITOR).head == DEFAULT_HEAD
    assert do.choose_model("dcp_mini", VISITOR) == ""


def test_a_trained_head_is_its_visitors_and_goes_with_the_page(do, tmp_path):
    names = ["red", "blue", "", None, None, None]
    assert "has no photographs" in next(do.train("dcp_mini", 10, VISITOR, *names))[0]
    for number, colour in enumerate(["red", "blue"]):
        do.add_shots(
            number, [save(tmp_path / f"{i}.png", Image.new("RGB", (50, 50), colour)) for i in range(2)], VISITOR
        )
        assert do.shots(number, VISITOR).count("<img") == 2
    *_, (said, curve, download) = do.train("dcp_mini", 10, VISITOR, *names)
    assert "4 of its 4" in said
    assert len(curve["value"]) == 10
    assert download["value"].endswith("my_head.zip")
    assert do.session(VISITOR).head == OWN_HEAD
    assert ("yours, trained here", OWN_HEAD) in do.controls(VISITOR)[1]["choices"]
    assert ("yours, trained here", OWN_HEAD) not in do.controls(OTHER)[1]["choices"]
    assert "red" in do.answers(VISITOR)
    do.close(VISITOR)
    assert list((tmp_path / "cache").iterdir()) == []
    do.clear_shots(0, VISITOR)
    assert do.shots(0, VISITOR).count("<img") == 0


def test_a_taken_port_and_a_wrong_head_are_explained():
    pytest.importorskip("gradio")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ZooError, match="choose another with --port"):
            launch(port=other.getsockname()[1])
    with pytest.raises(ZooError, match="has no head 'nothing-1shot'"):
        launch("dcp_mini.nothing-1shot", port=0)
