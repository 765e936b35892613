"""Locations of the methods, suites and data that ship with kdbench.

In a wheel, `methods` and `suites` are subfolders of the package. In a checkout they are top-level
folders of the repository. They are located by path rather than imported by name, so that a user's
own `methods` or `suites` folder cannot shadow them.
"""

from pathlib import Path

PACKAGE = Path(__file__).parent
REPOSITORY = PACKAGE.parent


def _shipped(folder: str, marker: str) -> Path:
    """Return the folder inside the package (wheel) or next to it (checkout, editable install)."""
    inside = PACKAGE / folder
    return inside if (inside / marker).is_file() else REPOSITORY / folder


METHODS = _shipped("methods", "_template.py")
SUITES = _shipped("suites", "digits.toml")


def built_in_files() -> dict[str, Path]:
    """Return the method files that ship with kdbench, by method name."""
    return {f.stem: f for f in sorted(METHODS.glob("*.py")) if not f.stem.startswith("_")}
