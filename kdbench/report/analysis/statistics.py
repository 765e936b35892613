"""Paired differences between methods over seeds, and what may be concluded from them.

Runs of one seed start from the same weights and see the same images, so differences are taken
seed by seed. Nothing here assumes more than the seeds at hand can show.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.95
"""Of intervals; differences are told apart at 1 - LEVEL."""

POWER = 0.8
"""Chance to find a difference of the size seen, which the number of seeds needed stands for."""

RESAMPLES = 9999
"""Sign flips are all tried where there are no more."""

MOST_SEEDS = 1000

DECIMALS = 9
"""Of percentage points. Accuracies are counts of images, so that differences and their sums are
often equal; what lies beyond is rounding error, which must not part them."""


@dataclass(frozen=True)
class Difference:
    """Of two methods, over the seeds that both have. None is what so few seeds cannot tell."""

    values: dict[int, float]
    """By seed, in percentage points."""
    mean: float
    sd: float | None
    """Sample standard deviation."""
    interval: tuple[float, float] | None
    """Of the mean, by Student's t: exact for normal differences, at any number of seeds."""
    bootstrap: tuple[float, float] | None
    """Of the mean, percentiles over resampled seeds: too narrow for few seeds."""
    p: float
    """Two-sided, of all sign flips: chance of a mean as large if the sign were a coin's. At n
    seeds it cannot be less than 2 / 2**n."""

    @property
    def n(self) -> int:
        return len(self.values)


def paired(ours: Mapping[int, float], reference: Mapping[int, float]) -> Difference | None:
    """Ours minus reference, both by seed in per cent; None where they share no seed.

    Raises:
        ValueError: an accuracy that is no finite number.
    """
    seeds = sorted(ours.keys() & reference.keys())
    values = {seed: round(float(ours[seed] - reference[seed]), DECIMALS) for seed in seeds}
    if not values:
        return None
    if not all(map(math.isfinite, values.values())):
        raise ValueError(f"differences must be finite, not {values}")
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
    """Adjusted for as many comparisons, in the order given (Holm, 1979)."""
    adjusted = [0.0] * len(ps)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = largest
    return adjusted


def seeds_needed(mean: float, sd: float | None, comparisons: int = 1) -> int | None:
    """Seeds at which a difference of this size and spread would be found, POWER of the time.

    None where the spread is unknown, the difference zero, or MOST_SEEDS are too few. By the power
    of a t-test at the level that sign flips of so many seeds attain: their p comes in steps.
    """
    if sd is None or mean == 0:
        return None
    alpha = (1 - LEVEL) / comparisons
    for n in range(2, MOST_SEEDS + 1):
        step = 2 / 2**n
        level = alpha // step * step
        if level > 0 and (sd == 0 or _power(abs(mean) / sd, n, level) >= POWER):
            return n
    return None


def _power(effect: float, n: int, level: float) -> float:
    critical = stats.t.isf(level / 2, n - 1)
    return float(stats.nct.sf(critical, n - 1, effect * math.sqrt(n)))


def _student(samples: np.ndarray) -> Any:
    """Low and high, of samples along the last axis."""
    return stats.ttest_1samp(samples, 0, axis=-1).confidence_interval(LEVEL)


def _bootstrap(samples: np.ndarray) -> Any:
    """As _student."""
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
    """P of samples along the last axis."""
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
