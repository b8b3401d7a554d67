"""hub/page.html beside an exported repository, in real Chromium: transformers.js answers as Python does."""

import base64
import hashlib
import io
import re
import shutil
import tarfile
import urllib.request
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path

import pytest
from helpers import http_server

for module in ("onnxruntime", "onnxscript"):
    pytest.importorskip(module, reason="the export extra is not installed")

from dcp_zoo import predict  # noqa: E402
from dcp_zoo.data.packaged import sample_images  # noqa: E402
from dcp_zoo.release import export_hub  # noqa: E402

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


@pytest.mark.scripts
def test_the_page_answers_as_python_does(tiny_head, exported_once, tmp_path, chromium):
    for name in PACKAGES:
        package(name)
    repo, photos = export_hub(tiny_head, tmp_path / "repo"), sample_images()[:2]
    shutil.copy(Path(__file__).parents[1] / "hub" / "page.html", repo / "index.html")
    (tmp_path / "text.png").write_text("hello")
    site = http_server(partial(SimpleHTTPRequestHandler, directory=str(repo)))
    with site as address, chromium.new_context(viewport={"width": 380, "height": 800}) as context:
        context.set_default_timeout(120_000)
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
            assert shown == [(name, pytest.approx(probability, abs=1e-3)) for name, probability in answer]
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        assert [url for url in asked if not url.startswith((f"{address}/", f"blob:{address}/", "data:", CDN))] == []
