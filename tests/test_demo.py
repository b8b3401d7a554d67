"""The demo's handlers, and what requests of other pages are told."""

import http.client
import json
import os
import re
import socket

import pytest
from helpers import png_that_claims
from PIL import Image

from dcp_zoo import create_model, predict
from dcp_zoo.data import load_image
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.errors import ZooError
from dcp_zoo.zoo.specs import DEFAULT_HEAD

OTHER_HEAD = "dcp_mini.pacs_photo-16shot"  # of whose classes the six photographs show none


@pytest.fixture(scope="module")
def app():
    """The demo's module; Gradio takes seconds to import, in each process that does it."""
    pytest.importorskip("gradio", reason="the demo needs dcp_zoo[demo]")
    from space import app

    return app


def photos(*paths):
    """A gallery's photographs."""
    return [(str(path), None) for path in paths]


def coloured(folder, colour, n=4):
    paths = [folder / f"{colour}{i}.png" for i in range(n)]
    for i, path in enumerate(paths):
        Image.new("RGB", (50 + i, 50), colour).save(path)
    return photos(*paths)


@pytest.mark.filterwarnings("ignore:1 of 1 images cannot be read")  # as its caption says
def test_captions_are_what_predict_says(app, tmp_path):
    model = create_model(DEFAULT_HEAD, pretrained=True).eval()
    best = predict(model, sample_images()[0])[0][0]
    path, caption = app.captions(model, photos(sample_images()[0]), False)[0]
    assert (path, caption.split(" %")[0]) == (sample_images()[0], f"wild cat {100 * best.probability:.0f}")
    other = create_model(OTHER_HEAD, pretrained=True).eval()
    assert {caption for _, caption in app.captions(other, photos(*sample_images()), True)} == {"none of these"}
    for name, content, message in (  # named without its folder
        ("broken.jpg", b"not an image", "broken.jpg: not in a supported format"),
        ("bomb.png", png_that_claims(40_000), "bomb.png: 40000 x 40000 pixels, more than the limit of 180,000,000"),
    ):
        (tmp_path / name).write_bytes(content)
        ((_, caption),) = app.captions(other, photos(tmp_path / name), False)
        assert (message in caption, str(tmp_path) in caption) == (True, False)


def test_a_head_is_trained_measured_and_saved(app, tmp_path):
    """Four copies of one photograph are no test of each other."""
    copies = [tmp_path / f"{degrees}.jpg" for degrees in (0, 90, 180, 270)]
    for degrees, path in zip((0, 90, 180, 270), copies, strict=True):
        load_image(sample_images()[0]).rotate(degrees, expand=True).save(path)
    classes = app.named_classes(["red", "", "cat"], [coloured(tmp_path, "red"), None, photos(*copies)])
    old, new = tmp_path / "heads" / "old", tmp_path / "heads" / "new"
    for head in (old, new):
        head.mkdir(parents=True)
    os.utime(old, (0, 0))
    app.remove_old(str(tmp_path / "heads"))
    assert [*(tmp_path / "heads").iterdir()] == [new]
    told, own, download = app.train_on("dcp_mini", classes, str(new))
    assert "Trained on 7 photographs" in told
    assert re.search(r"CLIP without training: .* \(\d of 1;", told)
    assert "your head: at least 20 % (97.5 % sure); estimate 100.0 % (1 of 1;" in told
    assert download["value"] == f"{new}/my_head.zip"
    saved = create_model(f"local-dir:{new}/my_head", True)
    assert saved.classnames == own.classnames == ["cat", "red"]
    assert app.captions(own, coloured(tmp_path, "red", 1), False)[0][1].startswith("red ")
    for names, counts, message in (
        (["cat", ""], [1, 0], "at least two classes"),
        (["cat", None], [1, 1], "Class 2 has photographs but no name"),
    ):
        with pytest.raises(ZooError, match=message):
            app.named_classes(names, [photos("a.png") * count for count in counts])


def test_a_taken_port_is_explained(app):
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(ZooError, match="pass other --host or --port"):
        app.launch(port=other.getsockname()[1])


@pytest.fixture(scope="module")
def place(app, tmp_path_factory):
    """Host and port of a running demo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = app.launch(OTHER_HEAD, port=0, block=False)
        yield page.local_url.split("/")[2]
        page.close(verbose=False)


def ask(place, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(place, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.read().decode(errors="replace")


def test_gradio_gives_no_file_of_the_machine(place, tmp_path):
    (tmp_path / "secret.txt").write_text("nobody else may read this")
    assert ask(place, "GET", f"/gradio_api/file={tmp_path / 'secret.txt'}")[0] in (403, 404)
    image = {"path": str(tmp_path / "secret.txt"), "meta": {"_type": "gradio.FileData"}}
    row = [{"image": image, "caption": None}]
    config = json.loads(re.search(r"window\.gradio_config = (.*?);</script>", ask(place, "GET", "/")[1])[1])
    classify = max(row["id"] for row in config["dependencies"] if len(row["inputs"]) == 3)
    call = json.dumps({"data": [row, None, False], "fn_index": classify, "session_hash": "me"})
    assert ask(place, "POST", "/gradio_api/queue/join", call, Content_Type="application/json")[0] == 200
    assert '"success":false' in ask(place, "GET", "/gradio_api/queue/data?session_hash=me")[1]


def test_other_sites_pages_are_refused(place):
    """By a name of their own for this machine, and what they send without reading the answer."""
    assert ask(place, "GET", "/", Host="localhost")[0] == 200
    assert ask(place, "GET", "/", Host="example.org")[0] == 400
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../../a.png"\r\n\r\nx\r\n--x--\r\n'
    headers = {"Content_Type": "multipart/form-data; boundary=x"}
    assert ask(place, "POST", "/gradio_api/upload", form, **headers)[0] == 200
    assert ask(place, "POST", "/gradio_api/upload", form, Sec_Fetch_Site="cross-site", **headers)[0] == 403
