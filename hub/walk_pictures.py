"""Create the pictures of `docs/walk_photographer.md` in Chromium: its commands run, and what they made is shown.
`inspection.webp` is of another folder, with two wrong labels and two copies.

pip install '.[dev]' && python hub/walk_pictures.py
"""

import html
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageOps
from playwright.sync_api import Browser, Page, sync_playwright

from dcp_zoo import inspect
from dcp_zoo.data import load_image
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.tables import NONE

DOCS = Path(__file__).parents[1] / "docs"
CLASSES = ("cat", "cup of coffee", "otter", "bird of prey", "lake", "flowers")
SHOWN = ("Labels that may be wrong", "Bad images")  # from the first of these headings to the second
WIDTH, SHEET, SCALE = 620, 580, 1.5  # in CSS pixels; the second is the height of the contact sheet
QUALITY = 70  # of WebP
WIDE = {"COLUMNS": "84"}  # of the terminal
STYLE = """body { font: 15px system-ui; margin: 8px } h2 { font-size: 15px; margin: 10px 0 4px }
img { width: 71px; height: 54px; object-fit: cover } pre { white-space: pre-wrap }"""
TRAIN = "dcp-zoo train UNSORTED --labels labels.csv --output my_head\n"


def main() -> None:
    """Walk, and save the screenshots."""
    with TemporaryDirectory() as temporary, sync_playwright() as driver:
        folder = Path(temporary)
        said = walk(folder)
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        save(opened(browser, folder / "to_label" / "found.html"), "walk_suggest.webp", 0, 500)
        save_whole(browser, f"<style>{STYLE}</style><pre>{html.escape(said)}</pre>", folder, "walk_train.png")
        view = opened(browser, folder / "sheet.html")
        view.evaluate("[...document.images].forEach(image => image.loading = 'eager')")
        view.wait_for_function("[...document.images].every(image => image.complete)")
        save(view, "walk_sheet.webp", view.get_by_role("heading", name=NONE).evaluate("e => e.offsetTop") - 16, SHEET)
        view = opened(browser, inspected(folder / "inspected"))
        top, bottom = (view.get_by_role("heading", name=name).evaluate("e => e.offsetTop") for name in SHOWN)
        save(view, "inspection.webp", top - 16, bottom - top)
        browser.close()


def walk(folder: Path) -> str:
    """Run the code blocks of the page in a folder; what the first training says."""
    page, said = (DOCS / "walk_photographer.md").read_text(), ""
    for language, code in re.findall(r"^```(python|bash)\n(.*?)^```", page, re.MULTILINE | re.DOTALL):
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
        run = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | WIDE)
        said = run.stdout if code == TRAIN else said
    return f"$ {TRAIN}{said}"


def opened(browser: Browser, page: Path) -> Page:
    view = browser.new_page(viewport={"width": WIDTH, "height": 1200}, color_scheme="light", device_scale_factor=SCALE)
    view.goto(page.as_uri())
    return view


def save(view: Page, name: str, top: int, height: int) -> None:
    """Save a part of the page, from `top` on; text without photographs as PNG."""
    shown = view.screenshot(full_page=True, clip={"x": 0, "y": top, "width": WIDTH, "height": height})
    save_picture(Image.open(io.BytesIO(shown)), DOCS / "images" / name)


def save_picture(picture: Image.Image, file: Path) -> None:
    """WebP for photographs, PNG with few colours for text."""
    if file.suffix == ".webp":
        picture.convert("RGB").save(file, quality=QUALITY, method=6)
    else:
        picture.convert("RGB").quantize(16).save(file, optimize=True)


def save_whole(browser: Browser, content: str, folder: Path, name: str) -> None:
    """Save a page of this content, from its beginning to its end."""
    (folder / "page.html").write_text(f"<!doctype html><meta charset=utf-8>{content}")
    view = opened(browser, folder / "page.html")
    save(view, name, 0, view.evaluate("document.body.offsetHeight") + 16)


def inspected(folder: Path) -> Path:
    """The page of `dcp-zoo inspect` on parts of the photographs, with two wrong labels and two copies."""
    photos = [load_image(path) for path in sample_images()]
    for name, photo in zip(CLASSES, photos, strict=True):
        (folder / name).mkdir(parents=True)
        w, h = photo.width // 4, photo.height // 4
        for i, (x, y) in enumerate(((0, 0), (w, 0), (0, h), (w, h))):
            photo.crop((x, y, x + 3 * w, y + 3 * h)).save(folder / name / f"{i}.jpg")
    photos[1].save(folder / "cat" / "4.jpg")
    photos[2].save(folder / "lake" / "4.jpg")
    ImageOps.mirror(load_image(str(folder / "otter" / "0.jpg"))).save(folder / "otter" / "web.jpg")
    return inspect(folder).write(str(folder.parent))[0]


if __name__ == "__main__":
    main()
