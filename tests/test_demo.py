"""What the demo computes and renders, without a browser."""

import re
import socket
from collections.abc import Hashable
from types import SimpleNamespace

import pytest
import torch
from helpers import classify
from PIL import Image

from dcp_zoo import create_model

pytest.importorskip("gradio", reason="the demo needs dcp_zoo[demo]")

from gradio_client.utils import is_valid_file

from dcp_zoo.data.packaged import SAMPLE_CLASSES
from dcp_zoo.data.paths import IMAGE_SUFFIXES
from dcp_zoo.demo import DEFAULT_HEAD, VisitorLimits, launch, pages, shared
from dcp_zoo.demo import train_room as training
from dcp_zoo.demo.classify_room import draw_answers
from dcp_zoo.demo.session import OTHER_HEAD, OWN_HEAD, Session, Sessions
from dcp_zoo.errors import ZooError
from dcp_zoo.model.linear_head import LinearHead
from dcp_zoo.zoo.factory import plain_clip
from dcp_zoo.zoo.registry import list_models

pytestmark = pytest.mark.usefixtures("quick_probe")

SAMPLES = shared.sample_photos()[:2]


def save(path, image=None, **options):
    path.parent.mkdir(exist_ok=True)
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
    read, messages = shared.read_uploads(paths, limit=8)
    assert messages == []
    assert [photo.name for photo in read] == list(files)
    assert {photo.image.mode for photo in read} == {"RGB"}
    assert read[0].image.size == (30, 40)
    assert read[3].image.getpixel((0, 0))[0] > 200  # the first frame
    assert not tmp_path.exists()  # nothing is left on disk, nor the folder of an upload


def test_the_drop_zone_takes_what_the_command_line_reads():
    """A phone's HEIC, too, whose type not every system knows."""
    types = pages.drop_zone(render=False).file_types
    assert all(is_valid_file(f"photo{suffix.upper()}", types) for suffix in IMAGE_SUFFIXES)


def test_unreadable_files_are_named_and_removed(tmp_path, monkeypatch):
    (tmp_path / "broken.jpg").write_text("not an image")
    noise = Image.effect_noise((200, 200), 50)
    save(tmp_path / "cut.png", noise)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:9000])
    (tmp_path / "script.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    monkeypatch.setattr(shared, "MAX_PHOTO", 30_000)
    save(tmp_path / "huge.png", noise)
    read, messages = shared.read_uploads(sorted(map(str, tmp_path.iterdir())), limit=8)
    assert read == []
    for message, expected in zip(
        messages,
        [
            r"broken.jpg: not in a supported format .*JPEG",
            r"cut.png",
            r"huge.png: 200 x 200 pixels, .* 30,000",
            r"script.eps",
        ],
        strict=True,
    ):
        assert re.search(expected, message)
        assert str(tmp_path) not in message
    assert not tmp_path.exists()


def test_photos_beyond_the_limit_are_skipped(tmp_path):
    read, messages = shared.read_uploads([save(tmp_path / f"{i}.png") for i in range(5)], limit=3)
    assert len(read) == 3
    assert messages == ["Skipped 2: only 3 more fit here. Remove some first."]
    _, messages = shared.read_uploads([save(tmp_path / "a.png")], limit=0)
    assert messages == ["Skipped 1: no more fit here. Remove some first."]
    assert not tmp_path.exists()


def test_large_photos_are_downscaled_and_what_is_kept_is_bounded(tmp_path, monkeypatch):
    def upload(*size):
        return [save(tmp_path / "a.png", Image.new("RGB", size))]

    (read,), _ = shared.read_uploads(upload(3000, 1000), limit=1)
    assert read.image.size == (3 * shared.KEPT_SIDE, shared.KEPT_SIDE)
    (read,), _ = shared.read_uploads(upload(700, 70_000), limit=1)
    assert read.bytes <= 4.1 * shared.KEPT_PIXELS
    monkeypatch.setattr("dcp_zoo.demo.session.VISITOR_BYTES", 20_000)
    session = Session("dcp_mini.caltech101-1shot")
    assert session.add_photos(upload(60, 50)) == session.add_shots(0, upload(60, 50)) == []
    session.photos *= 2
    assert session.add_shots(0, upload(60, 50)) == ["Skipped 1: no more fit here. Remove some first."]
    monkeypatch.setattr("dcp_zoo.demo.session.ALL_BYTES", 30_000)
    sessions = Sessions(lambda: Session("dcp_mini.caltech101-1shot"))
    visitors = [SimpleNamespace(session_hash=name) for name in "abc"]
    for visitor, size in zip(visitors, (50, 80, 20), strict=True):
        sessions.of(visitor).add_photos(upload(size, size))
    assert [len(sessions.of(visitor).photos) for visitor in visitors] == [1, 0, 1]  # the largest was closed


# ------------------------------------------------------------------------------------------------------- heads, answers


def test_an_acquired_model_is_restored():
    with shared.acquire(DEFAULT_HEAD) as model:
        original = list(model.classnames)
        expected = shared.head_answers(model, SAMPLES)
    with shared.acquire(DEFAULT_HEAD, ["cat", "dog"]) as model:
        assert model.classnames == ["cat", "dog"]
        assert [len(row) for row in shared.head_answers(model, SAMPLES)] == [2, 2]
        model.stats = "batch"
    with shared.acquire(DEFAULT_HEAD) as model:
        assert (model.classnames, model.stats) == (original, "stored")
        assert shared.head_answers(model, SAMPLES) == expected
    with pytest.raises(ZooError, match="cannot be told apart"), shared.acquire(DEFAULT_HEAD, ["cat", "Cat"]):
        pass
    with shared.acquire(DEFAULT_HEAD) as model:  # the lock is free, the classes are the head's
        assert model.classnames == original


def test_a_head_that_forgets_classes_is_restored(tmp_path):
    """A `LinearHead` that knows no names keeps its rows when a visitor asks for some of its classes."""
    weight = torch.randn(3, 512)
    head = LinearHead(plain_clip("dcp_mini"), ["ant", "bee", "cow"], weight, torch.zeros(3))
    with shared.acquire(head, ["bee"]) as model:
        assert model.num_classes == 1
    with shared.acquire(head) as model:
        assert model.classnames == ["ant", "bee", "cow"]
        assert torch.equal(model.weight, weight)


def test_samples_are_named_right_and_rejected_by_a_head_for_other_things():
    session = Session(DEFAULT_HEAD)
    with shared.acquire(session.source, session.names) as model:
        for rows in (shared.head_answers(model, session.photos), shared.clip_answers(model, session.photos)):
            named = [next(iter(row)) for row in rows]
            assert named == [photo.truth for photo in session.photos] == SAMPLE_CLASSES[:6]
    session.reject_samples()
    assert (session.head, session.reject, len(session.photos)) == (OTHER_HEAD, True, 6)
    assert draw_answers(session).count("<h3>none of these") == 6
    session.use_samples()
    assert (session.head, session.reject) == (DEFAULT_HEAD, False)


def test_answers_are_those_of_the_command_line():
    from dcp_zoo.data.find import find_images
    from dcp_zoo.data.packaged import sample_images
    from dcp_zoo.prediction.heads import torch_predictor

    model = create_model("dcp_mini", DEFAULT_HEAD.split(".")[1]).eval()
    ((rows, _),) = classify(find_images(sample_images()[:2]), torch_predictor(model))
    for photo_answers, row in zip(shared.head_answers(model, SAMPLES), rows, strict=True):
        best, expected = list(photo_answers)[:5], row["predictions"]
        assert best == [row["class"] for row in expected]
        assert [photo_answers[name] for name in best] == pytest.approx(
            [row["probability"] for row in expected], abs=1e-4
        )


def test_zero_shot_is_plain_clip():
    model = create_model("dcp_mini", DEFAULT_HEAD.split(".")[1], classnames=["tower", "flower"]).eval()
    images = shared.to_batch(model, SAMPLES)
    text = model.encoder.clip.encode_text(
        model.encoder.tokenizer(["a photo of a tower.", "a photo of a flower."]), normalize=True
    )
    expected = model.encoder.clip.logit_scale.exp() * model.encoder.clip.encode_image(images, normalize=True) @ text.T
    found = [[row["tower"], row["flower"]] for row in shared.clip_answers(model, SAMPLES)]
    torch.testing.assert_close(torch.tensor(found), expected.detach().softmax(-1), atol=1e-5, rtol=0)


# --------------------------------------------------------------------------------------------------------------- pages


def test_names_are_escaped():
    evil = "<script>alert(1)</script>"
    photo = shared.Photo(evil, SAMPLES[0].image)
    row = {evil: 0.5}
    drawn = [
        pages.answers([photo], [row], [row], None, evil),
        pages.messages([evil]),
        pages.render("thumbnails", photos=[photo]),
    ]
    for html in drawn:
        assert "<script" not in html
        assert "&lt;script&gt;" in html


def test_answers_are_counted():
    shown = [shared.Photo("a.jpg", SAMPLES[0].image, "cat"), shared.Photo("b.jpg", SAMPLES[1].image, "dog")]
    rows = [{"cat": 0.7, "dog": 0.3}, {"cat": 0.6, "dog": 0.4}]
    html = pages.answers(shown, rows, rows, [False, True], "DCP")
    assert "DCP names 1 of 2 right</b>, CLIP without training 1." in html
    assert "none of these" in html
    uploads = [shared.Photo("a.jpg", SAMPLES[0].image)]
    assert "1 photograph, named by GDA." in pages.answers(uploads, rows[:1], None, None, "GDA")


# ------------------------------------------------------------------------------------------------------------- training


def coloured(colour, n=4):
    return [shared.Photo(f"{colour}{i}", Image.new("RGB", (50 + i, 50), colour)) for i in range(n)]


def test_a_trained_head_is_measured_and_saved(tmp_path):
    classes = training.named_classes([("red", coloured("red")), ("", []), ("blue", coloured("blue"))])
    result = training.train_on("dcp_mini", classes)
    assert result.images == 6
    assert {photo.truth for photo in result.test} == {"red", "blue"}
    assert {*result.before, *result.after} <= {"red", "blue"}
    result.classifier.save(tmp_path / "my_head")
    model = create_model(f"local-dir:{tmp_path / 'my_head'}", True)
    assert model.classnames == ["blue", "red"]
    assert model.info["test_images"] == 2
    assert model.info["metrics"] == {"top1_stored": result.accuracy(result.after).percent}


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
        training.named_classes(classes)


# ------------------------------------------------------------------------------------------------- sessions, handlers

VISITOR, OTHER = SimpleNamespace(session_hash="a"), SimpleNamespace(session_hash="b")


def test_sessions_are_apart_and_end():
    sessions = Sessions(lambda: Session(DEFAULT_HEAD), capacity=2)
    first, second = sessions.of(VISITOR), sessions.of(OTHER)
    first.photos.append(SAMPLES[0])
    assert len(second.photos) == 6
    assert sessions.of(VISITOR) is first
    closed = []
    first.close, second.close = (lambda: closed.append("a")), (lambda: closed.append("b"))
    sessions.of(SimpleNamespace(session_hash="c"))  # closes the least recently used one
    assert closed == ["b"]
    sessions.close(VISITOR)
    assert closed == ["b", "a"]
    assert sessions.of(VISITOR) is not first


@pytest.fixture
def rooms(tmp_path):
    """The handlers of both pages, with few photographs allowed."""
    import gradio

    from dcp_zoo.demo.classify_room import ClassifyRoom
    from dcp_zoo.demo.train_room import TrainRoom

    limits = VisitorLimits(max_photos=3, max_classes=3, max_shots=12)
    sessions = Sessions(lambda: Session(DEFAULT_HEAD, limits))
    with gradio.Blocks():
        return SimpleNamespace(
            classify=ClassifyRoom(sessions, limits, DEFAULT_HEAD),
            train=TrainRoom(sessions, limits, "dcp_mini", str(tmp_path / "cache")),
            sessions=sessions,
        )


@pytest.fixture
def room(rooms):
    return rooms.classify


def controls(room, visitor):
    """The updates of a room's controls by their names."""
    updates = room.update(visitor)
    return {name: updates[part] for name, part in vars(room).items() if isinstance(part, Hashable) and part in updates}


def test_uploads_replace_the_samples_and_stay_with_their_visitor(room, tmp_path):
    session = room.sessions.of(VISITOR)
    assert session.add_photos([save(tmp_path / "mine.png")]) == []
    assert "mine.png" in room.draw(VISITOR)
    assert "cat.jpg" not in room.draw(VISITOR)
    assert "cat.jpg" in room.draw(OTHER)
    assert "Skipped 1: only 2 more fit" in session.add_photos([save(tmp_path / f"{i}.png") for i in range(3)])[0]
    session.remove_photo(0)
    session.remove_photo(9)  # gone already
    assert [photo.name for photo in session.photos] == ["0.png", "1.png"]
    session.remove_all()
    assert "No photographs yet" in room.draw(VISITOR)
    session.use_samples()
    assert "DCP names 6 of 6 right" in room.draw(VISITOR)


def test_class_names_can_be_edited_and_reset(room):
    session = room.sessions.of(VISITOR)
    session.set_names("temple, yellow\nflower\n\n sea")
    assert session.names == ["temple, yellow", "flower", "sea"]
    assert "temple" in room.draw(VISITOR)
    with pytest.raises(ZooError, match="same as before"):
        session.set_names("temple, yellow\nflower\nsea")
    with pytest.raises(ZooError, match="cannot be told apart"):
        session.set_names("sea\nSea")
    with pytest.raises(ZooError, match="one name per line"):
        session.set_names("temple, flower, sea")
    session.reset_names()
    assert controls(room, VISITOR)["names"].count("\n") == 99


def test_menus(room):
    menus = controls(room, VISITOR)
    assert menus["head"]["value"] == DEFAULT_HEAD
    assert sorted(menus["head"]["choices"]) == sorted(list_models(pretrained=True))  # its own first
    assert menus["about"].startswith("100 classes of caltech101")
    assert menus["names"].startswith("cat\ncup of coffee")


def test_a_head_that_cannot_be_loaded_changes_nothing(room):
    from dcp_zoo.demo.pages import changing

    before = controls(room, VISITOR)
    assert "has no head" in changing(room.sessions, Session.choose_head)(VISITOR, "dcp_mini.nothing-16shot")
    assert controls(room, VISITOR) == before


def test_a_form_is_filled_photograph_by_photograph(rooms, tmp_path):
    session = rooms.sessions.of(VISITOR)
    assert session.add_shots(0, [save(tmp_path / "class" / f"{i}.png") for i in range(3)]) == []
    assert rooms.train.draw(VISITOR, 0)[0].count("<img") == 3
    session.remove_shot(0, 1)
    assert rooms.train.draw(VISITOR, 0)[0].count("<img") == 2
    assert "has photographs but no name" in rooms.train.train(VISITOR, "", None, "")[0]
    session.clear_shots(0)
    assert session.shots == {}


def test_the_example_is_trained_in_seconds_and_removed_with_the_page(rooms, tmp_path):
    names = rooms.train.example(VISITOR)[:3]
    message, html, download, _ = rooms.train.train(VISITOR, *names)
    assert message == ""
    assert "Of 9 held-out images, named right" in html
    before, after = map(int, re.findall(r'class="figure">(\d+)', html))
    assert after >= before + 30  # which is what the example is for
    assert html.count('class="right"') == round(9 * (before + after) / 100)  # each prediction is marked
    assert download["value"].endswith("my_head.zip")
    room, session = rooms.classify, rooms.sessions.of(VISITOR)
    menus = controls(room, VISITOR)
    assert menus["head"]["value"] == OWN_HEAD in menus["head"]["choices"]
    assert OWN_HEAD not in controls(room, OTHER)["head"]["choices"]
    assert re.search(r"Text probe names \d of 3 right", room.draw(VISITOR))  # the held-out photographs, three at most

    assert menus["reject"]["visible"]
    session.trained.text_probe.threshold.fill_(1000.0)  # accepts nothing
    assert "none of these" not in room.draw(VISITOR)
    session.reject = True
    assert "none of these" in room.draw(VISITOR)
    assert not controls(room, OTHER)["reject"]["visible"]
    session.set_names("\n".join(names[:2]))  # the threshold is not for these
    assert not controls(room, VISITOR)["reject"]["visible"]
    assert "none of these" not in room.draw(VISITOR)

    rooms.sessions.close(VISITOR)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_taken_port_and_wrong_arguments_are_explained():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ZooError, match="pass other --host or --port"):
            launch(port=other.getsockname()[1])
    with pytest.raises(ZooError, match="has no head 'nothing-1shot'"):
        launch("dcp_mini.nothing-1shot", port=0)
    with pytest.raises(ZooError, match="at least"):
        VisitorLimits(max_classes=1)
