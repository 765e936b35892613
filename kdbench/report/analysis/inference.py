"""Simultaneous comparisons of methods over seeds.

The accuracies of all methods and seeds are fitted by a linear model with method and seed effects
(a randomised block design), so the residual variance is pooled over all methods. Intervals hold for
all comparisons together and p values are adjusted for their number, by the distribution of the
largest of several correlated t statistics. If all methods are compared with one reference, this is
Dunnett's procedure (Dunnett, JASA 1955). Seeds that a method lacks are allowed.

Pooling is wrong if the references vary more between seeds than the other methods do, because they
enter every comparison. Then each pair has its own t test with a moderated variance (Smyth, SAGMB
2004), and Holm's correction adjusts p.
"""

import itertools
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
from scipy import optimize, special, stats

from kdbench.report.analysis.multivariate_t import critical_value, max_t_cdf

LEVEL = 0.95
"""Confidence level of intervals. A difference is significant if p is at most 1 - LEVEL."""

POWER = 0.8
"""Probability with which the number of seeds needed detects a difference of the observed size."""

MAX_SEEDS = 1000
"""Largest number of seeds that `seeds_needed` considers."""

VARIANCE_RATIO_LEVEL = 0.1
"""Significance level of the F test that finds the references to be the more variable."""

DECIMALS = 9
"""Decimals to which differences are rounded. Accuracies are counts of images, so differences are
often equal, and rounding errors must not make them differ."""

SIGN_FLIPS = 9999
"""Number of random sign flips; if there are fewer possible ones, all are used."""

Accuracies = Mapping[int, float]
"""Accuracy in percent by seed."""

Name = TypeVar("Name", bound=Hashable)
"""Name of a method, or anything else that identifies it."""


@dataclass(frozen=True)
class Comparison:
    """Difference between a method and its reference, in percentage points.

    With a single seed, or without any variation between seeds, only the difference is known.
    """

    difference: float
    """Least-squares estimate; the mean of the paired differences if no seed is missing."""
    n: int
    """Number of common seeds."""
    interval: tuple[float, float] | None = None
    """Simultaneous interval of all comparisons, or of this pair alone (moderated t)."""
    p: float | None = None
    """Two-sided p value, adjusted for the number of comparisons."""
    sigma: float | None = None
    """Residual standard deviation of a run."""
    comparisons: int = 1
    """Number of comparisons of the family."""
    sign_flip_p: float | None = None
    """Two-sided p value of the sign-flip test, adjusted by Holm's correction; None if so few seeds
    cannot reach significance."""
    procedure: Literal["multivariate t", "moderated t"] | None = None

    @property
    def is_significant(self) -> bool:
        """True if the difference is significant."""
        return self.p is not None and self.p <= 1 - LEVEL

    @property
    def seeds_needed(self) -> int | None:
        """Number of seeds that would show such a difference; None if unknown or too many."""
        if self.sigma is None:
            return None
        return seeds_needed(self.difference, self.sigma, self.comparisons)


@dataclass(frozen=True)
class _Fit:
    """Least-squares fit of method and seed effects."""

    effects: np.ndarray
    """Effects of the methods, (m,). Only their differences are determined."""
    covariance: np.ndarray
    """Covariance of the effects in units of the residual variance, (m, m)."""
    sigma: float
    df: int


def compare_pairs(
    values: Mapping[Name, Accuracies], pairs: Sequence[tuple[Name, Name]]
) -> list[Comparison | None]:
    """Compare methods with their references, as one family of comparisons.

    Args:
        values: accuracy in percent by method and seed.
        pairs: method and reference of each comparison.

    Returns:
        One comparison per pair, or None where the pair has no common seed.
    """
    differences = [paired_differences(values[one], values[other]) for one, other in pairs]
    known = [pair for pair, sample in zip(pairs, differences, strict=True) if len(sample)]
    samples = [sample for sample in differences if len(sample)]
    compared = zip(_compare(values, known, samples), _sign_flip_ps(samples), strict=True)
    found = (replace(comparison, sign_flip_p=p) for comparison, p in compared)
    return [next(found) if len(sample) else None for sample in differences]


def paired_differences(ours: Accuracies, reference: Accuracies) -> np.ndarray:
    """Return the differences of the common seeds, in percentage points."""
    return np.array([ours[seed] - reference[seed] for seed in sorted(ours.keys() & reference)])


def _compare(
    values: Mapping[Name, Accuracies],
    pairs: Sequence[tuple[Name, Name]],
    samples: Sequence[np.ndarray],
) -> list[Comparison]:
    plain = [Comparison(round(float(sample.mean()), DECIMALS), len(sample)) for sample in samples]
    methods = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))
    involved = _blocks({method: values[method] for method in methods})
    if references_are_more_variable(involved, {reference for _, reference in pairs}):
        return _moderated(plain, samples)
    fit = _fit(involved)
    if fit is None or fit.sigma == 0:
        return plain
    contrasts = np.zeros((len(pairs), len(methods)))
    for row, (one, other) in zip(contrasts, pairs, strict=True):
        row[methods.index(one)], row[methods.index(other)] = 1, -1
    covariance = contrasts @ fit.covariance @ contrasts.T
    scale = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(scale, scale)
    estimates, errors = contrasts @ fit.effects, fit.sigma * scale
    margins = critical_value(correlation, fit.df, LEVEL) * errors
    return [
        replace(
            comparison,
            difference=round(float(estimate), DECIMALS),
            interval=(float(estimate - margin), float(estimate + margin)),
            p=_clip(1 - max_t_cdf(abs(estimate) / error, correlation, fit.df)),
            sigma=fit.sigma,
            comparisons=len(pairs),
            procedure="multivariate t",
        )
        for comparison, estimate, error, margin in zip(
            plain, estimates, errors, margins, strict=True
        )
    ]


def _clip(p: float) -> float:
    return min(1.0, max(0.0, p))


def references_are_more_variable(values: Mapping[Name, Accuracies], references: set[Name]) -> bool:
    """Return True if the references vary between seeds by far more than every other method.

    Two conditions must hold: their mean variance is the largest of all, and an F test against the
    mean variance of the others is significant at VARIANCE_RATIO_LEVEL.
    """
    own, others = (
        [list(runs.values()) for method, runs in values.items() if (method in references) == part]
        for part in (True, False)
    )
    own, others = ([runs for runs in part if len(runs) > 1] for part in (own, others))
    if not own or not others:
        return False
    (variance, df), (pooled, others_df) = _pooled_variance(own), _pooled_variance(others)
    if variance <= max(np.var(runs, ddof=1) for runs in others):
        return False
    return bool(pooled == 0 or stats.f.sf(variance / pooled, df, others_df) <= VARIANCE_RATIO_LEVEL)


def _pooled_variance(samples: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Return the pooled variance of several samples, and its degrees of freedom."""
    dfs = [len(sample) - 1 for sample in samples]
    variances = [np.var(sample, ddof=1) for sample in samples]
    return float(np.average(variances, weights=dfs)), sum(dfs)


def seeds_needed(difference: float, sigma: float, comparisons: int = 1) -> int | None:
    """Return the smallest number of seeds with which a difference is detected.

    Args:
        difference: true difference in percentage points.
        sigma: residual standard deviation of a run.
        comparisons: number of methods compared with one reference.

    Returns:
        The number of seeds with a power of at least POWER, or None if the difference is zero or
        even MAX_SEEDS seeds are not enough.
    """
    if difference == 0:
        return None
    low, high = 1, 2
    while _power(difference, sigma, comparisons, high) < POWER:
        low, high = high, 2 * high
        if low >= MAX_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if _power(difference, sigma, comparisons, middle) >= POWER:
            high = middle
        else:
            low = middle
    return high if high <= MAX_SEEDS else None


def _power(difference: float, sigma: float, comparisons: int, n: int) -> float:
    """Return the power for n seeds of each method and of the reference."""
    if sigma == 0:
        return 1.0
    df = comparisons * (n - 1)
    c = critical_value(np.full((comparisons,) * 2, 0.5) + 0.5 * np.eye(comparisons), df, LEVEL)
    noncentrality = abs(difference) / (sigma * math.sqrt(2 / n))
    return float(stats.nct.sf(c, df, noncentrality) + stats.nct.cdf(-c, df, noncentrality))


def holm(ps: Sequence[float]) -> list[float]:
    """Return p values adjusted by Holm's correction (Holm, Scand. J. Statist. 1979)."""
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def _sign_flip_ps(samples: Sequence[np.ndarray]) -> list[float | None]:
    """Return adjusted p values of sign-flip tests, None where n seeds cannot reach significance."""
    can_decide = [2 / 2 ** len(sample) * len(samples) <= 1 - LEVEL for sample in samples]
    if not any(can_decide):
        return [None] * len(samples)
    adjusted = holm([sign_flip_p(sample) for sample in samples])
    return [p if can else None for p, can in zip(adjusted, can_decide, strict=True)]


def sign_flip_p(differences: np.ndarray) -> float:
    """Return the two-sided p value of the sign-flip test (Fisher 1935).

    It is the share of the sign flips of the differences whose sum is at least as far from zero.
    """
    if len(differences) < 2:
        return 1.0
    return float(
        stats.permutation_test(
            (differences,),
            lambda sample, axis: np.round(sample.sum(axis), DECIMALS),
            permutation_type="samples",
            n_resamples=SIGN_FLIPS,
            vectorized=True,
            rng=np.random.default_rng(0),
        ).pvalue
    )


def _blocks(values: Mapping[Name, Accuracies]) -> dict[Name, dict[int, float]]:
    """Return the values without seeds that only a single method has."""
    counts = Counter(seed for runs in values.values() for seed in runs)
    return {m: {s: v for s, v in runs.items() if counts[s] > 1} for m, runs in values.items()}


def _fit(values: Mapping[Name, Accuracies]) -> _Fit | None:
    """Fit method and seed effects by least squares; None without degrees of freedom."""
    seeds = sorted({seed for runs in values.values() for seed in runs})
    rows, accuracies = [], []
    for m, runs in enumerate(values.values()):
        for seed, accuracy in runs.items():
            row = np.zeros(len(values) + len(seeds))
            row[m] = row[len(values) + seeds.index(seed)] = 1
            rows.append(row)
            accuracies.append(accuracy)
    design, y = np.array(rows), np.array(accuracies)
    if len(rows) == 0:
        return None
    df = len(y) - int(np.linalg.matrix_rank(design))
    if df < 1:
        return None
    inverse = np.linalg.pinv(design.T @ design)
    beta = inverse @ design.T @ y
    residuals = y - design @ beta
    m = len(values)
    sigma = math.sqrt(float(residuals @ residuals) / df)
    return _Fit(beta[:m], inverse[:m, :m], sigma if sigma > 1e-9 else 0.0, df)


def _moderated(plain: Sequence[Comparison], samples: Sequence[np.ndarray]) -> list[Comparison]:
    """Compare pair by pair with variances shrunk towards their common value, and Holm's p."""
    several = [i for i, sample in enumerate(samples) if len(sample) > 1]
    if not several:
        return list(plain)
    variances = np.array([samples[i].var(ddof=1) for i in several])
    dfs = np.array([len(samples[i]) - 1 for i in several])
    prior_df, prior = _variance_prior(variances, dfs)
    found = list(plain)
    for i, own_variance, df in zip(several, variances, dfs, strict=True):
        if math.isinf(prior_df):
            variance, total = prior, float(dfs.sum())
        else:
            variance = (prior_df * prior + df * own_variance) / (prior_df + df)
            total = min(prior_df + df, float(dfs.sum()))
        mean, error = plain[i].difference, math.sqrt(variance / plain[i].n)
        margin = float(stats.t.isf((1 - LEVEL) / 2, total)) * error
        found[i] = replace(
            plain[i],
            interval=(mean - margin, mean + margin),
            p=float(2 * stats.t.sf(abs(mean) / error, total)),
            sigma=math.sqrt(variance / 2),
            comparisons=len(several),
            procedure="moderated t",
        )
    adjusted = iter(holm([c.p for c in found if c.p is not None]))
    return [c if c.p is None else replace(c, p=next(adjusted)) for c in found]


def _variance_prior(variances: np.ndarray, dfs: np.ndarray) -> tuple[float, float]:
    """Return degrees of freedom and value of the prior variance (Smyth 2004, section 6.2)."""
    positive = variances > 0
    if positive.sum() < 2:
        return math.inf, float(np.average(variances, weights=dfs))
    half = dfs[positive] / 2
    e = np.log(variances[positive]) - special.digamma(half) + np.log(half)
    spread = float(np.mean((e - e.mean()) ** 2) * len(e) / (len(e) - 1))
    excess = spread - float(np.mean(special.polygamma(1, half)))
    if excess <= 0:
        return math.inf, float(np.exp(e.mean()))
    half_df = optimize.brentq(lambda x: special.polygamma(1, x) - excess, 1e-3, 1e6)
    return 2 * half_df, float(np.exp(e.mean() + special.digamma(half_df) - np.log(half_df)))
