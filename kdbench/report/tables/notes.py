"""Notes below tables that a reader needs in order to interpret a rank."""

import pandas as pd

from kdbench.errors import printable
from kdbench.report.analysis.inference import LEVEL
from kdbench.report.tables.columns import BETTER, UNDECIDED, WORSE


def suite_notes(rows: pd.DataFrame) -> list[str]:
    """Return the description of a board's suite, with a note if it uses a part of the images."""
    known = rows.dropna(subset="description")
    if known.empty:
        return []
    note = f"{known.description.iloc[0]}."
    if not known.all_images.all():
        note += " It uses a part of the images, so published accuracies do not compare."
    return [note]


def verdicts(rows: pd.DataFrame, against: str) -> str:
    """Return a sentence on the verdicts, for tables without room for the column."""
    apart = rows[rows.verdict.isin(["better", "worse"])]
    words = (
        f"{printable(method)} ({verdict})"
        for method, verdict in zip(apart.method, apart.verdict, strict=True)
    )
    if apart.empty:
        return f"No difference from {against} is distinguishable at its number of seeds."
    return f"Distinguishable from {against} at their numbers of seeds: {', '.join(words)}."


def legend(rows: pd.DataFrame) -> list[str]:
    """Return a sentence on the symbols of the verdicts that occur in a table."""
    words = {
        "better": f"{BETTER} better",
        "worse": f"{WORSE} worse",
        "undecided": f"{UNDECIDED} not distinguishable, with the number of seeds that would show "
        "such a difference",
    }
    found = [text for name, text in words.items() if (rows.verdict == name).any()]
    return [f"Verdict, with a family-wise error of {1 - LEVEL:.0%}: {'; '.join(found)}."]


def name_collisions(table: pd.DataFrame) -> list[str]:
    """Return a note for each suite name that several recipes share."""
    return [
        f"{count} recipes share the name '{suite}'; tables are distinguished by their hash."
        for suite, count in table.groupby("suite").suite_hash.nunique().items()
        if count > 1
    ]


def caveats(rows: pd.DataFrame) -> list[str]:
    """Return a note for each reason why rows of a board are not fully comparable."""
    return [*_unequal_seeds(rows), *_several_kinds(rows), *_moved(rows)]


def _several_kinds(rows: pd.DataFrame) -> list[str]:
    if rows.kind[rows.n > 0].nunique() < 2:
        return []
    return [
        "Rows with different precision, images, data or harness version are in one table; "
        "differences refer to rows of the same kind."
    ]


def _moved(rows: pd.DataFrame) -> list[str]:
    moved = ", ".join(map(printable, rows.method[rows.unmeasured == "moved"]))
    if not moved:
        return []
    return [f"No throughput, because training moved between machines: {moved}."]


def _unequal_seeds(rows: pd.DataFrame) -> list[str]:
    finished = rows[rows.n > 0]
    most = finished.n.max()
    each = zip(finished.method, finished.n, strict=True)
    fewer = [f"{printable(method)} {n}" for method, n in each if n < most]
    if not fewer:
        return []
    return [f"Numbers of seeds differ: {', '.join(fewer)}, all others {most}."]
