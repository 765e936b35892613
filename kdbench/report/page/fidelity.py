"""The agreement of methods with their authors' code, read from docs/fidelity.md for the page."""

from dataclasses import dataclass
from pathlib import Path

from kdbench.paths import REPOSITORY

FIDELITY = REPOSITORY / "docs" / "fidelity.md"
"""The document; it exists in a checkout only, because a wheel has no docs."""


@dataclass(frozen=True)
class Fidelity:
    """The parts of the document that the page shows, as plain text."""

    intro: str
    headings: list[str]
    rows: list[list[str]]
    deviations: list[str]


def fidelity(file: Path) -> Fidelity | None:
    """Read the document; return None if it does not exist or has no table."""
    if not file.is_file():
        return None
    lines = [line.replace("`", "") for line in file.read_text(encoding="utf-8").splitlines()]
    table = [line for line in lines if line.startswith("|")]
    if len(table) < 3:
        return None
    before = lines[: lines.index(table[0])]
    headings, _, *rows = [[cell.strip() for cell in row[1:-1].split("|")] for row in table]
    return Fidelity(
        intro=" ".join(line for line in before if line and not line.startswith("#")),
        headings=headings,
        rows=rows,
        deviations=[line[2:].replace("**", "") for line in lines if line.startswith("- **")],
    )
