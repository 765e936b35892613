"""Whether a short schedule ranks methods as the full one does."""

from collections.abc import Iterable

import pandas as pd
from scipy import stats

from kdbench.report.analysis.summary import KINDS, runs_frame
from kdbench.results.schema import Result

FEWEST = 3
"""Methods that a rank correlation needs."""


def agreement(results: Iterable[Result], short: str, full: str) -> str:
    """Spearman's rank correlation of the students' mean last-epoch top-1, an architecture a line,
    over the methods that have finished runs under both suites; or why there is none.
    """
    runs = runs_frame(results)
    runs = runs[runs.status == "finished"]
    for suite in (full, short):
        if not (runs.suite == suite).any():
            return f"n/a: no results of '{suite}'."
    means = runs.groupby(["architecture", "method", "suite"]).student_top1.mean().unstack("suite")
    both = means.dropna(subset=[short, full])
    recipes = runs[runs.suite.isin([short, full])].groupby(["architecture", "suite"])
    mixed = (recipes[["suite_hash", *KINDS]].nunique() > 1).any(axis=1).groupby(level=0).any()
    lines = [
        f"{name}: n/a: results are of several recipes, precisions, images or harness versions."
        if mixed[str(name)]
        else _line(str(name), rows[short], rows[full])
        for name, rows in both.groupby(level=0)
    ]
    return "\n".join(lines) or f"n/a: no method has results of '{short}' and of '{full}'."


def _line(architecture: str, short: "pd.Series", full: "pd.Series") -> str:
    if len(short) < FEWEST:
        return f"{architecture}: n/a: {len(short)} methods have both, {FEWEST} are needed."
    found = stats.spearmanr(short, full)
    return (
        f"{architecture}: Spearman's rho {found.statistic:.2f} "
        f"(p {found.pvalue:.2g}) over {len(short)} methods."
    )
