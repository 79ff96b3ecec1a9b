"""Take images/page.png, a screenshot of the web page in Chromium after a photo was captioned by the default model.

python -m images.take_screenshot
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import tyro
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]


def take(output: Path = ROOT / "images" / "page.png", example: str = "cat", port: int = 7861) -> None:
    """Serve the page, choose an example and take a screenshot.

    Args:
        output: the PNG file to write.
        example: the photo in images/ to caption, without its suffix.
        port: the port to serve the page on meanwhile.
    """
    command = [sys.executable, ROOT / "gradio_main.py", "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as server, sync_playwright() as playwright:
        assert server.stdout is not None
        try:
            server.stdout.readline()  # the page's address, once it is served
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            tab = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
            tab.set_default_timeout(300_000)
            tab.goto(f"http://127.0.0.1:{port}")
            tab.locator("#examples button", has=tab.locator(f"img[src*='/{example}.']")).click()
            tab.get_by_text("Probability per word").wait_for()
            tab.locator("#maps .thumbnail-item img").last.wait_for()
            tab.wait_for_timeout(2000)  # for the images to be decoded
            tab.mouse.move(0, 0)
            tab.screenshot(path=output, full_page=True)
            browser.close()
        finally:
            server.terminate()


if __name__ == "__main__":
    tyro.cli(take)
