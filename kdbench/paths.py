"""Where methods and suites that ship lie: beside the package.

Found by path, not by import: a package `methods` or `suites` in the user's own project, where
`python -m kdbench` may run, must not hide them.
"""

from pathlib import Path

SHIPPED = Path(__file__).parents[1]
METHODS = SHIPPED / "methods"
SUITES = SHIPPED / "suites"


def built_in_files() -> dict[str, Path]:
    """The method files that ship, by name."""
    return {f.stem: f for f in sorted(METHODS.glob("*.py")) if not f.stem.startswith("_")}
