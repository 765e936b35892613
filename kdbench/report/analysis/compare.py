"""Comparison of two states of the results, or of two methods, seed by seed."""

import json
import statistics
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from kdbench.errors import pluralize
from kdbench.report.analysis.comparison_inputs import ComparisonInput, read_comparison_inputs
from kdbench.report.analysis.inference import LEVEL, compare_pairs
from kdbench.report.analysis.protocol import data_versions
from kdbench.report.analysis.summary import EXECUTION_KEYS
from kdbench.report.analysis.verdicts import verdict
from kdbench.report.tables.columns import MISSING, interval_text, number_text, p_text
from kdbench.report.tables.render import titled_table
from kdbench.results.files import DamagedFile
from kdbench.results.schema import Result

Format = Literal["terminal", "markdown", "json"]
Key = tuple[str, str, str, str, str, str, str]
"""Suite, architecture, method, suite hash, precision, images and data, which must be equal for runs
to be compared."""

Runs = Mapping[int, Result]
"""Runs by seed."""

VERDICTS = (
    "better",
    "worse",
    "not distinguishable",
    "identical",
    "no common seed",
    "only in A",
    "only in B",
)
NUMERIC_COLUMNS = 8
"""Number of right-aligned columns."""

UNMATCHED_REASONS = ("another suite hash", "another precision", "other images", "other data")
"""Reasons why only one input has a key, in the order of the key's last parts."""


@dataclass(frozen=True)
class Row:
    """Comparison of B with A: the student in the last epoch, over the common seeds."""

    suite: str
    architecture: str
    method: str
    """Name of the method; empty if two methods are compared."""
    verdict: str
    """One of VERDICTS."""
    a: float | None = None
    """Mean top-1 of A in percent."""
    b: float | None = None
    """Mean top-1 of B in percent."""
    n: int = 0
    """Number of common seeds."""
    difference: float | None = None
    """B - A in percentage points."""
    interval: tuple[float, float] | None = None
    p: float | None = None
    """P value, adjusted for all rows of the same suite, architecture and settings."""
    seeds_needed: int | None = None
    """Number of seeds that would show such a difference, if it is not distinguishable."""
    rate: float | None = None
    """Ratio B / A of images per second; None if the runs were executed differently."""
    memory: float | None = None
    """Ratio B / A of peak memory."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Rows of a comparison, most significant change first."""

    a: str
    b: str
    rows: list[Row]
    damaged: list[DamagedFile]


def compare(a: str, b: str, results: Path) -> Comparison:
    """Compare two results folders, git revisions of `results`, or methods in it.

    Raises:
        UserError: A name is none of these, or the inputs are of different kinds.
    """
    inputs, damaged = read_comparison_inputs((a, b), results)
    versions = iter(data_versions([result for side in inputs for result in side.results]))
    ours, theirs = (_by_key(side, versions) for side in inputs)
    keys = sorted(ours.keys() | theirs.keys())
    rows = {key: _row(key, ours, theirs) for key in keys}
    values: dict[tuple[Key, str], dict[int, float]] = {}
    families: dict[Hashable, list[Key]] = {}
    for key, row in rows.items():
        if row.verdict == "not distinguishable":
            suite, architecture, _, *settings = key
            families.setdefault((suite, architecture, *settings), []).append(key)
            values |= {(key, "a"): _top1(ours[key]), (key, "b"): _top1(theirs[key])}
    for family in families.values():
        found = compare_pairs(values, [((key, "b"), (key, "a")) for key in family])
        for key, comparison in zip(family, found, strict=True):
            assert comparison is not None
            decided = comparison.is_significant
            rows[key] = replace(
                rows[key],
                verdict=verdict(comparison) if decided else rows[key].verdict,
                difference=comparison.difference,
                interval=comparison.interval,
                p=comparison.p,
                seeds_needed=comparison.seeds_needed,
            )
    return Comparison(a, b, sorted(rows.values(), key=_order), damaged)


def render(found: Comparison, form: Format) -> str:
    """Return a table with a summary line, or JSON with unrounded numbers."""
    counts = Counter(row.verdict for row in found.rows)
    if form == "json":
        content = {
            "a": found.a,
            "b": found.b,
            "rows": [asdict(row) for row in found.rows],
            "summary": {verdict: counts[verdict] for verdict in VERDICTS},
        }
        return json.dumps(content, indent=1) + "\n"
    of_methods = not any(row.method for row in found.rows)
    cells = [_cells(row, of_methods) for row in found.rows]
    title = f"A: {found.a}, B: {found.b}"
    table = titled_table(title, cells, form == "markdown", left=len(cells[0]) - NUMERIC_COLUMNS)
    summary = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    return f"{table}\n{summary}\n"


def _cells(row: Row, of_methods: bool) -> dict[str, str]:
    names = {"suite": row.suite, "architecture": row.architecture}
    if not of_methods:
        names["method"] = row.method
    label = row.verdict
    if row.verdict == "not distinguishable":
        label += f" at n = {row.n}"
        label += f" (needs {row.seeds_needed})" if row.seeds_needed else ""
    names["B is"] = ", ".join([label, *row.notes])
    return names | {
        "A %": number_text(row.a, ".2f"),
        "B %": number_text(row.b, ".2f"),
        "B - A": number_text(row.difference, "+.2f"),
        f"{LEVEL:.0%} interval": interval_text(row.interval),
        "p": p_text(row.p),
        "n": str(row.n),
        "images/s": _times(row.rate),
        "memory": _times(row.memory),
    }


def _times(ratio: float | None) -> str:
    return MISSING if ratio is None else f"{ratio:.2f}x"


def _by_key(side: ComparisonInput, versions: Iterator[str]) -> dict[Key, dict[int, Result]]:
    """Return the runs of one input by key; `versions` yields the version of each run's data."""
    found: dict[Key, dict[int, Result]] = {}
    for result in side.results:
        identity = result.identity
        key = (
            identity.suite,
            identity.architecture,
            "" if side.is_method else identity.method,
            identity.suite_hash,
            result.environment.precision,
            str(result.notes.get("images", "")),
            next(versions),
        )
        found.setdefault(key, {})[identity.seed] = result
    return found


def _row(key: Key, ours: Mapping[Key, Runs], theirs: Mapping[Key, Runs]) -> Row:
    suite, architecture, method, *_ = key
    a, b = ours.get(key, {}), theirs.get(key, {})
    row = Row(suite, architecture, method, "no common seed", notes=_unfinished(a, b))
    if not a or not b:
        verdict, others = ("only in A", theirs) if a else ("only in B", ours)
        notes = _unmatched_reasons(key, others) + row.notes
        return replace(row, verdict=verdict, a=_mean(a), b=_mean(b), notes=notes)
    row = replace(row, notes=_version_notes(a, b, of_methods=not method) + row.notes)
    top1 = [_top1(runs) for runs in (a, b)]
    alone = [("A", top1[0].keys() - b.keys()), ("B", top1[1].keys() - a.keys())]
    lost = [f"{pluralize(len(seeds), 'seed')} only in {name}" for name, seeds in alone if seeds]
    row = replace(row, notes=row.notes + lost)
    seeds = top1[0].keys() & top1[1].keys()
    if not seeds:
        rate, memory = _cost_ratios(a, b)
        return replace(row, a=_mean(a), b=_mean(b), rate=rate, memory=memory)
    rate, memory = _cost_ratios(*({seed: runs[seed] for seed in seeds} for runs in (a, b)))
    identical = all(a[s].last == b[s].last and a[s].history == b[s].history for s in seeds)
    return replace(
        row,
        verdict="identical" if identical else "not distinguishable",
        a=statistics.fmean(top1[0][seed] for seed in seeds),
        b=statistics.fmean(top1[1][seed] for seed in seeds),
        n=len(seeds),
        difference=0.0 if identical else None,
        rate=rate,
        memory=memory,
    )


def _order(row: Row) -> tuple[float, float]:
    """Return the key that sorts rows: by p, then by difference; rows without a p come last."""
    if row.p is None:
        return 2 + (row.verdict not in ("identical", "not distinguishable")), 0.0
    return row.p, -abs(row.difference or 0)


def _top1(runs: Runs) -> dict[int, float]:
    finished = {seed: run for seed, run in runs.items() if run.status == "finished"}
    return {seed: run.last["student"].top1 for seed, run in finished.items() if run.last}


def _mean(runs: Runs) -> float | None:
    top1 = _top1(runs).values()
    return statistics.fmean(top1) if top1 else None


def _unmatched_reasons(key: Key, others: Iterable[Key]) -> list[str]:
    """Return in which parts of the key the other input's runs of the same method differ."""
    same = [other[3:] for other in others if other[:3] == key[:3]]
    return [
        why
        for i, why in enumerate(UNMATCHED_REASONS)
        if any(key[3:][i] != other[i] for other in same)
    ]


def _version_notes(a: Runs, b: Runs, of_methods: bool) -> list[str]:
    """Return notes on other reasons why numbers may differ."""
    methods, harnesses = (
        [{version(run) for run in runs.values() if run.status == "finished"} for runs in (a, b)]
        for version in (lambda run: run.identity.method_hash, lambda run: run.harness)
    )
    if not all(methods):  # nothing finished in one of the inputs
        return []
    notes = ["another method hash"] if methods[0] != methods[1] and not of_methods else []
    notes += ["another harness version"] if harnesses[0] != harnesses[1] else []
    for side, *found in zip("AB", methods, harnesses, strict=True):
        notes += [f"more than one version in {side}"] if max(map(len, found)) > 1 else []
    return notes


def _unfinished(a: Runs, b: Runs) -> list[str]:
    return [
        f"{count} {status} in {name}"
        for name, runs in (("A", a), ("B", b))
        for status, count in Counter(run.status for run in runs.values()).items()
        if status != "finished"
    ]


def _cost_ratios(a: Runs, b: Runs) -> tuple[float | None, float | None]:
    """Return the ratios of rates and memory, if all runs were executed alone and alike."""
    costs, ways = [], set()
    for runs in (a, b):
        alone = [r for r in runs.values() if r.status == "finished" and r.is_alone]
        costs.append([run.cost for run in alone if run.cost])
        for made in (run.environment for run in alone):
            ways.add(tuple(getattr(made, name) for name in EXECUTION_KEYS))
    if not all(costs) or len(ways) > 1:
        return None, None
    rates = [[c.images_per_second for c in side if c.images_per_second] for side in costs]
    medians = [statistics.median(side) if side else None for side in rates]
    peaks = [max(cost.peak_memory_bytes for cost in side) for side in costs]
    rate = medians[1] / medians[0] if medians[0] and medians[1] else None
    return rate, peaks[1] / peaks[0] if peaks[0] else None
