"""Create `docs/images/inspection.png`, the page of `dcp-zoo inspect` on parts of the sample photographs, in Chromium.

pip install '.[dev]' && python hub/inspection_picture.py
"""

import io
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image, ImageOps
from playwright.sync_api import sync_playwright

from dcp_zoo import inspect
from dcp_zoo.data import load_image
from dcp_zoo.data.packaged import sample_images

CLASSES = ("cat", "cup of coffee", "otter", "bird of prey", "lake", "flowers")
WIDTH = 620  # pixels
SHOWN = ("Labels that may be wrong", "Bad images")  # from the first of these headings to the second


def main() -> None:
    """Inspect a folder with two wrong labels and two copies, and save a screenshot with 128 colours."""
    with TemporaryDirectory() as temporary:
        folder, photos = Path(temporary) / "MY_PHOTOS", [load_image(path) for path in sample_images()]
        for name, photo in zip(CLASSES, photos, strict=True):
            (folder / name).mkdir(parents=True)
            w, h = photo.width // 4, photo.height // 4
            for i, (x, y) in enumerate(((0, 0), (w, 0), (0, h), (w, h))):
                photo.crop((x, y, x + 3 * w, y + 3 * h)).save(folder / name / f"{i}.jpg")
        photos[1].save(folder / "cat" / "4.jpg")
        photos[2].save(folder / "lake" / "4.jpg")
        ImageOps.mirror(load_image(str(folder / "otter" / "0.jpg"))).save(folder / "otter" / "web.jpg")
        page, _ = inspect(folder).write(temporary)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            view = browser.new_page(viewport={"width": WIDTH, "height": 1200}, color_scheme="light")
            view.goto(page.as_uri())
            top, bottom = (view.get_by_role("heading", name=name).evaluate("e => e.offsetTop") for name in SHOWN)
            shown = view.screenshot(clip={"x": 0, "y": top - 16, "width": WIDTH, "height": bottom - top})
            picture = Image.open(io.BytesIO(shown))
            browser.close()
    picture.convert("RGB").quantize(128).save(
        Path(__file__).parents[1] / "docs" / "images" / "inspection.png", optimize=True
    )


if __name__ == "__main__":
    main()
