"""Paired differences between methods over seeds, with intervals and p values.

Runs with the same seed start from the same weights and see the same images, so differences are
computed seed by seed.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Confidence level of intervals. A difference is significant if p is at most 1 - LEVEL."""

POWER = 0.8
"""Probability with which the number of seeds needed finds a difference of the observed size."""

RESAMPLES = 9999
"""Number of random sign flips; if there are fewer possible ones, all are used."""

MAX_SEEDS = 1000
"""Largest number of seeds that `seeds_needed` considers."""

DECIMALS = 9
"""Decimals to which differences are rounded. Accuracies are counts of images, so differences are
often equal, and rounding errors must not make them differ."""


@dataclass(frozen=True)
class Difference:
    """Difference between two methods over their common seeds.

    Fields are None if there are too few seeds to compute them.
    """

    values: dict[int, float]
    """Differences by seed, in percentage points."""
    mean: float
    sd: float | None
    """Sample standard deviation."""
    interval: tuple[float, float] | None
    """Student's t interval of the mean, exact for normal differences."""
    bootstrap: tuple[float, float] | None
    """Percentile bootstrap interval of the mean, which is too narrow for few seeds."""
    p: float
    """Two-sided p value of the sign-flip test. With n seeds it is at least 2 / 2**n."""

    @property
    def n(self) -> int:
        """Number of common seeds."""
        return len(self.values)


def paired(ours: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Return the paired difference of a method from a reference.

    Args:
        ours: accuracy of the method in percent, by seed.
        reference: accuracy of the reference in percent, by seed.

    Returns:
        The difference, or None if there is no common seed.

    Raises:
        ValueError: An accuracy is not finite.
    """
    seeds = sorted(ours.keys() & reference.keys())
    values = {seed: round(float(ours[seed] - reference[seed]), DECIMALS) for seed in seeds}
    if not values:
        return None
    if not all(map(math.isfinite, values.values())):
        raise ValueError(f"differences must be finite, got {values}")
    sample = np.array(list(values.values()))
    mean = round(float(sample.mean()), DECIMALS)
    if len(sample) == 1:
        return Difference(values, mean, None, None, None, 1.0)
    if np.ptp(sample) == 0:
        sd, interval, bootstrap = 0.0, (mean, mean), (mean, mean)
    else:
        sd = float(sample.std(ddof=1))
        interval = _pair(_student(sample))
        bootstrap = _pair(_bootstrap(sample))
    return Difference(values, mean, sd, interval, bootstrap, float(_sign_flip(sample)))


def holm(ps: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number, in the given order (Holm, 1979)."""
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def seeds_needed(mean: float, sd: float | None, comparisons: int = 1) -> int | None:
    """Return the smallest number of seeds that detects a difference with probability POWER.

    The power is that of a t test. Its significance level is the highest one, not above the adjusted
    level, that a sign-flip test can attain with that number of seeds.

    Args:
        mean: mean difference in percentage points.
        sd: standard deviation of the differences, or None if unknown.
        comparisons: number of comparisons for which p values are adjusted.

    Returns:
        The number of seeds, or None if the standard deviation is unknown, the difference is zero,
        or even MAX_SEEDS seeds are not enough.
    """
    if sd is None or mean == 0:
        return None
    alpha = (1 - LEVEL) / comparisons
    for n in range(2, MAX_SEEDS + 1):
        step = 2 / 2**n
        level = alpha // step * step
        if level > 0 and (sd == 0 or _power(abs(mean) / sd, n, level) >= POWER):
            return n
    return None


def _power(effect: float, n: int, level: float) -> float:
    critical = stats.t.isf(level / 2, n - 1)
    return float(stats.nct.sf(critical, n - 1, effect * math.sqrt(n)))


def _student(samples: np.ndarray) -> Any:
    """Return the t interval of the mean of samples along the last axis."""
    return stats.ttest_1samp(samples, 0, axis=-1).confidence_interval(LEVEL)


def _bootstrap(samples: np.ndarray) -> Any:
    """Return the bootstrap interval of the mean of samples along the last axis."""
    return stats.bootstrap(
        (samples,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
        axis=-1,
    ).confidence_interval


def _sign_flip(samples: np.ndarray) -> np.ndarray:
    """Return the sign-flip p values of samples along the last axis."""
    return stats.permutation_test(
        (samples,),
        _total,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        vectorized=True,
        rng=np.random.default_rng(0),
        axis=-1,
    ).pvalue


def _total(samples: np.ndarray, axis: int) -> np.ndarray:
    return np.round(samples.sum(axis), DECIMALS)


def _pair(interval: Any) -> tuple[float, float]:
    low, high = interval
    return float(low), float(high)
