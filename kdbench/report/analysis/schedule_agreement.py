"""Rank correlation of methods between a short schedule and the full one."""

from collections.abc import Iterable

import pandas as pd
from scipy import stats

from kdbench.report.analysis.summary import COMPARABILITY_KEYS, runs_frame
from kdbench.results.schema import Result

MIN_METHODS = 3
"""Least number of methods for a rank correlation."""


def agreement(results: Iterable[Result], short: str, full: str) -> str:
    """Return Spearman's rank correlation between two suites, one line per architecture.

    The correlation is of the students' mean top-1 in the last epoch, over the methods that have
    finished runs under both suites. A line gives the reason if it cannot be computed.
    """
    runs = runs_frame(results)
    runs = runs[runs.status == "finished"]
    for suite in (full, short):
        if not (runs.suite == suite).any():
            return f"n/a: no results of '{suite}'."
    means = runs.groupby(["architecture", "method", "suite"]).student_top1.mean().unstack("suite")
    both = means.dropna(subset=[short, full])
    recipes = runs[runs.suite.isin([short, full])].groupby(["architecture", "suite"])
    mixed = (
        (recipes[["suite_hash", *COMPARABILITY_KEYS]].nunique() > 1)
        .any(axis=1)
        .groupby(level=0)
        .any()
    )
    lines = [
        f"{name}: n/a: results have different recipes, precisions, images or harness versions."
        if mixed[str(name)]
        else _line(str(name), rows[short], rows[full])
        for name, rows in both.groupby(level=0)
    ]
    return "\n".join(lines) or f"n/a: no method has results of '{short}' and of '{full}'."


def _line(architecture: str, short: "pd.Series", full: "pd.Series") -> str:
    if len(short) < MIN_METHODS:
        return f"{architecture}: n/a: {len(short)} methods have both, {MIN_METHODS} are needed."
    correlation = stats.spearmanr(short, full)
    return (
        f"{architecture}: Spearman's rho {correlation.statistic:.2f} "
        f"(p {correlation.pvalue:.2g}) over {len(short)} methods."
    )
