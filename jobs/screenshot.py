"""Makes the README's screenshot: `python jobs/screenshot.py` writes docs/images/page.png.

It opens a running application in headless Chromium, clicks an example (a scene with a question),
asks a second question, and takes the screenshot once both are answered. To start it:

    serve run llava_ray.app:deployment
"""

import shutil
from pathlib import Path
from typing import Annotated

import typer
from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parents[1]
PATIENCE_MS = 120_000
QUIET_MS = 1000
EXAMPLE = 1
QUESTION = "How many objects are there?"


def main(
    url: Annotated[str, typer.Option(help="Address of the page.")] = "http://localhost:8000",
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = ROOT
    / "docs"
    / "images"
    / "page.png",
) -> None:
    """Take a screenshot of the page with two questions answered."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 1100})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        page.locator("#chat .example").first.wait_for()
        page.wait_for_timeout(QUIET_MS)  # Gradio ignores clicks before its handlers are attached
        page.locator("#chat .example").nth(EXAMPLE).click()
        _wait_for_answers(page, 1)
        page.locator("#box textarea").fill(QUESTION)
        page.locator("#box textarea").press("Enter")
        _wait_for_answers(page, 2)
        page.locator("#chat img").first.scroll_into_view_if_needed()
        page.wait_for_timeout(QUIET_MS)
        output.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=output)
        browser.close()
    print(output)


def _wait_for_answers(page: Page, number: int) -> None:
    """Wait until `number` answers are complete: each ends with a line of tokens and seconds."""
    page.locator("#chat small.figures").nth(number - 1).wait_for()
    page.locator("#box button[aria-label=Submit]").wait_for()
    page.wait_for_timeout(QUIET_MS)


if __name__ == "__main__":
    typer.run(main)
