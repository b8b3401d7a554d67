"""The demo in real Chromium, as a visitor uses it; requests to other machines are forbidden."""

import http.client
import re
import shutil
import threading
import zipfile

import pytest
from helpers import until
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs dcp_zoo[demo]")

from dcp_zoo.data.packaged import sample_images
from dcp_zoo.demo import DEFAULT_HEAD, VisitorLimits, demo_server

TIMEOUT = 120_000  # ms
LIMITS = VisitorLimits(max_photos=7, max_shots=12)
PHOTOS = f"Drop photographs or a folder (up to {LIMITS.max_photos})"
CLASS = "Photographs or folder of class {} " + f"(up to {LIMITS.max_shots})"


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Gradio's folder of files, to check what is kept."""
    return tmp_path_factory.mktemp("gradio")


@pytest.fixture(scope="module")
def address(cache):
    """The address of a running demo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(cache))
        patch.setattr("dcp_zoo.demo.app.UPLOADS", 20_000_000)
        server, listening = demo_server(DEFAULT_HEAD, "127.0.0.1", 0, LIMITS)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser(chromium):
    """With a cache, which makes the next visits short. Nothing moves: drawing that takes longer than most tests."""
    quiet = {"color_scheme": "light", "reduced_motion": "reduce"}
    context = chromium.new_context(viewport={"width": 1280, "height": 900}, **quiet)
    context.set_default_timeout(TIMEOUT)
    yield context
    context.close()


@pytest.fixture
def visit(address, browser):
    """Open the page as a new visitor. No request may go anywhere else, and no script may fail."""
    asked, errors = [], []
    playwright = pytest.importorskip("playwright.sync_api")

    def open_page():
        page = browser.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if re.search("rror|not impl", line.text) else None)
        page.goto(address)
        try:
            page.wait_for_selector(".dcp-card", timeout=TIMEOUT / 3)
        except playwright.TimeoutError:  # on a busy machine Gradio's first event may be lost
            page.reload()
            page.wait_for_selector(".dcp-card")
        return page

    yield open_page
    for page in browser.pages:
        page.close()
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
    assert errors == []


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "my flower.jpg"
    shutil.copy(sample_images()[1], path)
    return path


def choose(page, zone, *paths):
    """Choose files in the dialogue of the drop zone with this name."""
    page.get_by_role("button", name=zone, exact=True).locator("input[type=file]").set_input_files(list(map(str, paths)))


def drop(page, zone, folder):
    """Drop a folder on the drop zone with this name, as the desktop does."""
    box = page.get_by_role("button", name=zone, exact=True).bounding_box()
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
    devtools = page.context.new_cdp_session(page)
    for kind in ("dragEnter", "dragOver", "drop"):
        devtools.send("Input.dispatchDragEvent", {"type": kind, "data": data, **place})


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def card(page, name):
    return page.get_by_role("region", name=name, exact=True)


def screens(page):
    """The page on a dark desktop and on a light phone, whose widths are given."""
    for width, scheme in ((1280, "dark"), (390, "light")):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        page.wait_for_function(f"document.body.classList.contains('dark') == ('{scheme}' == 'dark')")
        yield width


def check_accessible(page):
    """axe finds nothing that WCAG 2.2 AA forbids, and nothing is wider than the screen."""
    from axe_playwright_python.sync_playwright import Axe  # not skipped without it, which would skip the rest of a test

    rules = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]}
    page.wait_for_function("!document.querySelector('.pending')")
    for width in screens(page):
        violations = Axe().run(page, options=rules).response["violations"]
        assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in violations] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_photographs_and_names_come_and_go_and_are_not_kept(visit, tmp_path, photograph, cache):
    (tmp_path / "broken.jpg").write_bytes(photograph.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("hello")
    page = visit()
    assert page.title() == "DCP demo"
    assert page.locator(".dcp-card h3").all_inner_texts()[0] == "cat right"
    assert page.get_by_text("DCP names 6 of 6 right").count() == 1
    choose(page, PHOTOS, tmp_path / "broken.jpg", tmp_path / "text.png", photograph)
    card(page, photograph.name).wait_for()
    assert page.locator(".dcp-card").count() == 1  # the samples are replaced
    alert = page.get_by_role("alert")
    assert "broken.jpg" in alert.inner_text()
    assert "text.png: not in a supported format" in alert.inner_text()
    assert str(tmp_path.anchor) not in alert.inner_text()  # no folder of the server's
    assert list(cache.rglob("*.jpg")) == []
    page.get_by_role("button", name=f"Remove {photograph.name}").click()
    page.get_by_text("No photographs yet").wait_for()
    assert alert.count() == 0  # with the next action, the message about the upload is gone
    page.get_by_role("button", name="Unknown things").click()
    page.get_by_role("heading", name="none of these").nth(5).wait_for()

    choose(page, PHOTOS, photograph)
    card(page, photograph.name).wait_for()
    other = visit()
    names = other.get_by_role("textbox", name="Class names, one per line")
    names.fill("temple\nflower\nsea")
    other.get_by_role("button", name="Use these names").click()
    other.locator(".dcp-bars th", has_text="temple").first.wait_for()
    assert photograph.name not in other.content()  # which is another visitor's
    names.fill("temple\nTemple")
    other.get_by_role("button", name="Use these names").click()
    other.get_by_role("alert").filter(has_text="cannot be told apart").wait_for()
    other.get_by_role("button", name="The model's own").click()
    other.locator(".dcp-bars th", has_text="temple").first.wait_for(state="detached")


def test_a_head_is_trained_downloaded_and_removed(visit, tmp_path, cache):
    page = visit()
    tab(page, "Train")
    start = page.get_by_role("button", name="Train", exact=True)
    start.click()
    page.get_by_role("alert").filter(has_text="at least two classes").wait_for()
    for number, colour in enumerate(["red", "blue"], 1):
        folder = tmp_path / f"very_{colour}"
        folder.mkdir()
        (folder / "notes.txt").write_text("")
        for i in range(4):
            Image.new("RGB", (60 + i, 60), colour).save(folder / f"{colour}{i}.png")
        drop(page, CLASS.format(number), folder)
        page.get_by_role("img", name=f"{colour}3.png").wait_for()
        assert page.get_by_role("textbox", name=f"Name of class {number}").input_value() == f"very {colour}"
    assert page.get_by_role("alert").count() == 0
    start.click()
    page.get_by_text("Of 2 held-out images").wait_for()
    page.get_by_role("region", name="Predictions for the held-out images").wait_for()
    check_accessible(page)
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the head").click()
    assert "my_head/model.safetensors" in zipfile.ZipFile(download.value.path()).namelist()
    page.get_by_role("button", name="Classify with it").click()
    page.locator(".dcp-bars th", has_text="very blue").first.wait_for()
    assert page.locator(".dcp-card").count() == 2  # the held-out photographs

    assert list(cache.glob("head-*")) != []
    page.close()
    until(lambda: not list(cache.glob("head-*")))  # the server notices that the page is closed with the next heartbeat


def test_usable_by_keyboard_in_every_light_and_on_a_phone(visit):
    page, reached = visit(), set()
    names = page.get_by_role("textbox", name="Class names, one per line")
    for _ in screens(page):
        for control in (names, page.get_by_label("Model")):
            assert control.bounding_box()["y"] < 900  # on the first screen
    names.fill("cat\ncoffee\notter\nbird\nlake\nflowers")
    page.get_by_role("button", name="Use these names").click()
    page.locator(".dcp-bars th").filter(has_text=re.compile("^flowers$")).first.wait_for()
    check_accessible(page)
    tab(page, "Train")
    page.get_by_role("button", name="Try an example").click()
    page.locator(".dcp-thumbnails img").last.wait_for()  # the other test of this room looks at all of it

    assert page.get_by_role("heading", level=1).count() == 1
    for room in ("Classify", "Train"):
        tab(page, room)
        page.get_by_role("heading", level=1).click()
        for _ in range(30):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText.trim()"))
    assert {PHOTOS, "Six photographs", "Use these names", "Remove cat.jpg", CLASS.format(2), "Train"} <= reached


def test_only_this_machine_and_few_uploads_are_let_in(address):
    def status(method, path, host="localhost", length=0):
        connection = http.client.HTTPConnection(address.split("/")[2])
        connection.request(method, path, headers={"Host": host, "Content-Length": str(length)})
        return connection.getresponse().status

    assert status("GET", "/") == 200
    assert status("GET", "/", host="example.org") == 400
    assert status("POST", "/gradio_api/upload", length=20_000_001) == 503
