"""Create `docs/images/demo.webp`, what the demo shows first, and `demo_train.webp`, its trained example, in Chromium.

pip install '.[dev,docs]' && python hub/demo_picture.py
"""

import io
import shutil
import threading
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from walk_pictures import save_picture

from dcp_zoo.demo import DEFAULT_HEAD, demo_server

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TIMEOUT = 300_000  # ms
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def main() -> None:
    """Serve the demo, and save both screenshots."""
    server, listening = demo_server(DEFAULT_HEAD, "127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1020}, color_scheme="light")
        page.set_default_timeout(TIMEOUT)
        page.goto(f"http://127.0.0.1:{listening.getsockname()[1]}")
        page.wait_for_selector(".dcp-card")
        save(page, "demo.webp")
        page.get_by_role("tab", name="Train", exact=True).click()
        page.get_by_role("button", name="Try an example").click()
        page.locator(".dcp-thumbnails img").last.wait_for()
        page.get_by_role("button", name="Train", exact=True).click()
        page.get_by_role("region", name="Predictions for the held-out images").wait_for()
        save(page, "demo_train.webp")
        browser.close()
    server.should_exit = True
    thread.join()


def save(page: Page, name: str) -> None:
    """Save a screenshot of the page at rest."""
    page.wait_for_function("!document.querySelector('.pending')")
    page.wait_for_timeout(1000)  # for the fade to end
    save_picture(Image.open(io.BytesIO(page.screenshot())), IMAGES / name)


if __name__ == "__main__":
    main()
