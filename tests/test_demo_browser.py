"""The demo in real Chromium, as a visitor uses it; requests to other machines are forbidden."""

import re
import zipfile

import pytest
from PIL import Image

gr = pytest.importorskip("gradio", reason="the demo needs dcp_zoo[demo]")

from dcp_zoo.data.packaged import sample_images  # noqa: E402
from dcp_zoo.demo import launch  # noqa: E402

TIMEOUT = 120_000  # ms


@pytest.fixture
def page(chromium, tmp_path, monkeypatch):
    """The demo's page. No request may go anywhere else, and no script may fail."""
    pages, asked, errors = [], [], []
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "gradio"))
    monkeypatch.setattr(gr.Blocks, "block_thread", lambda page: pages.append(page))
    launch(port=0)
    address = pages[0].local_url
    with chromium.new_context(viewport={"width": 1280, "height": 1000}) as context:
        context.set_default_timeout(TIMEOUT)
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        yield page
    pages[0].close(verbose=False)
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


def choose(page, label, *paths):
    """Choose files in the gallery with this label."""
    field = page.locator(".block", has_text=label).last
    field.locator("input[type=file]").first.set_input_files([str(path) for path in paths])
    return field


@pytest.mark.scripts
def test_a_visitor_trains_downloads_and_classifies(page, tmp_path):
    page.get_by_role("tab", name="Classify").click()
    page.get_by_text(re.compile("^wild cat 99 %")).wait_for()
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
    page.get_by_text("your head: 100.0 % (8 of 8").wait_for()
    with page.expect_download() as download:
        page.get_by_text("Download the head").click()
    assert "my_head/model.safetensors" in zipfile.ZipFile(download.value.path()).namelist()
    page.get_by_role("tab", name="Classify").click()
    page.get_by_text(re.compile("^very (red|blue) ")).nth(5).wait_for()  # the six photographs, again
    (tmp_path / "broken.jpg").write_bytes(b"hello")
    page.get_by_label("Clear").last.click()
    choose(page, "Photographs, up to", tmp_path / "red0.png", tmp_path / "broken.jpg", sample_images()[1])
    page.get_by_text(re.compile("^very red ")).first.wait_for()
    page.get_by_text(re.compile("broken.jpg: not in a supported format")).wait_for()
    page.get_by_label("none of these").check()
    page.get_by_text("none of these", exact=True).wait_for()
    page.set_viewport_size({"width": 390, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
