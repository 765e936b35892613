"""The tables of docs/findings.md, computed from results/; running this file updates them."""

import math
import re
from collections.abc import Iterable, Mapping
from itertools import combinations
from pathlib import Path
from statistics import mean, median, stdev

import pandas as pd
from scipy import stats
from tabulate import tabulate

from kdbench.report.analysis.cost import equal_cost
from kdbench.report.analysis.statistics import LEVEL, Difference, holm, paired
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.tables.columns import MISSING, number_text
from kdbench.report.tables.published import Source, published_cells, read_published
from kdbench.results.files import load_results

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "findings.md"
SUITE = "cifar100-reduced"

Accuracies = Mapping[int, float]
"""Accuracy in percent by seed."""


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
    others = [method for method in sorted(set(runs.method)) if method != "independent"]
    rows: dict[str, dict[str, str]] = {method: {"method": method} for method in others}
    for role in ("student", "ensemble"):
        column = f"{role}_top1"
        reference = by_seed(runs, "independent", column)
        found = {method: paired(by_seed(runs, method, column), reference) for method in others}
        describe(rows, found, f"{role} - independent's")
    return table(rows.values())


def leader(runs: pd.DataFrame) -> str:
    """Compare the network that a method deploys with the mean of its others."""
    found = {
        method: paired(by_seed(runs, method, "student_top1"), by_seed(runs, method, "peers_top1"))
        for method in sorted(set(runs.method))
    }
    found = {method: difference for method, difference in found.items() if difference}
    rows: dict[str, dict[str, str]] = {method: {"method": method} for method in found}
    describe(rows, found, "student - peers")
    return table(rows.values())


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
    rows: dict[str, dict[str, str]] = {}
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
    """How alike two seeds rank the methods (Spearman's rho), and which pairs of methods differ.

    Without `independent`, whose student is that of `baseline`.
    """
    runs = runs[runs.method != "independent"]
    accuracies = runs.pivot(index="method", columns="seed", values="student_top1").dropna(axis=1)
    rho = [
        float(stats.spearmanr(accuracies[one], accuracies[other]).statistic)
        for one, other in combinations(accuracies.columns, 2)
    ]
    places = {"lowest": min(rho), "median": median(rho), "highest": max(rho)}
    agreement = {"pairs of seeds": str(len(rho))} | {k: f"{v:+.2f}" for k, v in places.items()}
    pairs = list(combinations(accuracies.index, 2))
    found = {}
    for a, b in pairs:
        difference = paired(dict(accuracies.loc[a]), dict(accuracies.loc[b]))
        assert difference is not None and difference.interval is not None
        found[f"{a}, {b}"] = difference
    of_one_sign = [d for d in found.values() if abs(sum(map(sign, d.values.values()))) == d.n]
    told = [pair for pair, d in found.items() if not d.interval[0] <= 0 <= d.interval[1]]
    smallest = min(d.p for d in found.values())
    counts = [
        {"of the pairs of methods": "all", "": str(len(pairs))},
        {"of the pairs of methods": "same sign in every seed", "": str(len(of_one_sign))},
        {"of the pairs of methods": f"{LEVEL:.0%} t interval without 0", "": "; ".join(told)},
        {"of the pairs of methods": "smallest p of sign flips", "": f"{smallest:.2f}"},
    ]
    return f"{table([agreement])}\n\n{table(counts)}"


def precision(runs: pd.DataFrame, in_bf16: pd.DataFrame) -> str:
    """Compare students trained with autocast and without."""
    methods = sorted(set(in_bf16.method))
    rows: dict[str, dict[str, str]] = {}
    found = {}
    for method in methods:
        full, half = (by_seed(part, method, "student_top1") for part in (runs, in_bf16))
        found[method] = paired(half, full)
        rows[method] = {"method": method, "fp32": spread(full), "bf16": spread(half)}
    describe(rows, found, "bf16 - fp32")
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


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def spread(accuracies: Accuracies) -> str:
    values = list(accuracies.values())
    if not values:
        return MISSING
    deviation = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean(values):.2f}{deviation} (n = {len(values)})"


def by_seed(runs: pd.DataFrame, method: str, column: str) -> Accuracies:
    rows = runs[(runs.method == method) & runs[column].notna()]
    return dict(zip(rows.seed, rows[column], strict=True))


def describe(
    rows: Mapping[str, dict[str, str]], found: Mapping[str, Difference | None], heading: str
) -> None:
    """Add a difference with its interval and its p, adjusted by Holm, to the rows."""
    known = {method: difference for method, difference in found.items() if difference}
    adjusted = dict(zip(known, holm([d.p for d in known.values()]), strict=True))
    for method, row in rows.items():
        difference = known.get(method)
        row[heading] = MISSING if difference is None else words(difference)
        row[f"p ({heading.split()[0]})"] = f"{adjusted[method]:.2f}" if difference else MISSING


def words(difference: Difference) -> str:
    low, high = difference.interval or (math.nan,) * 2
    return f"{difference.mean:+.2f} [{low:+.2f}, {high:+.2f}]"


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
