"""Screenshots of the page; running this file writes docs/page-*.png."""

import sys
import tempfile
from pathlib import Path

from browser import opened

from kdbench.report.page.write import write_page

ROOT = Path(__file__).parents[1]
SHOTS = {
    "light": {"viewport": {"width": 1200, "height": 2600}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1200, "height": 2600}, "color_scheme": "dark"},
    "narrow": {"viewport": {"width": 390, "height": 2000}, "color_scheme": "light"},
}


def main(results: Path, docs: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_page(results, None, "baseline", Path(folder))
        for name, context in SHOTS.items():
            with opened(Path(folder) / "index.html", **context) as page:
                page.screenshot(path=docs / f"page-{name}.png")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]) if sys.argv[1:] else (ROOT / "results", ROOT / "docs"))
