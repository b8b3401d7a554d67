"""Create `docs/images/walk_sheet.webp` and `inspection.webp` in Chromium. The first is what the commands of
"From an unsorted folder" in `docs/train.md` make of parts of the package's photographs, of which otters are
not labelled; the second is of another folder, with two wrong labels and two copies.

pip install '.[dev]' && python hub/walk_pictures.py
"""

import io
import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from PIL import Image, ImageOps
from playwright.sync_api import Browser, Page, sync_playwright

from dcp_zoo import inspect
from dcp_zoo.data import load_image
from dcp_zoo.data.packaged import sample_images
from dcp_zoo.tables import NONE

IMAGES = Path(__file__).parents[1] / "docs" / "images"
CLASSES = ("cat", "cup of coffee", "otter", "bird of prey", "lake", "flowers")
SHOWN = ("Labels that may be wrong", "Bad images")  # from the first of these headings to the second
WIDTH = 620  # in CSS pixels
SHEET = 580  # height of the contact sheet
SCALE = 1.5
QUALITY = 70  # of WebP


def main() -> None:
    """Walk, and save the screenshots."""
    with TemporaryDirectory() as temporary, sync_playwright() as driver:
        folder = Path(temporary)
        walk(folder)
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        view = opened(browser, folder / "sheet.html")
        view.evaluate("[...document.images].forEach(image => image.loading = 'eager')")
        view.wait_for_function("[...document.images].every(image => image.complete)")
        save(view, "walk_sheet.webp", view.get_by_role("heading", name=NONE).evaluate("e => e.offsetTop") - 16, SHEET)
        view = opened(browser, inspected(folder / "inspected"))
        top, bottom = (view.get_by_role("heading", name=name).evaluate("e => e.offsetTop") for name in SHOWN)
        save(view, "inspection.webp", top - 16, bottom - top)
        browser.close()


def walk(folder: Path) -> None:
    """From parts of the photographs to `sheet.html`."""
    (folder / "UNSORTED").mkdir()
    for path in sample_images():
        photo = load_image(path)
        width, height = photo.size
        for number in range(8):
            left = width * (number % 4) // 10
            top = height * (number // 4) // 5
            part = photo.crop((left, top, left + width * 7 // 10, top + height * 4 // 5))
            part.save(folder / "UNSORTED" / f"{Path(path).stem}-{number}.jpg")
    zoo(folder, "search UNSORTED --to-label --count 28 --output to_label")
    table = folder / "to_label" / "found.csv"
    found = pd.read_csv(table)
    found["class"] = found["file"].map(lambda file: Path(file).stem.partition("-")[0])
    found[found["class"] != "otter"].to_csv(table, index=False)
    zoo(folder, "train UNSORTED --labels to_label/found.csv --output my_head")
    zoo(folder, "predict UNSORTED --head my_head --reject --output predictions.csv --sheet sheet.html")


def zoo(folder: Path, command: str) -> None:
    subprocess.run(["dcp-zoo", *command.split()], cwd=folder, check=True)


def opened(browser: Browser, page: Path) -> Page:
    view = browser.new_page(viewport={"width": WIDTH, "height": 1200}, color_scheme="light", device_scale_factor=SCALE)
    view.goto(page.as_uri())
    return view


def save(view: Page, name: str, top: int, height: int) -> None:
    """Save a part of the page, from `top` on."""
    shown = view.screenshot(full_page=True, clip={"x": 0, "y": top, "width": WIDTH, "height": height})
    Image.open(io.BytesIO(shown)).convert("RGB").save(IMAGES / name, quality=QUALITY, method=6)


def inspected(folder: Path) -> Path:
    """The page of `dcp-zoo inspect` on parts of the photographs, with two wrong labels and two copies."""
    photos = [load_image(path) for path in sample_images()]
    for name, photo in zip(CLASSES, photos, strict=True):
        (folder / name).mkdir(parents=True)
        w = photo.width // 4
        h = photo.height // 4
        for i, (x, y) in enumerate(((0, 0), (w, 0), (0, h), (w, h))):
            photo.crop((x, y, x + 3 * w, y + 3 * h)).save(folder / name / f"{i}.jpg")
    photos[1].save(folder / "cat" / "4.jpg")
    photos[2].save(folder / "lake" / "4.jpg")
    ImageOps.mirror(load_image(str(folder / "otter" / "0.jpg"))).save(folder / "otter" / "web.jpg")
    return inspect(folder).write(str(folder.parent))[0]


if __name__ == "__main__":
    main()
