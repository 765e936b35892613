"""The distribution of the largest of several correlated t statistics with a common variance."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy import optimize, special, stats


def critical_value(correlation: np.ndarray, df: float, level: float) -> float:
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

    If no seed is missing, comparisons with the same reference are equally correlated and others are
    not correlated; this case is integrated by quadrature. Other correlations are integrated by the
    quasi-Monte Carlo method of SciPy, with a fixed seed.
    """
    blocks = _equicorrelated_blocks(correlation)
    if blocks is not None:
        return _block_cdf(c, blocks, df)
    limit = np.full(len(correlation), c)
    distribution = stats.multivariate_t(
        shape=correlation,
        df=df,  # type: ignore[arg-type]  # may be fractional
        allow_singular=True,
    )
    points = 10_000 * len(correlation)
    return float(distribution.cdf(limit, lower_limit=-limit, random_state=0, maxpts=points))


def _equicorrelated_blocks(correlation: np.ndarray) -> list[tuple[int, float]] | None:
    """Return size and correlation of each block of equally correlated variables.

    None if the matrix does not consist of such blocks with zeros between them.
    """
    blocks, left = [], list(range(len(correlation)))
    while left:
        block = [i for i in left if i == left[0] or abs(correlation[left[0], i]) > 1e-9]
        left = [i for i in left if i not in block]
        inside = correlation[np.ix_(block, block)][~np.eye(len(block), dtype=bool)]
        rho = float(inside[0]) if len(inside) else 0.0
        if np.abs(inside - rho).max(initial=0) > 1e-9 or not 0 <= rho < 1:
            return None
        if np.abs(correlation[np.ix_(block, left)]).max(initial=0) > 1e-9:
            return None
        blocks.append((len(block), rho))
    return blocks


_LEGENDRE = np.polynomial.legendre.leggauss(160)
_HERMITE = np.polynomial.hermite_e.hermegauss(96)


def _block_cdf(c: float, blocks: Sequence[tuple[int, float]], df: float) -> float:
    """Integrate over a common factor z of each block and the scale s = sqrt(chi2_df / df)."""
    nodes, weights = _LEGENDRE
    s = np.sqrt(stats.chi2.ppf((nodes + 1) / 2, df) / df)[:, None]
    z, z_weights = _HERMITE
    inside = np.ones(len(nodes))
    for size, rho in blocks:
        shift, scale = math.sqrt(rho) * z[None], math.sqrt(1 - rho)
        each = special.ndtr((c * s - shift) / scale) - special.ndtr((-c * s - shift) / scale)
        inside *= each**size @ (z_weights / math.sqrt(2 * math.pi))
    return float(inside @ (weights / 2))
