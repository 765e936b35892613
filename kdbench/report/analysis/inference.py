"""Simultaneous comparisons of several methods with one reference.

The accuracies of all methods and seeds are fitted by a linear model with method and seed effects
(a randomised block design), so the residual variance is pooled over all methods. Dunnett's
procedure (Dunnett, JASA 1955) then gives intervals that hold for all comparisons together and p
values adjusted for their number. Seeds that a method lacks are allowed.

Pooling is wrong if the reference varies more between seeds than the other methods do, because the
reference enters every comparison. `compare_with_reference` then uses moderated t tests per pair
(Smyth, SAGMB 2004) with Holm's correction instead.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import optimize, special, stats

from kdbench.report.analysis.statistics import LEVEL, MAX_SEEDS, POWER, holm

VARIANCE_RATIO_LEVEL = 0.05
"""Significance level of the F test that finds the reference to be the more variable."""

Values = Mapping[str, Mapping[int, float]]
"""Accuracy in percent by method and seed."""


@dataclass(frozen=True)
class Comparison:
    """Difference between one method and the reference, in percentage points."""

    mean: float
    """Least-squares estimate; the mean of the paired differences if no seed is missing."""
    standard_error: float
    interval: tuple[float, float]
    """Simultaneous interval of all comparisons (Dunnett), or of this pair alone (moderated t)."""
    p: float
    """Two-sided p value, adjusted for the number of comparisons."""
    df: float
    """Degrees of freedom of the variance."""
    procedure: Literal["dunnett", "moderated t"]


@dataclass(frozen=True)
class _Fit:
    """Least-squares fit of method and seed effects."""

    estimates: np.ndarray
    """Difference from the reference by method, (k,)."""
    covariance: np.ndarray
    """Covariance of the estimates in units of the residual variance, (k, k)."""
    sigma: float
    df: int


def compare_with_reference(values: Values, reference: str) -> dict[str, Comparison]:
    """Compare every method with the reference.

    Args:
        values: accuracy in percent by method and seed.
        reference: name of the method that the others are compared with.

    Returns:
        A comparison for each other method that shares a seed with the reference, provided that
        there are at least two seeds. Empty if nothing can be estimated.
    """
    blocks = _shared_blocks(values, reference)
    if len(blocks) < 2:
        return {}
    if reference_is_more_variable(blocks, reference):
        return _moderated(blocks, reference)
    fit = _fit(blocks, reference)
    if fit is None:
        return {}
    errors = fit.sigma * np.sqrt(np.diag(fit.covariance))
    correlation = _correlation(fit.covariance)
    margin = critical_value(correlation, fit.df) * errors
    names = [name for name in blocks if name != reference]
    return {
        name: Comparison(
            mean=float(estimate),
            standard_error=float(error),
            interval=(float(estimate - width), float(estimate + width)),
            p=_adjusted_p(float(estimate), float(error), correlation, fit.df),
            df=fit.df,
            procedure="dunnett",
        )
        for name, estimate, error, width in zip(names, fit.estimates, errors, margin, strict=True)
    }


def reference_is_more_variable(values: Values, reference: str) -> bool:
    """Return True if the reference varies between seeds by far more than every other method.

    Two conditions must hold: its variance is the largest of all, and an F test of its variance
    against the mean variance of the others is significant at VARIANCE_RATIO_LEVEL.
    """
    variances = {name: np.var(list(v.values()), ddof=1) for name, v in values.items() if len(v) > 1}
    own = variances.pop(reference, None)
    if own is None or not variances or own <= max(variances.values()):
        return False
    df = [len(values[name]) - 1 for name in variances]
    pooled = float(np.average(list(variances.values()), weights=df))
    if pooled == 0:
        return True
    p = stats.f.sf(own / pooled, len(values[reference]) - 1, sum(df))
    return bool(p <= VARIANCE_RATIO_LEVEL)


def critical_value(correlation: np.ndarray, df: float, level: float = LEVEL) -> float:
    """Return the two-sided critical value c with P(max |T_i| <= c) = level."""
    key = tuple(map(tuple, np.round(correlation, 12)))
    return _critical_value(key, float(df), level)


@lru_cache(maxsize=4096)
def _critical_value(correlation: tuple[tuple[float, ...], ...], df: float, level: float) -> float:
    matrix = np.array(correlation)
    low = stats.t.isf((1 - level) / 2, df)  # a single comparison
    high = stats.t.isf((1 - level) / (2 * len(matrix)), df)  # Bonferroni
    if len(matrix) == 1:
        return float(low)

    def excess(c: float) -> float:
        return max_t_cdf(c, matrix, df) - level

    if excess(high) <= 0:  # equal up to the accuracy of the integral
        return float(high)
    return float(optimize.brentq(excess, low * (1 - 1e-6), high, xtol=1e-6))


def max_t_cdf(c: float, correlation: np.ndarray, df: float) -> float:
    """Return P(max |T_i| <= c) for a central multivariate t distribution.

    Equicorrelated T, as complete data give, are integrated by quadrature; other correlations by
    the quasi-Monte Carlo integration of SciPy, with a fixed seed.
    """
    k = len(correlation)
    if k == 1:
        return float(1 - 2 * stats.t.sf(c, df))
    off_diagonal = correlation[~np.eye(k, dtype=bool)]
    if np.ptp(off_diagonal) < 1e-9 and 0 <= off_diagonal[0] < 1:
        return _equicorrelated_cdf(c, k, float(off_diagonal[0]), df)
    limit = np.full(k, c)
    distribution = stats.multivariate_t(
        shape=correlation,
        df=df,  # type: ignore[arg-type]  # may be fractional
        allow_singular=True,
    )
    return float(distribution.cdf(limit, lower_limit=-limit, random_state=0))


_LEGENDRE = np.polynomial.legendre.leggauss(160)
_HERMITE = np.polynomial.hermite_e.hermegauss(96)


def _equicorrelated_cdf(c: float, k: int, rho: float, df: float) -> float:
    """Integrate over the common factor z and over the scale s = sqrt(chi2_df / df)."""
    nodes, weights = _LEGENDRE
    s = np.sqrt(stats.chi2.ppf((nodes + 1) / 2, df) / df)[:, None]
    z, z_weights = _HERMITE
    shift, scale = math.sqrt(rho) * z[None], math.sqrt(1 - rho)
    inside = special.ndtr((c * s - shift) / scale) - special.ndtr((-c * s - shift) / scale)
    over_z = inside**k @ (z_weights / math.sqrt(2 * math.pi))
    return float(over_z @ (weights / 2))


def seeds_needed(difference: float, sigma: float, comparisons: int = 1) -> int | None:
    """Return the smallest number of seeds with which Dunnett's procedure detects a difference.

    Args:
        difference: true difference in percentage points.
        sigma: residual standard deviation of a run.
        comparisons: number of methods compared with the reference.

    Returns:
        The number of seeds with a power of at least POWER, or None if the difference is zero or
        even MAX_SEEDS seeds are not enough.
    """
    if difference == 0:
        return None
    low, high = 1, 2
    while _power(difference, sigma, comparisons, high) < POWER:
        low, high = high, 2 * high
        if high > MAX_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        if _power(difference, sigma, comparisons, middle) >= POWER:
            high = middle
        else:
            low = middle
    return high


def _power(difference: float, sigma: float, comparisons: int, n: int) -> float:
    """Return the power for n seeds of each method and of the reference."""
    if sigma == 0:
        return 1.0
    df = comparisons * (n - 1)
    c = critical_value(np.full((comparisons,) * 2, 0.5) + 0.5 * np.eye(comparisons), df)
    noncentrality = abs(difference) / (sigma * math.sqrt(2 / n))
    return float(stats.nct.sf(c, df, noncentrality) + stats.nct.cdf(-c, df, noncentrality))


def _shared_blocks(values: Values, reference: str) -> dict[str, dict[int, float]]:
    """Return the methods that share a seed with the reference, less seeds of a single method."""
    own = values.get(reference, {})
    kept = {name: dict(runs) for name, runs in values.items() if runs.keys() & own.keys()}
    counts = Counter(seed for runs in kept.values() for seed in runs)
    return {n: {s: v for s, v in runs.items() if counts[s] > 1} for n, runs in kept.items()}


def _fit(values: Values, reference: str) -> _Fit | None:
    """Fit method and seed effects by least squares; None without degrees of freedom."""
    methods = [reference, *(name for name in values if name != reference)]
    seeds = sorted({seed for runs in values.values() for seed in runs})
    rows, accuracies = [], []
    for m, name in enumerate(methods):
        for seed, accuracy in values[name].items():
            row = np.zeros(len(methods) - 1 + len(seeds))
            if m:
                row[m - 1] = 1
            row[len(methods) - 1 + seeds.index(seed)] = 1
            rows.append(row)
            accuracies.append(accuracy)
    design, y = np.array(rows), np.array(accuracies)
    df = len(y) - int(np.linalg.matrix_rank(design))
    if df < 1:
        return None
    inverse = np.linalg.pinv(design.T @ design)
    beta = inverse @ design.T @ y
    residuals = y - design @ beta
    k = len(methods) - 1
    sigma = math.sqrt(float(residuals @ residuals) / df)
    return _Fit(beta[:k], inverse[:k, :k], sigma if sigma > 1e-9 else 0.0, df)


def _correlation(covariance: np.ndarray) -> np.ndarray:
    scale = np.sqrt(np.diag(covariance))
    return covariance / np.outer(scale, scale)


def _adjusted_p(estimate: float, error: float, correlation: np.ndarray, df: float) -> float:
    if error == 0:
        return 1.0 if abs(estimate) < 1e-9 else 0.0
    return min(1.0, max(0.0, 1 - max_t_cdf(abs(estimate) / error, correlation, df)))


def _moderated(values: Values, reference: str) -> dict[str, Comparison]:
    """Compare pair by pair with variances shrunk towards their common value, and Holm's p."""
    own = values[reference]
    pairs = {}
    for name, runs in values.items():
        shared = sorted(runs.keys() & own.keys())
        if name != reference and len(shared) > 1:
            pairs[name] = np.array([runs[s] - own[s] for s in shared])
    variances = np.array([d.var(ddof=1) for d in pairs.values()])
    dfs = np.array([len(d) - 1 for d in pairs.values()])
    prior_df, prior = _variance_prior(variances, dfs)
    found = {}
    for (name, d), own_variance, df in zip(pairs.items(), variances, dfs, strict=True):
        if math.isinf(prior_df):
            variance, total = prior, float(dfs.sum())
        else:
            variance = (prior_df * prior + df * own_variance) / (prior_df + df)
            total = min(prior_df + df, float(dfs.sum()))
        error = math.sqrt(variance / len(d))
        mean = float(d.mean())
        if error == 0:
            p, width = (1.0 if abs(mean) < 1e-9 else 0.0), 0.0
        else:
            p = float(2 * stats.t.sf(abs(mean) / error, total))
            width = float(stats.t.isf((1 - LEVEL) / 2, total)) * error
        found[name] = Comparison(mean, error, (mean - width, mean + width), p, total, "moderated t")
    adjusted = holm([c.p for c in found.values()])
    return {
        name: replace(comparison, p=p)
        for (name, comparison), p in zip(found.items(), adjusted, strict=True)
    }


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
