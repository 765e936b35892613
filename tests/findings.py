"""The tables of docs/findings.md, computed from results/; running this file updates them."""

import re
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from statistics import mean, median, stdev

import numpy as np
import pandas as pd
from scipy import stats
from tabulate import tabulate

from kdbench.report.analysis.cost import equal_cost
from kdbench.report.analysis.inference import Comparison, compare_pairs
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.tables.columns import MISSING, interval_text, number_text, p_text
from kdbench.report.tables.published import Source, published_cells, read_published
from kdbench.results.files import load_results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "findings.md"
SUITE = "cifar100-reduced"

Accuracies = Mapping[int, float]
"""Accuracy in percent by seed."""

Rows = dict[str, dict[str, str]]
"""Cells by method and heading."""


def tables(results: Path = ROOT / "results") -> dict[str, str]:
    """Return the tables by the name of their place in the page."""
    found, damaged = load_results(results)
    assert not damaged
    every = runs_frame(found)
    runs, in_bf16 = finished(every, SUITE), finished(every, f"{SUITE}@precision=bf16")
    whole = finished(every, "cifar100@precision=bf16")
    published = [source for source in read_published(results) if isinstance(source, Source)]
    return {
        "sharing": sharing(runs),
        "leader": leader(runs),
        "cost": cost(runs),
        "equal cost": at_equal_cost(equal_cost(found), runs, every),
        "stability": stability(runs),
        "precision": precision(runs, in_bf16),
        "whole schedule": whole_schedule(whole, published),
    }


def finished(runs: pd.DataFrame, suite: str) -> pd.DataFrame:
    """Return the finished runs of a suite, which must be of one version."""
    found = runs[(runs.suite == suite) & (runs.status == "finished")]
    versions = found.groupby("method").method_hash.nunique()
    assert found.suite_hash.nunique() == 1 and versions.max() == 1
    return found


def sharing(runs: pd.DataFrame) -> str:
    """Compare students and ensembles with those of independent networks."""
    controls = ("independent", "baseline")  # they have the same student
    others = [method for method in sorted(set(runs.method)) if method not in controls]
    rows: Rows = {method: {"method": method} for method in others}
    for role in ("student", "ensemble"):
        column = f"{role}_top1"
        values = {method: by_seed(runs, method, column) for method in [*others, "independent"]}
        pairs = [(method, "independent") for method in others if values[method]]
        found = {m: c for (m, _), c in zip(pairs, compare_pairs(values, pairs), strict=True) if c}
        describe(rows, found, f"{role} - independent's")
    return table(rows.values())


def leader(runs: pd.DataFrame) -> str:
    """Compare the network that a method deploys with the mean of its others."""
    roles = ("student_top1", "peers_top1")
    both = {m: [by_seed(runs, m, role) for role in roles] for m in sorted(set(runs.method))}
    found = compared({method: (ours, peers) for method, (ours, peers) in both.items() if peers})
    rows: Rows = {method: {"method": method} for method in found}
    describe(rows, found, "student - peers")
    return table(rows.values())


def compared(values: Mapping[str, tuple[Accuracies, Accuracies]]) -> dict[str, Comparison]:
    """Compare the first with the second accuracies of each method, as one family."""
    named = {(method, place): both[place] for method, both in values.items() for place in (0, 1)}
    found = compare_pairs(named, [((method, 0), (method, 1)) for method in values])
    return {method: each for method, each in zip(values, found, strict=True) if each}


def cost(runs: pd.DataFrame) -> str:
    """Return the costs of each method relative to one network."""
    board = leaderboard(runs).set_index("method").sort_values("cost", kind="stable")
    memory = runs.groupby("method").peak_memory_bytes.median()
    one = board.loc["baseline"]
    shares = {
        "training FLOPs": board.cost,
        "time a step": one.images_per_second / board.images_per_second,
        "peak memory": memory / memory["baseline"],
        "parameters trained": board.parameters_trained / one.parameters_trained,
        "deployed": board.parameters_deployed / one.parameters_deployed,
    }
    rows = [
        {"method": method}
        | {name: number_text(values[method], ".2f") for name, values in shares.items()}
        for method in board.index
    ]
    return table(rows)


def at_equal_cost(found: pd.DataFrame, runs: pd.DataFrame, every: pd.DataFrame) -> str:
    """Compare each method with one network that was trained longer, for equal FLOPs."""
    longer = found[(found.suite == SUITE) & (found.control_epochs > found.epochs)]
    rows: Rows = {}
    for method, epochs in zip(longer.method, longer.control_epochs, strict=True):
        control = finished(every, f"{SUITE}@epochs={epochs:.0f}")
        rows[method] = {
            "method": method,
            "student %": spread(by_seed(runs, method, "student_top1")),
            "baseline %": spread(by_seed(control, "baseline", "student_top1")),
            "its epochs": f"{epochs:.0f}",
        }
    differences = dict(zip(longer.method, longer.difference, strict=True))
    describe(rows, differences, "method - baseline")
    return table(rows.values())


def stability(runs: pd.DataFrame) -> str:
    """Return how alike seeds rank methods (Spearman's rho), and how many pairs all order alike."""
    runs = runs[runs.method != "independent"]  # whose student is that of `baseline`
    accuracies = runs.pivot(index="method", columns="seed", values="student_top1").dropna(axis=1)
    seeds = combinations(accuracies.columns, 2)
    rho = [float(stats.spearmanr(accuracies[a], accuracies[b]).statistic) for a, b in seeds]
    places = {"lowest": min(rho), "median": median(rho), "highest": max(rho)}
    pairs = list(combinations(accuracies.index, 2))
    signs = [np.sign(accuracies.loc[a] - accuracies.loc[b]) for a, b in pairs]
    agreement = {
        "pairs of seeds": str(len(rho)),
        **{place: f"{value:+.2f}" for place, value in places.items()},
        "pairs of methods": str(len(pairs)),
        "of one sign": str(sum(abs(each.sum()) == len(each) for each in signs)),
    }
    return table([agreement])


def precision(runs: pd.DataFrame, in_bf16: pd.DataFrame) -> str:
    """Compare students trained with autocast and without."""
    rows: Rows = {}
    values: dict[str, tuple[Accuracies, Accuracies]] = {}
    for method in sorted(set(in_bf16.method)):
        full, half = (by_seed(part, method, "student_top1") for part in (runs, in_bf16))
        values[method] = half, full
        rows[method] = {"method": method, "fp32": spread(full), "bf16": spread(half)}
    describe(rows, compared(values), "bf16 - fp32")
    return table(rows.values())


def whole_schedule(runs: pd.DataFrame, published: Iterable[Source]) -> str:
    """Return the accuracies of methods and the published numbers of the same recipe."""
    beside = published_cells(list(published), leaderboard(runs))
    theirs = {c["method"]: c["top-1 %"] for c in beside if c["weight decay"] == "0.0001"}
    columns = {
        "student": "student_top1",
        "mean of its peers": "peers_top1",
        "ensemble": "ensemble_top1",
        "student, best epoch on test": "best_on_test_top1",
    }
    rows = [
        {"method": method}
        | {name: spread(by_seed(runs, method, column)) for name, column in columns.items()}
        | {"published, best epoch on test": theirs.get(method, MISSING)}
        for method in sorted(set(runs.method))
    ]
    return table(rows)


def spread(accuracies: Accuracies) -> str:
    values = list(accuracies.values())
    if not values:
        return MISSING
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{deviation} (n = {len(values)})"


def by_seed(runs: pd.DataFrame, method: str, column: str) -> Accuracies:
    rows = runs[(runs.method == method) & runs[column].notna()]
    return dict(zip(rows.seed, rows[column], strict=True))


def describe(rows: Rows, found: Mapping[str, Comparison], heading: str) -> None:
    """Add differences with their intervals and p values to the rows."""
    for method, row in rows.items():
        comparison = found.get(method)
        row[heading] = MISSING
        if comparison:
            row[heading] = f"{comparison.difference:+.2f} ({interval_text(comparison.interval)})"
        row[f"p ({heading.split()[0]})"] = p_text(comparison and comparison.p)


def table(rows: Iterable[Mapping[str, str]]) -> str:
    return tabulate(list(rows), headers="keys", tablefmt="github", disable_numparse=True)


def filled(page: str) -> str:
    """Return the page with the current tables."""
    for name, text in tables().items():
        place = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", flags=re.DOTALL)
        page, places = place.subn(lambda _: f"<!-- {name} -->\n{text}\n<!-- /{name} -->", page)  # noqa: B023
        assert places == 1, f"{PAGE.name} has {places} places for '{name}'"
    return page


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
