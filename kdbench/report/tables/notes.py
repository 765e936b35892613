"""Sentences below tables: what a reader must know before believing a rank."""

import pandas as pd

from kdbench.errors import printable


def about(rows: pd.DataFrame) -> list[str]:
    """What suite a board is of, and that a part of its images ranks nothing."""
    known = rows.dropna(subset="description")
    if known.empty:
        return []
    said = f"{known.description.iloc[0]}."
    if not known.all_images.all():
        said += " Reduced to a part of its images, it ranks nothing."
    return [said]


def verdicts(rows: pd.DataFrame, against: str) -> str:
    """Which rows are told apart from `against`, where no column has room to say so."""
    apart = rows[rows.distinguishable.eq(True)]
    words = (
        f"{printable(method)} ({'better' if difference > 0 else 'worse'})"
        for method, difference in zip(apart.method, apart.difference, strict=True)
    )
    if apart.empty:
        return f"No difference from {against} is distinguishable at its number of seeds."
    return f"Distinguishable from {against} at their numbers of seeds: {', '.join(words)}."


def clashes(table: pd.DataFrame) -> list[str]:
    """A sentence for each suite of a leaderboard whose name stands for several recipes."""
    return [
        f"{count} recipes go by the name '{suite}': tables are told apart by their hash."
        for suite, count in table.groupby("suite").suite_hash.nunique().items()
        if count > 1
    ]


def doubts(rows: pd.DataFrame) -> list[str]:
    """A sentence for each thing that keeps rows of a board from being compared."""
    return [*_unequal_seeds(rows), *_several_kinds(rows), *_moved(rows)]


def _several_kinds(rows: pd.DataFrame) -> list[str]:
    if rows.kind[rows.n > 0].nunique() < 2:
        return []
    return [
        "Rows of another precision, other images or another version of the harness are ranked "
        "together; differences are to rows alike."
    ]


def _moved(rows: pd.DataFrame) -> list[str]:
    moved = ", ".join(map(printable, rows.method[rows.unmeasured == "moved"]))
    if not moved:
        return []
    return [f"Trained in several places one after the other, so no rate is its own: {moved}."]


def _unequal_seeds(rows: pd.DataFrame) -> list[str]:
    finished = rows[rows.n > 0]
    most = finished.n.max()
    each = zip(finished.method, finished.n, strict=True)
    fewer = [f"{printable(method)} {n}" for method, n in each if n < most]
    if not fewer:
        return []
    return [f"Ranked by unequal numbers of seeds: {', '.join(fewer)}, the others {most}."]
