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


def clashes(table: pd.DataFrame) -> list[str]:
    """A sentence for each suite of a leaderboard whose name stands for several recipes."""
    return [
        f"{count} recipes go by the name '{suite}': tables are told apart by their hash."
        for suite, count in table.groupby("suite").suite_hash.nunique().items()
        if count > 1
    ]


def unequal_seeds(rows: pd.DataFrame) -> list[str]:
    """A sentence for a board that ranks means over unequal numbers of seeds."""
    finished = rows[rows.n > 0]
    most = finished.n.max()
    each = zip(finished.method, finished.n, strict=True)
    fewer = [f"{printable(method)} {n}" for method, n in each if n < most]
    if not fewer:
        return []
    return [f"Ranked by unequal numbers of seeds: {', '.join(fewer)}, the others {most}."]
