"""The verdict on each row of a leaderboard: how its student compares with the reference's."""

import math
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from kdbench.report.analysis.inference import Comparison, compare_pairs

Students = Mapping[int, tuple[float, ...]]
"""Metrics of the student by seed; the first one is top-1."""

VERDICTS = ("", "reference", "identical by construction", "better", "worse", "undecided")
"""Verdicts on a row. It is empty if the row has no common seed with the reference, or a single one
without which nothing can be said."""

STATISTICS = (
    "difference",
    "pairs",
    "difference_low",
    "difference_high",
    "p",
    "sign_flip_p",
    "verdict",
    "seeds_needed",
    "among_best",
)


def compare_rows(frame: pd.DataFrame, students: Sequence[Students]) -> list[dict[str, object]]:
    """Return the comparison of each row with the reference of its kind, if they share seeds."""
    rows: list[dict[str, object]] = [dict.fromkeys(STATISTICS, math.nan) for _ in students]
    for kind in frame.kind.unique():
        family = [i for i, same in enumerate(frame.kind == kind) if same]
        reference = _reference([students[i] for i in family if frame.reference.iloc[i]])
        others = [i for i in family if not frame.reference.iloc[i]]
        for i in family:
            rows[i]["verdict"] = "" if i in others else "reference"
        if not reference:
            continue
        for i in set(family) - set(others):
            rows[i]["difference"] = 0.0
        same = [i for i in others if _is_identical(students[i], reference)]
        for i in same:
            pairs = len(students[i].keys() & reference.keys())
            rows[i] |= {"difference": 0.0, "pairs": pairs, "verdict": "identical by construction"}
        compared = [i for i in others if i not in same]
        values: dict[int, dict[int, float]] = {i: _top1(students[i]) for i in compared}
        values[against := -1] = _top1(reference)
        found = compare_pairs(values, [(i, against) for i in compared])
        for i, comparison in zip(compared, found, strict=True):
            if comparison is not None:
                rows[i] |= _statistics(comparison)
    for row, among in zip(rows, _among_best(frame, students), strict=True):
        row["among_best"] = among
    return rows


def _is_identical(student: Students, reference: Students) -> bool:
    """Return True if the student is the reference's network: all metrics of all seeds are equal."""
    common = student.keys() & reference.keys()
    return bool(common) and all(student[seed] == reference[seed] for seed in common)


def _top1(students: Students) -> dict[int, float]:
    return {seed: metrics[0] for seed, metrics in students.items()}


def _reference(rows: Iterable[Students]) -> dict[int, tuple[float, ...]]:
    """Return the reference's students by seed, without seeds that several versions have."""
    pairs = [pair for row in rows for pair in row.items()]
    seeds = [seed for seed, _ in pairs]
    return {seed: metrics for seed, metrics in pairs if seeds.count(seed) == 1}


def _among_best(frame: pd.DataFrame, students: Sequence[Students]) -> list[float | bool]:
    """Return for each row if it does not differ significantly from the one with the best mean."""
    missing: list[float | bool] = [math.nan] * len(students)
    if frame.student_top1.isna().all() or frame.kind[frame.n > 0].nunique() > 1:
        return missing
    best = int(frame.student_top1.argmax())
    values: dict[int, dict[int, float]] = dict(enumerate(map(_top1, students)))
    others = [i for i in values if i != best and not _is_identical(students[i], students[best])]
    found = dict(zip(others, compare_pairs(values, [(i, best) for i in others]), strict=True))
    if not any(comparison and comparison.is_significant for comparison in found.values()):
        return missing
    return [
        True if i not in found else not c.is_significant if (c := found[i]) else math.nan
        for i in values
    ]


def verdict(comparison: Comparison) -> str:
    """Return one of VERDICTS."""
    if comparison.p is None:
        return ""
    if not comparison.is_significant:
        return "undecided"
    return "better" if comparison.difference > 0 else "worse"


def _statistics(comparison: Comparison) -> dict[str, object]:
    low, high = comparison.interval or (math.nan, math.nan)
    needed, flips, p = comparison.seeds_needed, comparison.sign_flip_p, comparison.p
    return {
        "difference": comparison.difference,
        "pairs": comparison.n,
        "difference_low": low,
        "difference_high": high,
        "p": math.nan if p is None else p,
        "sign_flip_p": math.nan if flips is None else flips,
        "verdict": verdict(comparison),
        "seeds_needed": math.nan if needed is None else needed,
    }
