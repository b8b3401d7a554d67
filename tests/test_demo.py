"""The demo's handlers and its door: what a visitor sees, and what requests that its page never sends are told."""

import http.client
import json
import re
import socket
from collections import namedtuple
from pathlib import Path
from uuid import uuid4

import pytest
from helpers import encoded, png_that_claims
from PIL import Image

gr = pytest.importorskip("gradio", reason="the demo needs dcp_zoo[demo]")

from dcp_zoo import create_model, predict  # noqa: E402
from dcp_zoo import demo as app  # noqa: E402
from dcp_zoo.data.packaged import sample_images  # noqa: E402
from dcp_zoo.demo import launch  # noqa: E402
from dcp_zoo.errors import ZooError  # noqa: E402
from dcp_zoo.zoo.registry import DEFAULT_HEAD  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick_probe")
OTHER_HEAD = "dcp_mini.pacs_photo-16shot"  # of whose classes the six photographs show none
SECRET = "nobody else may read this"


def photos(*paths):
    """A gallery's photographs."""
    return [(str(path), None) for path in paths]


def coloured(folder, colour, n=4):
    paths = [folder / f"{colour}{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.new("RGB", (50 + i, 50), colour).save(path)
    return photos(*paths)


# ------------------------------------------------------------------------------------------------------------- handlers


def test_captions_are_what_predict_says(tmp_path):
    model = create_model(DEFAULT_HEAD, pretrained=True).eval()
    best = predict(model, sample_images()[0])[0][0]
    path, caption = app.captions(model, photos(sample_images()[0]), False)[0]
    assert (path, caption.split(" %")[0]) == (sample_images()[0], f"wild cat {100 * best.probability:.0f}")
    other = create_model(OTHER_HEAD, pretrained=True).eval()
    assert {caption for _, caption in app.captions(other, photos(*sample_images()), True)} == {"none of these"}
    with pytest.raises(ZooError, match="remove some until 24 are left"):
        app.captions(model, photos(*sample_images() * 5), False)
    for name, content, message in (  # named without its folder
        ("broken.jpg", b"not an image", "broken.jpg: not in a supported format"),
        ("bomb.png", png_that_claims(40_000), "bomb.png: 40000 x 40000 pixels, more than the limit of 50,000,000"),
    ):
        (tmp_path / name).write_bytes(content)
        ((_, caption),) = app.captions(other, photos(tmp_path / name), False)
        assert (message in caption, str(tmp_path) in caption) == (True, False)


def test_a_head_is_trained_measured_and_saved(tmp_path):
    classes = app.named_classes(["red", "", "blue"], [coloured(tmp_path, "red"), None, coloured(tmp_path, "blue")])
    told, own, download = app.train_on("dcp_mini", classes)
    assert "Trained on 6 photographs" in told
    assert re.search(r"CLIP without training: .* \(\d of 2;", told)
    assert "your head: 100.0 % (2 of 2;" in told
    assert download["value"] == f"{own.files.name}/my_head.zip"
    saved = create_model(f"local-dir:{own.files.name}/my_head", True)
    assert saved.classnames == own.head.classnames == ["blue", "red"]
    assert app.captions(own.head, coloured(tmp_path, "red", 1), False)[0][1].startswith("red ")
    for names, counts, message in (
        (["cat", ""], [1, 0], "at least two classes"),
        (["cat", None], [1, 1], "Class 2 has photographs but no name"),
        (["cat", "dog"], [1, 31], "31 photographs of 'dog' are too many: remove some until 30 are left"),
    ):
        with pytest.raises(ZooError, match=message):
            app.named_classes(names, [photos("a.png") * count for count in counts])


def test_a_taken_port_is_explained():
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ZooError, match="pass other --host or --port"):
        launch(port=other.getsockname()[1])


# ----------------------------------------------------------------------------------------------------------- the door


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("gradio")


@pytest.fixture(scope="module")
def place(cache):
    """Host and port of a running demo, which keeps its files in `cache`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(cache))
        patch.setattr(gr.Blocks, "block_thread", lambda page: pages.append(page))
        pages = []
        launch(OTHER_HEAD, port=0)
        yield pages[0].local_url.split("/")[2]
        pages[0].close(verbose=False)


def ask(place, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(place, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


def call(place, function, data):
    """Call a handler of the page as a new visitor -> the status, and what the page is told."""
    visitor = uuid4().hex
    body = json.dumps({"data": data, "fn_index": function, "session_hash": visitor})
    status, told = ask(place, "POST", "/gradio_api/queue/join", body, Content_Type="application/json")
    return ask(place, "GET", f"/gradio_api/queue/data?session_hash={visitor}") if status == 200 else (status, told)


def functions(place):
    """The page's handlers: their numbers, and how many inputs each takes."""
    config = json.loads(re.search(r"window\.gradio_config = (.*?);</script>", ask(place, "GET", "/")[1])[1])
    return {row["id"]: len(row["inputs"]) for row in config["dependencies"] if row["backend_fn"]}


FORM = {"Content_Type": "multipart/form-data; boundary=x"}


def upload(place, content, **headers):
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../a.png"\r\n\r\n' + content
    return ask(place, "POST", "/gradio_api/upload", form + b"\r\n--x--\r\n", **FORM, **headers)


def files(cache):
    return {path for path in cache.rglob("*") if path.is_file()}


def test_no_call_reads_a_file_of_the_machine(place, cache, tmp_path):
    """Neither by the place of an image, nor of a gallery's, nor by a URL; and a visitor's own upload is read."""
    (tmp_path / "secret.txt").write_text(SECRET)
    Image.new("RGB", (40, 40), "red").save(tmp_path / "secret.png")
    before, tried = files(cache), 0
    paths = [tmp_path / "secret.txt", tmp_path / "secret.png", f"{cache}/x/../../secret.txt"]
    for path in [*map(str, paths), "http://127.0.0.1:1/a"]:
        assert ask(place, "GET", f"/gradio_api/file={path}")[0] in (403, 404)
        file = {"path": path, "orig_name": "a.png", "meta": {"_type": "gradio.FileData"}}
        for form in (file, [{"image": file, "caption": None}], [file], file | {"url": path}):
            for function, inputs in functions(place).items():
                status, told = call(place, function, [form] * inputs)
                refused = status == 400 if "://" in path else '"success":false' in told
                assert refused or inputs == 0
                assert SECRET not in told
                tried += inputs > 0
    assert tried >= 40
    new = files(cache) - before  # of the example, the only handler without inputs
    assert SECRET not in "".join(path.read_text(errors="replace") for path in new)
    assert {Image.open(path).size for path in new} <= {(8, 8)}
    own = json.loads(upload(place, encoded(Image.new("RGB", (40, 30), "red")))[1])[0]
    assert Path(own).is_relative_to(cache)
    image = {"path": own, "meta": {"_type": "gradio.FileData"}}
    classify = max(number for number, inputs in functions(place).items() if inputs == 3)
    assert '"success":true' in call(place, classify, [[{"image": image, "caption": None}], None, False])[1]


def test_only_the_pages_own_addresses_answer(place):
    for path in ("proxy=http://127.0.0.1:1/a", "file=http://example.org", "info", "vibe-code", "runs", "dev/reload"):
        assert ask(place, "GET", f"/gradio_api/{path}")[0] == 404
    for path in ("run/predict", "api/predict", "call/predict", "component_server", "process_recording", "vibe-edit"):
        assert ask(place, "POST", f"/gradio_api/{path}", "{}")[0] == 404
    assert [ask(place, "GET", path)[0] for path in ("/config", "/docs", "/monitoring")] == [404] * 3
    assert ask(place, "GET", "/", Host="localhost")[0] == 200
    assert ask(place, "GET", "/", Host="example.org")[0] == 400  # such as a page that points its name here


def test_what_is_large_or_from_another_site_is_refused(place, cache, monkeypatch):
    before = files(cache)
    assert ask(place, "POST", "/gradio_api/queue/join", b" " * 1_000_000)[0] == 413
    assert ask(place, "POST", "/gradio_api/queue/join", b"[" * 100_000)[0] == 400
    assert upload(place, bytes(20_000_001))[0] == 413
    assert upload(place, b"x", Sec_Fetch_Site="cross-site")[0] == 403
    disk = namedtuple("disk", "free")(app.KEPT_FREE)
    monkeypatch.setattr(app.shutil, "disk_usage", lambda path: disk)
    assert upload(place, b"x")[0] == 503
    assert files(cache) == before
