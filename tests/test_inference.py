"""Comparisons with a reference: their formulas, edge cases, and error rates under simulation."""

import numpy as np
import pytest
from scipy import stats

from kdbench.report.analysis.inference import (
    compare_with_reference,
    critical_value,
    max_t_cdf,
    reference_is_more_variable,
    seeds_needed,
)
from kdbench.report.analysis.statistics import LEVEL

METHODS = 9
CORRELATION = 0.3
"""Correlation between methods of the accuracies of one seed, in the simulations."""


def equicorrelated(k: int, rho: float = 0.5) -> np.ndarray:
    return np.full((k, k), rho) + (1 - rho) * np.eye(k)


def draw(
    rng: np.random.Generator, n: int, sd: np.ndarray, difference: float = 0.0
) -> dict[str, dict[int, float]]:
    """Draw n seeds of a reference and METHODS others; method m1 differs by `difference`."""
    seed = rng.normal(size=n) * np.sqrt(CORRELATION)
    noise = rng.normal(size=(METHODS + 1, n)) * np.sqrt(1 - CORRELATION)
    accuracy = (seed + noise) * sd[:, None]
    accuracy[1] += difference
    return {f"m{i}": dict(enumerate(row)) for i, row in enumerate(accuracy.tolist())}


# Two-sided 5 % points of Dunnett's table for equal group sizes (Dunnett, Biometrics 1964).
@pytest.mark.parametrize(
    ("k", "df", "expected"),
    [(1, 20, 2.09), (2, 20, 2.38), (3, 20, 2.54), (4, 20, 2.65), (5, 20, 2.73), (9, 20, 2.95)],
)
def test_critical_values_are_those_of_dunnetts_table(k: int, df: int, expected: float):
    assert critical_value(equicorrelated(k), df) == pytest.approx(expected, abs=0.006)


def test_the_quadrature_agrees_with_scipys_multivariate_t():
    for k, df, c in [(2, 2, 4.0), (5, 9, 2.5), (9, 16, 3.0)]:
        limit = np.full(k, c)
        reference = stats.multivariate_t(shape=equicorrelated(k), df=df)
        expected = reference.cdf(limit, lower_limit=-limit, random_state=1, maxpts=200_000)
        assert max_t_cdf(c, equicorrelated(k), df) == pytest.approx(expected, abs=2e-4)


def test_unequal_correlations_are_integrated_too():
    unequal = np.array([[1.0, 0.5, 0.3], [0.5, 1.0, 0.4], [0.3, 0.4, 1.0]])
    bounds = [max_t_cdf(2.5, equicorrelated(3, rho), 8) for rho in (0.3, 0.5)]
    assert bounds[0] < max_t_cdf(2.5, unequal, 8) < bounds[1]


def test_complete_data_give_paired_means_and_the_pooled_variance():
    values = draw(np.random.default_rng(0), 4, np.ones(METHODS + 1), 1.0)
    table = np.array([list(values[f"m{i}"].values()) for i in range(METHODS + 1)])
    residuals = table - table.mean(0) - table.mean(1)[:, None] + table.mean()
    sigma = np.sqrt((residuals**2).sum() / (METHODS * 3))
    comparisons = compare_with_reference(values, "m0")
    assert list(comparisons) == [f"m{i}" for i in range(1, METHODS + 1)]
    critical = critical_value(equicorrelated(METHODS), METHODS * 3)
    for i, comparison in enumerate(comparisons.values(), start=1):
        assert comparison.procedure == "dunnett"
        assert comparison.df == METHODS * 3
        assert comparison.mean == pytest.approx((table[i] - table[0]).mean())
        assert comparison.standard_error == pytest.approx(sigma * np.sqrt(2 / 4))
        low, high = comparison.interval
        assert high - low == pytest.approx(2 * critical * comparison.standard_error)
        assert (comparison.p <= 1 - LEVEL) == (low > 0 or high < 0)


def test_a_single_comparison_is_the_paired_t_test():
    reference = {0: 70.1, 1: 70.9, 2: 69.8}
    method = {0: 71.0, 1: 71.2, 2: 71.1}
    comparison = compare_with_reference({"a": reference, "b": method}, "a")["b"]
    expected = stats.ttest_rel(list(method.values()), list(reference.values()))
    assert comparison.p == pytest.approx(expected.pvalue)
    assert comparison.interval == pytest.approx(tuple(expected.confidence_interval(LEVEL)))


def test_missing_seeds_are_estimated_by_least_squares():
    # Without noise, the fit recovers method effects whatever runs are missing.
    seed = {0: 1.0, 1: -2.0, 2: 0.5, 3: 4.0}
    effect = {"a": 50.0, "b": 52.0, "c": 47.0}
    runs = {"a": (0, 1, 2), "b": (1, 2, 3), "c": (0, 3, 2)}
    values = {m: {s: effect[m] + seed[s] for s in seeds} for m, seeds in runs.items()}
    comparisons = compare_with_reference(values, "a")
    assert comparisons["b"].mean == pytest.approx(2.0)
    assert comparisons["c"].mean == pytest.approx(-3.0)
    noisy = draw(np.random.default_rng(3), 4, np.ones(METHODS + 1))
    del noisy["m2"][1], noisy["m0"][3], noisy["m5"][0]
    assert all(0 <= c.p <= 1 for c in compare_with_reference(noisy, "m0").values())


def test_methods_without_an_estimate_are_left_out():
    assert compare_with_reference({}, "a") == {}
    assert compare_with_reference({"b": {0: 1.0}}, "a") == {}
    assert compare_with_reference({"a": {0: 1.0}, "b": {0: 2.0}}, "a") == {}  # one seed
    assert compare_with_reference({"a": {0: 1.0, 1: 2.0}, "b": {2: 2.0, 3: 1.0}}, "a") == {}
    alone = {"a": {0: 1.0, 1: 2.0}, "b": {0: 2.0, 1: 2.5}, "c": {5: 1.0}}
    assert list(compare_with_reference(alone, "a")) == ["b"]


def test_equal_differences_have_no_variance():
    values = {"a": {0: 1.0, 1: 2.0}, "b": {0: 2.0, 1: 3.0}, "c": {0: 1.0, 1: 2.0}}
    comparisons = compare_with_reference(values, "a")
    assert comparisons["b"].p == 0
    assert comparisons["c"].p == 1
    assert comparisons["b"].interval == pytest.approx((1.0, 1.0))


def test_a_reference_that_varies_most_is_compared_pair_by_pair():
    rng = np.random.default_rng(1)
    sd = np.ones(METHODS + 1)
    assert not reference_is_more_variable(draw(rng, 5, sd), "m0")
    sd[0] = 6
    values = draw(rng, 5, sd)
    assert reference_is_more_variable(values, "m0")
    comparisons = compare_with_reference(values, "m0")
    assert {c.procedure for c in comparisons.values()} == {"moderated t"}
    sd[0], sd[4] = 1, 6  # another method may vary: it enters one comparison only
    assert not reference_is_more_variable(draw(rng, 5, sd), "m0")


def test_seeds_needed_grow_with_comparisons_and_fall_with_the_difference():
    assert seeds_needed(0.0, 1.0) is None
    assert seeds_needed(1.0, 0.0) == 2
    assert seeds_needed(0.001, 1.0) is None
    needed = [seeds_needed(difference, 1.0, METHODS) for difference in (3.0, 2.0, 1.0)]
    assert needed == sorted(needed)
    assert seeds_needed(1.0, 1.0, 1) < seeds_needed(1.0, 1.0, METHODS)


def rates(n: int, repetitions: int, sd: np.ndarray, difference: float = 0.0) -> tuple[float, float]:
    """Return the share of tables with any significant difference, and with m1 significant."""
    rng = np.random.default_rng(n)
    any_method = first = 0
    for _ in range(repetitions):
        found = compare_with_reference(draw(rng, n, sd, difference), "m0")
        significant = [name for name, c in found.items() if c.p <= 1 - LEVEL]
        any_method += bool(significant)
        first += "m1" in significant
    return any_method / repetitions, first / repetitions


@pytest.mark.parametrize(
    ("n", "repetitions"),
    [(3, 300), *(pytest.param(n, 2000, marks=pytest.mark.slow) for n in (3, 4, 5, 6))],
)
def test_error_rates_and_power(n: int, repetitions: int):
    """Simulated rates agree with the expected ones within three binomial standard errors."""
    equal = np.ones(METHODS + 1)
    margin = 3 * np.sqrt(0.05 * 0.95 / repetitions)
    error, _ = rates(n, repetitions, equal)
    assert abs(error - 0.05) < margin
    expected = {3: 0.52, 4: 0.69, 5: 0.82, 6: 0.91}[n]
    _, power = rates(n, repetitions, equal, 2.0)
    assert abs(power - expected) < 3 * np.sqrt(expected * (1 - expected) / repetitions) + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 6])
def test_a_more_variable_reference_stays_near_the_level(n: int):
    ladder = np.array([2.0, *np.linspace(1, 2, METHODS + 1)[:-1]])
    error, _ = rates(n, 2000, ladder)
    assert error < 0.10
