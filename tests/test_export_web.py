"""The exported web page in real Chromium, from a plain static server, with no request to any other address."""

import json
from functools import partial
from http.server import SimpleHTTPRequestHandler

import numpy as np
import pytest
from helpers import http_server
from PIL import Image

for module in ("onnxruntime", "onnxscript"):
    pytest.importorskip(module, reason="the export extra is not installed")

from dcp_zoo import ZooError  # noqa: E402
from dcp_zoo.answers import Answering  # noqa: E402
from dcp_zoo.data import load_image  # noqa: E402
from dcp_zoo.data.packaged import sample_images  # noqa: E402
from dcp_zoo.deploy import web  # noqa: E402
from dcp_zoo.deploy.onnx_classifier import OnnxClassifier  # noqa: E402
from dcp_zoo.deploy.web import export_web  # noqa: E402

pytestmark = pytest.mark.usefixtures("exported_once")
TIMEOUT = 120_000  # ms


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def serve(folder):
    """A static server, as any web host."""
    return http_server(partial(Quiet, directory=str(folder)))


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """JPEG and PNG of odd sizes, one turned by its EXIF orientation; and two files that are no images."""
    folder = tmp_path_factory.mktemp("photographs")
    cat, coffee = map(load_image, sample_images()[:2])
    turned = Image.Exif()
    turned[0x112] = 6
    cat.save(folder / "cat.jpg", quality=90)
    coffee.resize((501, 333)).save(folder / "coffee.png")
    coffee.crop((0, 0, 97, 400)).save(folder / "narrow & <b>.png")
    coffee.save(folder / "turned.jpg", exif=turned, quality=90)
    (folder / "text.png").write_text("hello")
    return folder


def test_the_page_answers_as_python_does(rejecting_once, photographs, tmp_path, chromium):
    try:
        page_folder = export_web(rejecting_once[0], tmp_path / "site" / "page", title="My head")
    except ZooError as error:
        if "download" in str(error):
            pytest.skip(f"onnxruntime-web is not in the cache: {error}")
        raise
    classifier, unknown = OnnxClassifier(page_folder / "model.onnx"), []
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    narrow = {"width": 380, "height": 800}
    with serve(page_folder) as address, chromium.new_context(viewport=narrow, color_scheme="dark") as context:
        context.set_default_timeout(TIMEOUT)
        asked, errors = [], []
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.locator("#status").wait_for(state="hidden")
        assert page.title() == page.get_by_role("heading", level=1).inner_text() == "My head"
        page.set_input_files("#files", sorted(map(str, photographs.iterdir())))
        page.locator("article tr").nth(4 * 4 - 1).wait_for()
        for path in photographs.iterdir():
            card = page.locator("article", has=page.get_by_role("heading", name=path.name, exact=True))
            if path.name == "text.png":
                assert "not an image" in card.inner_text()
                continue
            rows = [
                (row.locator("th").inner_text(), row.get_attribute("data-probability"))
                for row in card.locator("tr").all()
            ]
            expected = classifier.classify(load_image(str(path)))
            assert [name for name, _ in rows] == [row["class"] for row in expected]
            logits, distances = classifier.outputs(classifier.preprocess(load_image(str(path)))[None])
            unknown.append(
                Answering(1, classifier.info["threshold"])(logits, classifier.classnames, distances)[0]["rejected"]
            )
            assert ("None of these" in card.inner_text()) == unknown[-1]
            np.testing.assert_allclose(
                [float(p) for _, p in rows], [row["probability"] for row in expected], atol=1e-3, err_msg=path.name
            )
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        violations = [v for v in axe.run(page).response["violations"] if v["impact"] in ("serious", "critical")]
        assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in violations] == []
        page.get_by_role("button", name="Use the camera").click()
        page.get_by_text("There is no camera that this page may use.").wait_for()
        assert errors == []
        assert set(unknown) == {False, True}
        assert [url for url in asked if not url.startswith((f"{address}/", f"blob:{address}/", "data:"))] == []


def test_the_folder_has_everything(tiny_head, tmp_path, monkeypatch):
    """Page, model and both files of the runtime, from the cache; and no folder is overwritten."""
    monkeypatch.setenv("DCP_ZOO_CACHE", str(tmp_path / "cache"))
    runtime = tmp_path / "cache" / f"onnxruntime-web-{web.ORT_VERSION}"
    runtime.mkdir(parents=True)
    for name in web.ORT_FILES:
        (runtime / name).write_text(name)
    folder = export_web(tiny_head, tmp_path / "page")
    assert {path.name for path in folder.iterdir()} == {
        *(path.name for path in web.PAGE.iterdir()), *web.ORT_FILES, "model.onnx", "head.json"
    }  # fmt: skip
    head = json.loads((folder / "head.json").read_text())
    assert head["classnames"] == tiny_head.classnames
    assert head["precision"] == "float16"
    with pytest.raises(ZooError, match="choose a new or empty folder"):
        export_web(tiny_head, folder)
    (runtime / web.ORT_FILES[1]).unlink()
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    with pytest.raises(ZooError, match=r"copy ort.*\.mjs and ort-wasm.*\.wasm from package/dist to .*cache"):
        export_web(tiny_head, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "page"]  # nothing half-written


def test_a_runtime_that_is_not_the_pinned_one_is_refused(tmp_path, monkeypatch):
    archive = tmp_path / "onnxruntime-web" / "-" / f"onnxruntime-web-{web.ORT_VERSION}.tgz"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"something else")
    monkeypatch.setenv("DCP_ZOO_CACHE", str(tmp_path / "cache"))
    with serve(tmp_path) as address:
        monkeypatch.setenv("npm_config_registry", f"{address}/")
        with pytest.raises(ZooError, match="not the file that was pinned"):
            web.runtime_files()
    with pytest.raises(ZooError, match=r"Cannot download .*onnxruntime-web.*package/dist"):
        web.runtime_files()
    assert not (tmp_path / "cache").exists()
