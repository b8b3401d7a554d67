"""Pages in real Chromium: hub/page.html beside an exported repository, where transformers.js answers as
Python does; and the demo as a visitor uses it, from which requests to other machines are forbidden."""

import base64
import hashlib
import io
import re
import shutil
import tarfile
import urllib.request
import zipfile
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from helpers import http_server
from PIL import Image

from dcp_zoo import predict
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.release import export_hub

pytestmark = pytest.mark.scripts
TIMEOUT = 120_000  # ms
CDN, NPM = "https://cdn.jsdelivr.net/npm/", "https://registry.npmjs.org/"
PACKAGES = {  # sha512 as npm has it
    "@huggingface/transformers@4.3.2":
        "V3+dqf3iWlRYJ9I9GreM3zGQd0lAXnnoPeddmkOQYWAEE4l/+Fi6p7tx/qVUJlKQgLXGim2W76rTOzz+eC0i7g==",
    "onnxruntime-web@1.31.0-dev.20260914-8d85527a0":
        "Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuqtDeF6g==",
}  # fmt: skip
KINDS = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm"}


@cache
def package(name: str) -> tarfile.TarFile:
    """The files of a package of npm, such as "onnxruntime-web@1.0"."""
    path, version = name.rsplit("@", 1)
    try:
        answer = urllib.request.urlopen(f"{NPM}{path}/-/{path.rpartition('/')[2]}-{version}.tgz", timeout=60)
    except OSError as error:
        pytest.skip(f"npm's registry cannot be reached: {error}")
    with answer:
        archive = answer.read()
    assert base64.b64encode(hashlib.sha512(archive).digest()).decode() == PACKAGES[name]
    return tarfile.open(fileobj=io.BytesIO(archive))


def from_npm(route):
    name, path = re.fullmatch(rf"{CDN}(.[^@]*@[^/]+)/(.*)", route.request.url).groups()
    file = package(name).extractfile(f"package/{path}")
    headers = {"Access-Control-Allow-Origin": "*"}
    route.fulfill(body=file.read(), content_type=KINDS[Path(path).suffix], headers=headers)


def test_the_page_answers_as_python_does(tiny_head, exported_once, tmp_path, chromium):
    for name in PACKAGES:
        package(name)
    repo, photos = export_hub(tiny_head, tmp_path / "repo"), sample_images()[:2]
    shutil.copy(Path(__file__).parents[1] / "hub" / "page.html", repo / "index.html")
    (tmp_path / "text.png").write_text("hello")
    site = http_server(partial(SimpleHTTPRequestHandler, directory=str(repo)))
    with site as address, chromium.new_context(viewport={"width": 380, "height": 800}) as context:
        context.set_default_timeout(TIMEOUT)
        context.route(f"{CDN}**", from_npm)
        asked, page = [], context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.locator("input:enabled").set_input_files([*photos, str(tmp_path / "text.png")])
        page.get_by_text("not an image that the browser can read").wait_for()
        for path, answer in zip(photos, predict(tiny_head, photos, top_k=4), strict=True):
            card = page.locator("article", has=page.get_by_role("heading", name=Path(path).name))
            shown = [(row.get_attribute("data-label"), float(row.get_attribute("data-score"))) for row in
                     card.locator("[data-label]").all()]  # fmt: skip
            assert shown == [(name, pytest.approx(probability, abs=1e-3)) for name, probability, _ in answer]
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        assert [url for url in asked if not url.startswith((f"{address}/", f"blob:{address}/", "data:", CDN))] == []


def test_what_the_command_line_writes_is_accessible(run, flowers, chromium):
    """axe finds nothing that WCAG 2.2 AA forbids on a page, dark or light, and nothing is wider than a
    phone."""
    from axe_playwright_python.sync_playwright import Axe  # not skipped without it, which would skip the rest

    run("predict", *sample_images(), "--head", "dcp_mini.pacs_photo-16shot", "--reject", "--sheet", "sheet.html")
    run("inspect", flowers, "--output", "found")
    run.ok("train", flowers, "--no-refit", "--output", "my_head")
    run.ok("eval", flowers, "--head", "my_head", "--report", "mistakes.html")
    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]}
    for scheme in ("dark", "light"):
        with chromium.new_context(viewport={"width": 390, "height": 900}, color_scheme=scheme) as context:
            page = context.new_page()
            for file in ("sheet.html", "found/inspection.html", "mistakes.html"):
                page.goto(Path(file).absolute().as_uri())
                violations = Axe().run(page, options=rules).response["violations"]
                assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in violations] == [], file
                assert page.evaluate("document.documentElement.scrollWidth") <= 390, file


@pytest.fixture
def page(chromium, tmp_path, monkeypatch):
    """The demo's page. No request may go anywhere else, and no script may fail."""
    pytest.importorskip("gradio", reason="the demo needs dcp_zoo[demo]")  # which takes seconds
    from space.app import launch

    asked, errors = [], []
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    demo = launch(port=0, block=False)
    address = demo.local_url
    with chromium.new_context(viewport={"width": 1280, "height": 1000}) as context:
        context.set_default_timeout(TIMEOUT)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        yield page
    demo.close(verbose=False)
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


def choose(page, label, *paths):
    """Choose files in the gallery with this label."""
    field = page.locator(".block", has_text=label).last
    field.locator("input[type=file]").first.set_input_files([str(path) for path in paths])
    return field


@pytest.mark.filterwarnings("ignore:1 of 3 images cannot be read")  # which the page says
def test_a_visitor_trains_downloads_and_classifies(page, tmp_path):
    page.get_by_role("tab", name="Classify").click()
    page.get_by_text(re.compile("^wild cat 68 %")).wait_for()
    page.get_by_role("tab", name="Train").click()
    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_text("Training needs at least two classes").wait_for()
    for number, colour in enumerate(("red", "blue"), 1):
        paths = [tmp_path / f"{colour}{i}.png" for i in range(14)]
        for i, path in enumerate(paths):
            Image.new("RGB", (60 + i, 60), colour).save(path)
        page.get_by_label(f"Class {number}", exact=True).fill(f"very {colour}")
        choose(page, f"Photographs of class {number}", *paths).locator("img").nth(13).wait_for()
    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_text(re.compile(r"your head: at least \d+ % .* estimate 100\.0 % \(8 of 8")).wait_for()
    with page.expect_download() as download:
        page.get_by_text("Download the head").click()
    assert "my_head/model.safetensors" in zipfile.ZipFile(download.value.path()).namelist()
    page.get_by_role("tab", name="Classify").click()
    page.get_by_text(re.compile("^very (red|blue) ")).nth(5).wait_for()  # the six photographs, again
    (tmp_path / "broken.jpg").write_bytes(b"hello")
    page.get_by_label("Clear").last.click()
    choose(page, "Photographs to classify", tmp_path / "red0.png", tmp_path / "broken.jpg", sample_images()[1])
    page.get_by_text(re.compile("^very red ")).first.wait_for()
    page.get_by_text(re.compile("broken.jpg: not in a supported format")).wait_for()
    page.get_by_label("none of these").check()
    page.get_by_text("none of these", exact=True).last.wait_for()
    page.set_viewport_size({"width": 390, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
