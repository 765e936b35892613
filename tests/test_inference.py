"""Comparisons over seeds: their formulas, edge cases, and error rates under simulation."""

import itertools
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tabulate import tabulate

import kdbench
from kdbench.report.analysis.inference import (
    LEVEL,
    Comparison,
    _moderated,
    compare_pairs,
    holm,
    references_are_more_variable,
    seeds_needed,
    sign_flip_p,
)
from kdbench.report.analysis.multivariate_t import critical_value, max_t_cdf

METHODS = 9
CORRELATION = 0.3
"""Correlation between methods of the accuracies of one seed, in the simulations."""

PAIRS = [(i, 0) for i in range(1, METHODS + 1)]
EQUAL = np.ones(METHODS + 1)
LADDER = np.array([2.0, *np.linspace(1, 2, METHODS + 1)[:-1]])
"""Standard deviations from 1 to 2, of which the reference has the largest."""

CASES = {
    "equal": EQUAL,
    "from 1 to 2, largest in the reference": LADDER,
    "2 in the reference, 1 in all others": np.array([2.0, *EQUAL[1:]]),
}
PROCEDURES = ("paired t, Holm", "Dunnett", "moderated t, Holm")
SEEDS = (3, 4, 5, 6)
REPETITIONS = 1000
DOCUMENT = Path(kdbench.__file__).parents[1] / "docs" / "statistics.md"


def equicorrelated(k: int, rho: float = 0.5) -> np.ndarray:
    return np.full((k, k), rho) + (1 - rho) * np.eye(k)


def draw(rng: np.random.Generator, n: int, sd: np.ndarray, difference: float = 0.0) -> np.ndarray:
    """Draw n seeds of a reference and METHODS others, of which the first differs."""
    seed = rng.normal(size=n) * np.sqrt(CORRELATION)
    noise = rng.normal(size=(METHODS + 1, n)) * np.sqrt(1 - CORRELATION)
    accuracy = (seed + noise) * sd[:, None]
    accuracy[1] += difference
    return accuracy


def by_seed(table: np.ndarray) -> dict[int, dict[int, float]]:
    return {method: dict(enumerate(row)) for method, row in enumerate(table.tolist())}


def residuals(table: np.ndarray) -> np.ndarray:
    return table - table.mean(0) - table.mean(1)[:, None] + table.mean()


# Two-sided 5 % points of Dunnett's table for equal group sizes (Dunnett, Biometrics 1964).
@pytest.mark.parametrize(
    ("k", "df", "expected"),
    [(1, 20, 2.09), (2, 20, 2.38), (3, 20, 2.54), (4, 20, 2.65), (5, 20, 2.73), (9, 20, 2.95)],
)
def test_critical_values_are_those_of_dunnetts_table(k: int, df: int, expected: float):
    assert critical_value(equicorrelated(k), df, LEVEL) == pytest.approx(expected, abs=0.006)


def test_the_quadrature_agrees_with_scipys_multivariate_t():
    blocks = np.zeros((5, 5))
    blocks[:3, :3], blocks[3:, 3:] = equicorrelated(3), equicorrelated(2)
    cases = (equicorrelated(2), 2, 4.0), (equicorrelated(9), 16, 3.0), (blocks, 8, 2.0)
    for matrix, df, c in cases:
        limit = np.full(len(matrix), c)
        reference = stats.multivariate_t(shape=matrix, df=df)
        expected = reference.cdf(limit, lower_limit=-limit, random_state=1, maxpts=200_000)
        assert max_t_cdf(c, matrix, df) == pytest.approx(expected, abs=2e-4)


def test_unequal_correlations_are_integrated_too():
    unequal = np.array([[1.0, 0.5, 0.3], [0.5, 1.0, 0.4], [0.3, 0.4, 1.0]])
    bounds = [max_t_cdf(2.5, equicorrelated(3, rho), 8) for rho in (0.3, 0.5)]
    assert bounds[0] < max_t_cdf(2.5, unequal, 8) < bounds[1]


def test_complete_data_give_paired_means_and_the_pooled_variance():
    table = draw(np.random.default_rng(0), 4, EQUAL, 1.0)
    sigma = np.sqrt((residuals(table) ** 2).sum() / (METHODS * 3))
    margin = critical_value(equicorrelated(METHODS), METHODS * 3, LEVEL) * sigma * np.sqrt(2 / 4)
    for (i, _), found in zip(PAIRS, compare_pairs(by_seed(table), PAIRS), strict=True):
        difference = (table[i] - table[0]).mean()
        assert (found.n, found.procedure) == (4, "multivariate t")
        assert (found.difference, found.sigma) == pytest.approx((difference, sigma))
        assert found.interval == pytest.approx((difference - margin, difference + margin))
        assert found.is_significant == (abs(difference) > margin)
        assert found.seeds_needed == seeds_needed(found.difference, sigma, METHODS)


def test_a_single_comparison_is_the_paired_t_test():
    reference, method = [70.1, 70.9, 69.8], [71.0, 71.2, 71.1]
    (found,) = compare_pairs(by_seed(np.array([reference, method])), PAIRS[:1])
    expected = stats.ttest_rel(method, reference)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(LEVEL)))


def test_methods_may_have_references_of_their_own():
    """Comparisons without a common method are independent, as Sidak's correction assumes."""
    table = draw(np.random.default_rng(2), 5, EQUAL)[:4]
    first, second = compare_pairs(by_seed(table), [(1, 0), (3, 2)])
    sigma = np.sqrt((residuals(table) ** 2).sum() / 12)
    assert (first.sigma, second.sigma) == pytest.approx((sigma, sigma))
    alone = 2 * stats.t.sf(abs(second.difference) / (sigma * np.sqrt(2 / 5)), 12)
    assert alone < second.p < 1 - (1 - alone) ** 2 + 0.02


def test_missing_seeds_are_estimated_by_least_squares():
    # Without noise, the fit recovers method effects whatever runs are missing.
    seed = {0: 1.0, 1: -2.0, 2: 0.5, 3: 4.0}
    effect = {"a": 50.0, "b": 52.0, "c": 47.0}
    runs = {"a": (0, 1, 2), "b": (1, 2, 3), "c": (0, 3, 2)}
    values = {m: {s: effect[m] + seed[s] for s in seeds} for m, seeds in runs.items()}
    values["a"][0] += 1e-6
    b, c = compare_pairs(values, [("b", "a"), ("c", "a")])
    assert (b.difference, c.difference) == pytest.approx((2.0, -3.0), abs=1e-5)
    assert (b.n, c.n) == (2, 2)
    noisy = by_seed(draw(np.random.default_rng(3), 4, EQUAL))
    del noisy[2][1], noisy[0][3], noisy[5][0]
    assert all(0 <= found.p <= 1 for found in compare_pairs(noisy, PAIRS))


def test_where_there_is_nothing_to_estimate_from_only_the_difference_is_known():
    assert compare_pairs({}, []) == []
    one, other = {0: 1.0, 1: 2.0}, {2: 2.0, 3: 1.0}
    values = {"a": one, "b": {0: 2.0, 1: 2.5}, "c": other}
    known, unknown = compare_pairs(values, [("b", "a"), ("c", "a")])
    assert unknown is None and known.p is not None
    assert compare_pairs(values, [("c", "a")]) == [None]
    for reference in ({0: 0.5}, {0: 0.5, 1: 1.5}):  # a single seed, and no variation
        (found,) = compare_pairs({"a": reference, "b": one}, [("b", "a")])
        assert (found.difference, found.p, found.interval) == (0.5, None, None)
        assert not found.is_significant


def test_references_that_vary_most_are_compared_pair_by_pair():
    rng = np.random.default_rng(1)
    assert not references_are_more_variable(by_seed(draw(rng, 5, EQUAL)), {0})
    values = by_seed(draw(rng, 5, np.array([6, *EQUAL[1:]])))
    assert references_are_more_variable(values, {0})
    found = compare_pairs(values, PAIRS)
    assert {comparison.procedure for comparison in found} == {"moderated t"}
    assert all(low < c.difference < high for c in found for low, high in [c.interval])
    # Another method may vary: it enters one comparison only.
    values = by_seed(draw(rng, 5, np.array([*EQUAL[:4], 6, *EQUAL[5:]])))
    assert not references_are_more_variable(values, {0})


def test_seeds_needed_grow_with_comparisons_and_fall_with_the_difference():
    assert seeds_needed(0.0, 1.0) is seeds_needed(0.001, 1.0) is None
    assert seeds_needed(1.0, 0.0) == 2
    needed = [seeds_needed(difference, 1.0, METHODS) for difference in (3.0, 2.0, 1.0, 0.5, 0.2)]
    assert needed == sorted(needed)
    assert seeds_needed(1.0, 1.0, 1) < seeds_needed(1.0, 1.0, METHODS)


def test_holm_is_closed_testing():
    """Holm's correction equals Bonferroni's on every subset of the hypotheses."""
    generator = np.random.default_rng(0)
    for count in (1, 2, 5, 8):
        ps = generator.uniform(0, 0.2, count).round(2).tolist()
        subsets = [s for r in range(count) for s in itertools.combinations(range(count), r + 1)]
        level = {s: min(1.0, len(s) * min(ps[i] for i in s)) for s in subsets}
        expected = [max(level[s] for s in subsets if i in s) for i in range(count)]
        assert holm(ps) == pytest.approx(expected)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@pytest.mark.parametrize("n", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("total", [None, 0, 1])
def test_sign_flips_count_ties(n, total):
    """Accuracies are multiples of 0.01; rounding errors must not make equal sums differ."""
    generator = np.random.default_rng(n)
    signs = np.array(list(itertools.product((1, -1), repeat=n)))
    for _ in range(10):
        counts = generator.integers(-9, 10, n)
        if total is not None:
            counts[-1] += total - counts.sum()
        theirs = generator.integers(6900, 7100, n)
        expected = (abs(signs @ counts) >= abs(counts.sum())).mean()
        assert sign_flip_p((theirs + counts) / 100 - theirs / 100) == pytest.approx(expected)


@pytest.mark.parametrize(("methods", "fewest"), [(1, 6), (METHODS, 9)])
def test_sign_flips_have_a_p_only_where_they_can_decide(methods, fewest):
    for n in (fewest - 1, fewest):
        table = draw(np.random.default_rng(0), n, EQUAL) + np.array([0, *[9] * METHODS])[:, None]
        found = compare_pairs(by_seed(table), PAIRS[:methods])
        expected = None if n < fewest else pytest.approx(methods * 2 / 2**n)
        assert [comparison.sign_flip_p for comparison in found] == [expected] * methods


def decide(tables: np.ndarray, procedure: str) -> np.ndarray:
    """Return which differences are significant, (tables, METHODS), by one of several procedures."""
    n = tables.shape[2]
    differences = tables[:, 1:] - tables[:, :1]
    if procedure == "paired t, Holm":
        ps = stats.ttest_1samp(differences, 0, axis=2).pvalue
        return np.array([holm(row) for row in ps.tolist()]) <= 1 - LEVEL
    if procedure == "moderated t, Holm":
        found = [_moderated([Comparison(d.mean(), n) for d in rows], rows) for rows in differences]
        return np.array([[comparison.is_significant for comparison in row] for row in found])
    assert procedure == "Dunnett"
    means = tables.mean(2)
    rest = tables - means[:, :, None] - tables.mean(1)[:, None] + tables.mean((1, 2))[:, None, None]
    sigma = np.sqrt((rest**2).sum((1, 2)) / (METHODS * (n - 1)))
    c = critical_value(equicorrelated(METHODS), METHODS * (n - 1), LEVEL)
    bound = c * sigma * np.sqrt(2 / n)
    return np.abs(differences.mean(2)) > bound[:, None]


def decide_by_the_rule(tables: np.ndarray) -> np.ndarray:
    """Return what `compare_pairs` decides; it is called for some tables, to check this function."""
    own = np.array([references_are_more_variable(by_seed(table), {0}) for table in tables])
    found = decide(tables, "Dunnett")
    if own.any():
        found[own] = decide(tables[own], "moderated t, Holm")
    for table, decided in zip(tables[:20], found, strict=False):
        assert [c.is_significant for c in compare_pairs(by_seed(table), PAIRS)] == decided.tolist()
    return found


def simulate(n: int, sd: np.ndarray, difference: float, repetitions: int) -> np.ndarray:
    rng = np.random.default_rng(n)
    return np.stack([draw(rng, n, sd, difference) for _ in range(repetitions)])


def test_error_rate_and_power_of_three_seeds():
    """Simulated rates agree with the expected ones within three binomial standard errors."""
    errors = decide_by_the_rule(simulate(3, EQUAL, 0.0, 400)).any(1).mean()
    power = decide_by_the_rule(simulate(3, EQUAL, 2.0, 400))[:, 0].mean()
    for rate, expected in ((errors, 0.05), (power, 0.5)):
        assert abs(rate - expected) < 3 * np.sqrt(expected * (1 - expected) / 400)


@pytest.mark.slow
def test_the_statistics_document_matches_the_simulations():
    """If this fails, copy the printed table to docs/statistics.md."""
    table = simulated_table()
    page = DOCUMENT.read_text(encoding="utf-8")
    (shown,) = re.findall(r"<!-- table -->\n(.*?)\n<!-- /table -->", page, re.DOTALL)
    numbers = [np.array(re.findall(r"\.\d+", text), float) for text in (shown, table)]
    assert numbers[0] == pytest.approx(numbers[1], abs=0.0021), table
    assert re.sub(r"\.\d+", "", shown) == re.sub(r"\.\d+", "", table)


def simulated_table() -> str:
    """Return how many leaderboards have a false difference; and find one of two deviations."""
    procedures = {name: partial(decide, procedure=name) for name in PROCEDURES}
    procedures["kdbench"] = decide_by_the_rule
    tables = {
        (n, case): simulate(n, sd, 2.0 if case == "2 sd" else 0.0, REPETITIONS)
        for n in SEEDS
        for case, sd in {**CASES, "2 sd": EQUAL}.items()
    }
    rows = []
    for case in CASES:
        for name, procedure in procedures.items():
            row = {"standard deviations": case, "procedure": name}
            for n in SEEDS:
                rates = [procedure(tables[n, case]).any(1).mean()]
                if case == "equal":
                    rates.append(procedure(tables[n, "2 sd"])[:, 0].mean())
                row[f"n = {n}"] = "; ".join(f"{rate:.3f}".lstrip("0") for rate in rates)
            rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
