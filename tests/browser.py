"""Opens a page in Chromium, without a network; running this file writes docs/page-*.png."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Page, sync_playwright

from kdbench.report.page.write import write_page

ROOT = Path(__file__).parents[1]
WIDE, NARROW = {"width": 1200, "height": 2600}, {"width": 390, "height": 2000}
SHOTS = {"light": ("light", WIDE), "dark": ("dark", WIDE), "narrow": ("light", NARROW)}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = [
    "--no-sandbox",  # as root there is none
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def opened(file: Path, **context: Any) -> Iterator[Page]:
    """The page, and in its lists `complaints` and `requests` what went on since it was opened.

    Complaints are messages on the console, violations of the policy among them, errors and dialogs.
    """
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_context(**context).new_page()
        page.complaints, page.requests = [], []
        page.on("console", lambda message: page.complaints.append(message.text))
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))

        def dismiss(dialog: Any) -> None:
            page.complaints.append(f"dialog: {dialog.message}")
            dialog.dismiss()

        page.on("dialog", dismiss)
        try:
            page.goto(file.as_uri())
            yield page
        finally:
            browser.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_page(ROOT / "results", None, "baseline", Path(folder))
        for name, (scheme, size) in SHOTS.items():
            index = Path(folder) / "index.html"
            with opened(index, viewport=size, color_scheme=scheme) as shown:
                shown.screenshot(path=ROOT / "docs" / f"page-{name}.png")
