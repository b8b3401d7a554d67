"""Create `docs/images/demo_train.webp`, the demo's trained example, and `demo.webp`, its photographs, in
Chromium.

pip install '.[dev,docs]' && python hub/demo_picture.py
"""

import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from space.app import launch

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
TIMEOUT = 300_000  # ms
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def main() -> None:
    """Serve the demo, and save both screenshots."""
    demo = launch(port=0, block=False)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1120, "height": 900}, color_scheme="light")
        page.set_default_timeout(TIMEOUT)
        page.goto(demo.local_url)
        page.get_by_role("tab", name="Classify").click()
        page.get_by_text("wild cat 99 %").wait_for()
        save(page, "demo.webp")
        page.get_by_role("tab", name="Train").click()
        page.get_by_role("button", name="Fill in an example").click()
        page.locator("img").nth(6 * 16 - 1).wait_for()
        page.get_by_role("button", name="Train", exact=True).click()
        page.get_by_text("your head:").wait_for()
        save(page, "demo_train.webp")
        browser.close()
    demo.close()


def save(page: Page, name: str) -> None:
    """Save a screenshot of the page at rest."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(2000)  # for fades to end
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    picture.convert("RGB").save(IMAGES / name, quality=70, method=6)


if __name__ == "__main__":
    main()
