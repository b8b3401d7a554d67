"""Create `docs/images/demo.png`, a screenshot of what the demo shows first, in Chromium.

pip install '.[dev,docs]' && python hub/demo_picture.py
"""

import io
import shutil
import sys
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from dcp_zoo.demo import DIGITS_HEAD, demo_server

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TIMEOUT = 300_000  # ms


def main(output: Path) -> None:
    """Serve the demo, and save a screenshot with 128 colours."""
    server, listening = demo_server(DIGITS_HEAD, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1020}, color_scheme="light")
        page.set_default_timeout(TIMEOUT)
        page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}")
        page.wait_for_selector(".dcp-card")
        page.wait_for_function("!document.querySelector('.pending')")
        page.wait_for_timeout(1000)  # for the fade to end
        screenshot = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    server.should_exit = True
    thread.join()
    screenshot.convert("RGB").quantize(128).save(output, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "docs" / "images" / "demo.png")
