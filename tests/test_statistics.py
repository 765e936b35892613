"""Tests of statistics against SciPy, closed forms, brute force and simulations."""

import itertools
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tabulate import tabulate

import kdbench
from kdbench.report.analysis import statistics
from kdbench.report.analysis.statistics import LEVEL, POWER, holm, paired, seeds_needed

SIZES = (3, 5, 10)
DRAWS = 1000
MANY_DRAWS = 20_000
METHODS = 9
EFFECTS = ((2.0, 1), (1.5, 1), (1.0, 1), (0.9, 1), (2.0, METHODS), (1.5, METHODS))
"""Effects in standard deviations, and numbers of comparisons."""
Powers = dict[tuple[float, int], tuple[int, float, float]]
DOCUMENT = Path(kdbench.__file__).parents[1] / "docs" / "statistics.md"


def difference_of(*points: float):
    """Return the difference of a method from a reference with accuracy 0."""
    return paired(dict(enumerate(points)), dict.fromkeys(range(len(points)), 0.0))


def brute_force(counts: list[int]) -> Fraction:
    """Return the p value of all sign flips, computed with integers."""
    sums = [
        sum(sign * count for sign, count in zip(signs, counts, strict=True))
        for signs in itertools.product((1, -1), repeat=len(counts))
    ]
    return Fraction(sum(abs(total) >= abs(sum(counts)) for total in sums), len(sums))


def closed_testing(ps: list[float]) -> list[float]:
    """Return Holm's adjusted p by its definition: Bonferroni on every subset of hypotheses."""
    indices = range(len(ps))
    subsets = [s for r in range(1, len(ps) + 1) for s in itertools.combinations(indices, r)]
    level = {s: min(1.0, len(s) * min(ps[i] for i in s)) for s in subsets}
    return [max(level[s] for s in subsets if i in s) for i in indices]


def test_differences_are_of_common_seeds_and_ours_minus_theirs():
    found = paired({0: 70.0, 2: 71.5, 3: 72.0}, {3: 71.0, 1: 99.0, 2: 71.0})
    assert found.values == {2: 0.5, 3: 1.0}
    assert (found.n, found.mean) == (2, 0.75)
    assert paired({0: 70.0}, {1: 70.0}) is None
    assert paired({}, {}) is None


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_value_that_is_not_an_accuracy_is_refused(wrong):
    with pytest.raises(ValueError, match="finite"):
        paired({0: 70.0, 1: wrong}, {0: 70.0, 1: 70.0})


@pytest.mark.parametrize("n", [2, 3, 5, 10, 20])
def test_statistics_match_their_formulas(n):
    sample = np.random.default_rng(n).normal(0.3, 1.0, n).round(2)
    found = difference_of(*sample)
    mean, sd = sample.sum() / n, math.sqrt(((sample - sample.mean()) ** 2).sum() / (n - 1))
    half = stats.t.ppf((1 + LEVEL) / 2, n - 1) * sd / math.sqrt(n)
    assert found.mean == pytest.approx(mean)
    assert found.sd == pytest.approx(sd)
    assert found.interval == pytest.approx((mean - half, mean + half))


def test_bootstrap_interval_holds_the_percentiles_of_all_resamples():
    """Three seeds have 27 resamples with known means."""
    sample = np.array([0.0, 1.0, 3.0])
    means = [np.mean(resample) for resample in itertools.product(sample, repeat=3)]
    # Of 9,999 draws the percentiles are those of all 27 where none lies near a step.
    exact = np.percentile(means, [2.5, 97.5], method="inverted_cdf")
    assert difference_of(*sample).bootstrap == pytest.approx(exact)


@pytest.mark.parametrize("n", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("total", [None, 0, 1])
def test_p_counts_tied_sign_flips(n, total):
    """Accuracies are multiples of 0.01; rounding errors must not make equal sums differ."""
    generator = np.random.default_rng(n)
    for _ in range(30):
        counts = generator.integers(-9, 10, n)
        if total is not None:
            counts[-1] += total - counts.sum()
        theirs = generator.integers(6900, 7100, n)
        by_seed = [dict(enumerate(hits / 100)) for hits in (theirs + counts, theirs)]
        assert paired(*by_seed).p == pytest.approx(float(brute_force(counts.tolist())))


def test_p_of_many_seeds_is_sampled_and_close_to_the_t_test():
    sample = np.random.default_rng(0).normal(0.4, 1.0, 30)
    exact = stats.ttest_1samp(sample, 0).pvalue
    assert 0.01 < exact < 0.1
    assert difference_of(*sample).p == pytest.approx(exact, abs=0.01)


def test_one_seed_gives_a_mean_without_a_deviation():
    found = difference_of(1.5)
    assert (found.mean, found.sd, found.interval, found.bootstrap) == (1.5, None, None, None)
    assert found.p == 1


@pytest.mark.parametrize("n", [2, 6])
def test_equal_differences_have_no_spread(n):
    found = paired({s: 70.14 + s for s in range(n)}, {s: 70.0 + s for s in range(n)})
    assert (found.mean, found.sd) == (0.14, 0)
    assert found.interval == found.bootstrap == (0.14, 0.14)
    assert found.p == 2 / 2**n


def test_equal_accuracies_are_no_evidence():
    found = difference_of(0.0, 0.0, 0.0)
    assert (found.mean, found.sd, found.interval, found.p) == (0, 0, (0, 0), 1)
    assert difference_of(0.1, 0.2, -0.3).p == 1


def test_statistics_are_deterministic():
    sample = np.random.default_rng(0).normal(size=20)
    assert difference_of(*sample) == difference_of(*sample)


def test_holm_is_closed_testing():
    generator = np.random.default_rng(0)
    for count in (1, 2, 5, 8):
        ps = generator.uniform(0, 0.2, count).round(2).tolist()
        assert holm(ps) == pytest.approx(closed_testing(ps))
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


@pytest.mark.parametrize(("mean", "sd"), [(0.0, 1.0), (1.0, None), (1e-3, 1.0)])
def test_seeds_needed_may_be_unknown_or_too_many(mean, sd):
    assert seeds_needed(mean, sd) is None


@pytest.mark.parametrize(("comparisons", "fewest"), [(1, 6), (9, 9)])
def test_no_fewer_seeds_than_sign_flips_can_decide_among(comparisons, fewest):
    assert seeds_needed(1.0, 0.0, comparisons) == fewest
    assert seeds_needed(-100.0, 1.0, comparisons) == fewest
    assert 2 / 2**fewest <= (1 - LEVEL) / comparisons < 2 / 2 ** (fewest - 1)


@pytest.mark.parametrize("n", SIZES)
def test_the_interval_has_its_nominal_coverage(n, figures):
    assert abs(figures[n]["student"] - LEVEL) < _error(LEVEL, MANY_DRAWS)


@pytest.mark.parametrize("n", SIZES)
def test_the_bootstrap_interval_covers_less_often(n, figures):
    """The interval is close to that of a normal distribution with the population deviation."""
    expected = 1 - 2 * stats.t.sf(stats.norm.ppf((1 + LEVEL) / 2) * math.sqrt((n - 1) / n), n - 1)
    assert figures[n]["bootstrap"] < LEVEL
    assert figures[n]["bootstrap"] == pytest.approx(expected, abs=0.03 + _error(0.9, DRAWS))


@pytest.mark.parametrize("n", SIZES)
def test_the_false_positive_rate_is_at_most_the_level(n, figures):
    """False positives are as rare as the steps of p allow, and at most 1 - LEVEL in all."""
    attained = math.floor((1 - LEVEL) * 2**n / 2) * 2 / 2**n
    assert abs(figures[n]["alone"] - attained) <= _error(attained, DRAWS)
    assert figures[n]["together"] <= 1 - LEVEL + _error(1 - LEVEL, DRAWS)
    if n < 6:
        assert figures[n]["alone"] == figures[n]["together"] == 0


@pytest.mark.parametrize("effect", EFFECTS)
def test_seeds_needed_reach_the_stated_power(effect, powers):
    """One seed fewer is not enough, up to the difference between sign flips and t test."""
    _, fewer, power = powers[effect]
    assert power > POWER - 0.02 - _error(POWER, DRAWS)
    assert fewer < POWER + 0.02 + _error(POWER, DRAWS)


def test_the_statistics_document_matches_the_simulations(figures, powers):
    """If this fails, copy the printed tables to docs/statistics.md."""
    tables = _table(figures), _power_table(powers)
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = re.findall(r"<!-- table -->\n(.*?)\n<!-- /table -->", text, flags=re.DOTALL)
    assert shown == list(tables), "\n\n".join(tables)


@pytest.fixture(scope="module")
def figures() -> dict[int, dict[str, float]]:
    """Return rates of simulated experiments with normal differences, by number of seeds."""
    return {
        n: {
            "student": _coverage(statistics._student, n, MANY_DRAWS),
            "bootstrap": _coverage(statistics._bootstrap, n, DRAWS),
        }
        | _false_positives(n)
        for n in SIZES
    }


@pytest.fixture(scope="module")
def powers() -> Powers:
    """Return for each effect the seeds needed, and the power with one fewer and with these."""
    found = {}
    for effect, compared in EFFECTS:
        n = seeds_needed(effect, 1.0, compared)
        shares = (_found(effect, compared, seeds) for seeds in (n - 1, n))
        found[effect, compared] = (n, *shares)
    return found


def _coverage(interval, n: int, draws: int) -> float:
    """Return the share of intervals that contain the true mean."""
    samples = np.random.default_rng(n).normal(0.5, 1.0, (draws, n))
    parts = [interval(part) for part in np.array_split(samples, math.ceil(draws / 200))]
    return float(np.mean([np.mean((low <= 0.5) & (high >= 0.5)) for low, high in parts]))


def _false_positives(n: int) -> dict[str, float]:
    """Simulate methods that equal the reference they are compared with."""
    accuracies = np.random.default_rng(n).normal(70.0, 1.0, (DRAWS, METHODS + 1, n))
    differences = accuracies[:, 1:] - accuracies[:, :1]
    ps = np.stack([statistics._sign_flip(differences[:, method]) for method in range(METHODS)], 1)
    adjusted = np.array([holm(row) for row in ps.tolist()])
    level = 1 - LEVEL
    return {
        "alone": float(np.mean(ps[:, 0] <= level)),
        "together": float(np.mean((adjusted <= level).any(axis=1))),
    }


def _found(effect: float, compared: int, n: int) -> float:
    """Share of experiments with a difference of this many deviations in which p is small enough to
    be so among as many, by the strictest of Holm's steps.
    """
    samples = np.random.default_rng(n).normal(effect, 1.0, (DRAWS, n))
    return float(np.mean(statistics._sign_flip(samples) <= (1 - LEVEL) / compared))


def _error(share: float, draws: int) -> float:
    """Return four standard errors of a share of the given number of draws."""
    return 4 * math.sqrt(share * (1 - share) / draws)


def _table(figures: dict[int, dict[str, float]]) -> str:
    rows = [
        {
            "seeds": n,
            "t interval covers": f"{row['student']:.1%}",
            "bootstrap covers": f"{row['bootstrap']:.1%}",
            "p <= 0.05 without a difference": f"{row['alone']:.1%}",
            f"the same in any of {METHODS}, Holm": f"{row['together']:.1%}",
            "smallest p": f"{2 / 2**n:.3f}",
        }
        for n, row in figures.items()
    ]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _power_table(powers: Powers) -> str:
    rows = [
        {
            "difference / sd": effect,
            "methods compared": compared,
            "seeds needed": n,
            "found with these": f"{power:.1%}",
            "found with one fewer": f"{fewer:.1%}",
        }
        for (effect, compared), (n, fewer, power) in powers.items()
    ]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
