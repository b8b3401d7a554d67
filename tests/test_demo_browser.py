"""The demo in real Chromium, as a visitor uses it; requests to other machines are forbidden."""

import re
import shutil
import threading
import time
import zipfile

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the demo needs dcp_zoo[demo]")

from dcp_zoo.cli import main
from dcp_zoo.data.samples import sample_images
from dcp_zoo.demo import DEFAULT_HEAD, prepare
from dcp_zoo.demo.session import MAX_PHOTOS

TIMEOUT = 120_000  # ms
PHOTOS = f"Drop photographs here (up to {MAX_PHOTOS})"
TABS = {"Answers": ".dcp-card", "Attention": ".dcp-blocks img", "Batch": ".dcp-table", "Train": "text=Add a class"}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Gradio's folder of files, to check what is kept."""
    return tmp_path_factory.mktemp("gradio")


@pytest.fixture(scope="module")
def address(cache):
    """The address of a running demo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(cache))
        server, listening = prepare(DEFAULT_HEAD, "127.0.0.1", 0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


@pytest.fixture
def visit(address, chromium):
    """Open the page as a new visitor. No request may go anywhere else, and no script may fail."""
    strange, errors, contexts = [], [], []

    def refuse(route):
        strange.append(route.request.url)
        route.abort()

    def open_page(width=1280):
        context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme="light")
        contexts.append(context)
        context.set_default_timeout(TIMEOUT)
        context.route(lambda url: not url.startswith((address, "data:", "blob:")), refuse)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        page.wait_for_selector(".dcp-card")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert strange == []
    assert errors == []


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "my flower.jpg"
    shutil.copy(sample_images()[1], path)
    return path


def drop(page, zone, *paths):
    """Drop files on the drop zone with this name."""
    page.get_by_role("button", name=zone, exact=True).locator("input[type=file]").set_input_files(list(map(str, paths)))


def tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def rows(page, table):
    return page.get_by_role("table", name=table, exact=True).first.get_by_role("row")


def test_an_uploaded_photograph_is_classified_and_not_kept(visit, photograph, cache):
    page = visit()
    assert page.title() == "DCP demo"
    drop(page, PHOTOS, photograph)
    page.wait_for_selector("h3:has-text('my flower.jpg')")
    assert page.locator(".dcp-card").count() == 1  # the samples are replaced
    assert rows(page, "DCP").count() == rows(page, "CLIP without training (zero-shot)").count() == 5
    assert list(cache.rglob("*.jpg")) == []


def test_class_names_change_the_answers(visit):
    page = visit()
    names = page.get_by_role("textbox", name="Class names, separated by commas")
    assert "pagoda" in names.input_value()
    names.fill("temple, flower, sea")
    page.get_by_role("button", name="Use these names").click()
    table = page.get_by_role("table", name="DCP before and after your edit of the class names").first
    table.wait_for()
    assert table.get_by_role("rowheader", name="temple", exact=True).count() == 1
    assert rows(page, "DCP").count() == 3
    names.fill("temple, Temple")
    page.get_by_role("button", name="Use these names").click()
    page.get_by_role("alert").filter(has_text="cannot be told apart").wait_for()


def test_attention_and_batch_effect(visit):
    page = visit()
    tab(page, "Attention")
    pictures = page.locator(".dcp-blocks img")
    pictures.nth(5).wait_for()
    assert pictures.count() == 6
    before = pictures.first.get_attribute("src")
    page.get_by_role("combobox", name="Attending token").click()
    page.get_by_role("option", name="prompt 2").click()
    page.wait_for_selector("img[alt='Block 0: attention of the prompt 2 over the patches']")
    assert pictures.first.get_attribute("src") != before
    tab(page, "Batch")
    headers = page.get_by_role("table", name="Logits of cat.jpg").get_by_role("columnheader")
    headers.last.wait_for()
    assert headers.all_inner_texts() == ["class", "calibrated", "batch: alone", "batch: with coffee.jpg"]


def test_a_broken_file_is_named_and_the_page_keeps_working(visit, tmp_path, photograph):
    (tmp_path / "broken.jpg").write_bytes(photograph.read_bytes()[:2000])
    (tmp_path / "text.png").write_text("hello")
    page = visit()
    drop(page, PHOTOS, tmp_path / "broken.jpg", tmp_path / "text.png", photograph)
    alert = page.get_by_role("alert").filter(has_text="broken.jpg")
    alert.wait_for()
    assert "text.png: not an image" in alert.inner_text()
    assert str(tmp_path.anchor) not in alert.inner_text()  # no folder of the server's
    page.wait_for_selector("h3:has-text('my flower.jpg')")
    page.get_by_role("button", name="Samples").click()
    page.wait_for_selector("h3:has-text('cat.jpg')")
    assert page.get_by_role("alert").filter(has_text="broken.jpg").count() == 0


def test_a_head_is_trained_downloaded_and_works(visit, tmp_path, cache, monkeypatch, capsys):
    page = visit()
    tab(page, "Train")
    for number, colour in enumerate(["red", "blue"], 1):
        paths = [tmp_path / f"{colour}{i}.png" for i in range(2)]
        for i, path in enumerate(paths):
            Image.new("RGB", (60 + i, 60), colour).save(path)
        page.get_by_role("textbox", name=f"Name of class {number}").fill(colour)
        drop(page, f"Photographs of class {number}", *paths)
        page.get_by_role("img", name=f"{colour}1.png").wait_for()
    page.get_by_role("spinbutton").fill("10")
    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_role("status").filter(has_text="of its 4 training photographs").wait_for()
    page.locator(".vega-embed").locator("canvas, svg").first.wait_for()  # the loss curve
    with page.expect_download() as download:
        page.get_by_role("button", name="Download the head").click()
    download.value.save_as(tmp_path / "head.zip")
    zipfile.ZipFile(tmp_path / "head.zip").extractall(tmp_path)
    tab(page, "Answers")
    page.wait_for_selector(".dcp-bars >> text=blue")
    assert rows(page, "DCP").count() == 2

    monkeypatch.setattr("sys.argv", ["dcp-zoo", "predict", str(paths[0]), "--head", str(tmp_path / "my_head")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert re.search(r"class.*blue.*red", capsys.readouterr().out, re.DOTALL)

    assert list(cache.glob("head-*")) != []
    page.close()
    for _ in range(100):  # the server notices with the next heartbeat
        if not list(cache.glob("head-*")):
            return
        time.sleep(0.3)
    pytest.fail("the trained head is still there after the page was closed")


def test_two_visitors_do_not_see_each_others_photographs(visit, photograph):
    first, second = visit(), visit()
    drop(first, PHOTOS, photograph)
    first.wait_for_selector("h3:has-text('my flower.jpg')")
    second.get_by_role("button", name="Use these names").click()
    second.get_by_role("alert").filter(has_text="same as before").wait_for()
    second.wait_for_selector("h3:has-text('cat.jpg')")
    assert "my flower" not in second.content()


def test_accessible_by_keyboard_and_screen_reader(visit):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page = visit()
    assert page.get_by_role("heading", level=1).count() == 1
    for name, content in TABS.items():
        tab(page, name)
        page.locator(content).first.wait_for()
        violations = [v for v in axe.run(page).response["violations"] if v["impact"] in ("serious", "critical")]
        assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in violations] == []
    reached = set()
    page.get_by_role("heading", level=1).click()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.ariaLabel || document.activeElement.innerText.trim()"))
    assert {PHOTOS, "Folder ...", "Use these names", "Photographs of class 2", "Train"} <= reached


def test_the_page_fits_a_phone(visit):
    page = visit(390)
    for name, content in TABS.items():
        tab(page, name)
        page.locator(content).first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
