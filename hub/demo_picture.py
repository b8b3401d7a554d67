"""Create `hub/space/demo.png`, a screenshot of the demo in Chromium, with the photographs of `hub/predictions.py`.

pip install '.[dev,docs]' && python hub/demo_picture.py
"""

import io
import re
import shutil
import sys
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from predictions import PHOTOS

from dcp_zoo.data.samples import SAMPLE_CLASSES
from dcp_zoo.demo import DEFAULT_HEAD, prepare
from dcp_zoo.demo.session import MAX_PHOTOS

OWN_CLASSES = SAMPLE_CLASSES[:6]
RENAMED = ["tabby cat", "cup of espresso", *OWN_CLASSES[2:]]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TIMEOUT = 300_000  # ms


def fill(page: Page) -> None:
    """Upload the photographs, set the class names, then edit two of them."""
    zone = page.get_by_role("button", name=f"Drop photographs here (up to {MAX_PHOTOS})")
    zone.locator("input[type=file]").set_input_files(PHOTOS[:3])
    page.wait_for_selector(f"h3:has-text('{Path(PHOTOS[2]).name}')")
    names = page.get_by_role("textbox", name="Class names, separated by commas")
    for classes, shown in (OWN_CLASSES, "cat"), (RENAMED, "tabby cat"):
        names.fill(", ".join(classes))
        page.get_by_role("button", name="Use these names").click()
        page.locator(".dcp-bars th", has_text=re.compile(f"^{shown}$")).first.wait_for()
    page.evaluate("window.scrollTo(0, 0)")


def main(output: Path) -> None:
    """Serve the demo, fill it in, and save a screenshot with 128 colours."""
    server, listening = prepare(DEFAULT_HEAD, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 860}, color_scheme="light")
        page.set_default_timeout(TIMEOUT)
        page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}")
        page.wait_for_selector(".dcp-card")
        fill(page)
        screenshot = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    server.should_exit = True
    thread.join()
    screenshot.convert("RGB").quantize(128).save(output, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "space" / "demo.png")
