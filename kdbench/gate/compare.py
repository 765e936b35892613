"""Comparison of new measurements with a baseline, within tolerances.

Tolerances cover variation between seeds, rounding and timing noise. `docs/gate.md` derives them.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from kdbench.bench.record import Spread
from kdbench.gate.record import Baseline, Entry, Losses, StepMeasurement

FALSE_ALARM_RATE = 0.01
"""Share of gates in which accuracy, or step times, may fail although nothing changed."""

COMPARED_ROLES = ("student", "ensemble")
"""Roles whose accuracy is compared."""

MIN_LOSS_TOLERANCE = 1e-4
"""Minimum relative tolerance of losses: ten times the effect of another number of threads."""

MIN_STEP_TIME_TOLERANCE = 0.25
"""Minimum relative tolerance of the ratio of step times; processes differed by up to 13 %."""

MEMORY_TOLERANCE = 0.5
"""Relative tolerance of the memory that a step adds; processes differed by up to 22 %."""

Verdict = Literal["same", "better", "worse", "changed", "new", "missing", "failed"]
"""Outcome of a comparison. Losses are `changed`, because they have no better or worse."""

REGRESSIONS: frozenset[Verdict] = frozenset({"worse", "changed", "missing", "failed"})


@dataclass(frozen=True)
class Comparison:
    """One row of the table: a measure, formatted values and the verdict."""

    architecture: str
    method: str
    measure: str
    verdict: Verdict
    baseline: str = ""
    now: str = ""
    tolerance: str = ""
    identical: bool = False
    """True if both values are equal to the last bit."""


def compare(
    baseline: Baseline, now: Iterable[Entry], methods: set[str] | None, torch: str
) -> list[Comparison]:
    """Compare all measures of all methods with the baseline.

    Args:
        baseline: the stored numbers.
        now: the new numbers.
        methods: names of the methods that were measured; None means all, so that a method of the
            baseline without new numbers is reported as missing.
        torch: version of PyTorch now. Bytes are compared only between equal versions, because
            others may use other operations.
    """
    counts_bytes = torch == baseline.environment.torch
    entries = {entry.key: entry for entry in now}
    architectures = {architecture for architecture, _ in entries}
    expected = {
        entry.key: entry
        for entry in baseline.entries
        if entry.architecture in architectures and (methods is None or entry.method in methods)
    }
    comparisons = [Comparison(*key, "method", "missing") for key in expected if key not in entries]
    # Use all methods of the baseline: the spread of a few would be too uncertain.
    spreads = _seed_spreads([e for e in baseline.entries if e.architecture in architectures])
    for key, new in entries.items():
        comparisons += _report_unfinished(new)
        old = expected.get(key)
        if old is None:
            comparisons.append(Comparison(*key, "method", "new"))
        else:
            comparisons += _compare_accuracy(old, new, spreads, len(expected))
            comparisons += _compare_losses(old, new)
            comparisons += _compare_cost(old, new, len(expected), counts_bytes)
    return comparisons


def loss_distance(before: Losses, after: Losses, step: int) -> float:
    """Return the root mean square of the relative differences between the losses of a step."""
    pairs = [(values[step], after[term][step]) for term, values in before.items()]
    squares = [((now - then) / then) ** 2 for then, now in pairs if then]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def _report_unfinished(entry: Entry) -> Iterator[Comparison]:
    for seed, reason in entry.unfinished.items():
        yield Comparison(*entry.key, f"seed {seed}", "failed", now=reason)


def _seed_spreads(entries: Sequence[Entry]) -> dict[tuple[str, str], tuple[float, int]]:
    """Return the standard deviation of top-1 between seeds, pooled over methods.

    Returns:
        Standard deviation and degrees of freedom by architecture and role.
    """
    squares: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for entry in entries:
        for role in COMPARED_ROLES:
            values = [trace.top1[role] for trace in entry.traces.values() if role in trace.top1]
            if len(values) > 1:
                deviations = float(np.var(values)) * len(values), len(values) - 1
                squares.setdefault((entry.architecture, role), []).append(deviations)
    pooled = {}
    for key, parts in squares.items():
        freedom = sum(df for _, df in parts)
        pooled[key] = math.sqrt(sum(s for s, _ in parts) / freedom), freedom
    return pooled


def _compare_accuracy(
    old: Entry,
    new: Entry,
    spreads: dict[tuple[str, str], tuple[float, int]],
    methods: int,
) -> Iterator[Comparison]:
    seeds = _common_seeds(old, new)
    for role in COMPARED_ROLES:
        pairs = [
            (old.traces[seed].top1[role], new.traces[seed].top1[role])
            for seed in seeds
            if role in old.traces[seed].top1 and role in new.traces[seed].top1
        ]
        if not pairs:
            continue
        before, after = (sum(side) / len(pairs) for side in zip(*pairs, strict=True))
        tolerance = math.inf
        if (old.architecture, role) in spreads:
            sd, freedom = spreads[old.architecture, role]
            alarms = FALSE_ALARM_RATE / (methods * len(COMPARED_ROLES))
            tolerance = stats.t.isf(alarms / 2, freedom) * sd * math.sqrt(2 / len(pairs))
        yield Comparison(
            *new.key,
            f"{role} top-1 %",
            _judge(after - before, tolerance),
            f"{before:.2f}",
            f"{after:.2f}",
            "n/a (one seed)" if math.isinf(tolerance) else f"{tolerance:.2f}",
            all(a == b for a, b in pairs),
        )


def _compare_losses(old: Entry, new: Entry) -> Iterator[Comparison]:
    seeds = _common_seeds(old, new)
    if not seeds or old.rounding is None:
        return
    pairs = [(old.traces[seed], new.traces[seed]) for seed in seeds]
    training = [(before.losses, after.losses) for before, after in pairs]
    evaluation = [(before.evaluation, after.evaluation) for before, after in pairs]
    yield _compare_loss_kind(new, "training losses", training, old.rounding.losses)
    yield _compare_loss_kind(new, "evaluation losses", evaluation, old.rounding.evaluation)


def _compare_loss_kind(
    new: Entry, name: str, pairs: list[tuple[Losses, Losses]], rounding: list[float]
) -> Comparison:
    before, after = (set(losses) for losses in pairs[0])
    if before != after:
        removed, added = (
            ", ".join(sorted(names)) or "none" for names in (before - after, after - before)
        )
        return Comparison(*new.key, name, "changed", f"removed: {removed}", f"added: {added}")
    limits = [max(value, MIN_LOSS_TOLERANCE) for value in rounding]
    steps = range(len(limits))
    # A fault moves every seed. Rounding can move one seed far, by flipping a ReLU.
    distances = [min(loss_distance(*pair, step) for pair in pairs) for step in steps]
    worst = max(steps, key=lambda step: distances[step] / limits[step])
    return Comparison(
        *new.key,
        f"{name}, step {worst + 1}",
        "changed" if distances[worst] > limits[worst] else "same",
        now=f"differs by {distances[worst]:.1e}",
        tolerance=f"{limits[worst]:.1e}",
        identical=all(before == after for before, after in pairs),
    )


def _compare_cost(old: Entry, new: Entry, methods: int, counts_bytes: bool) -> Iterator[Comparison]:
    if old.training_flops is not None and new.training_flops is not None:
        yield _compare_counts(new, "training GFLOP", old.training_flops, new.training_flops)
    if old.step is None or new.step is None:
        return
    if counts_bytes:
        yield _compare_counts(new, "GB per step", old.step.bytes, new.step.bytes)
    yield _compare_time(old.step, new.step, new, methods)
    yield _compare_memory(old.step, new.step, new)


def _compare_counts(new: Entry, measure: str, before: int, after: int) -> Comparison:
    return Comparison(
        *new.key,
        measure,
        _judge(before - after, 0),
        f"{before / 1e9:.3f}",
        f"{after / 1e9:.3f}",
        "0",
        before == after,
    )


def _compare_time(
    old: StepMeasurement, new: StepMeasurement, entry: Entry, methods: int
) -> Comparison:
    quantile = float(stats.norm.isf(FALSE_ALARM_RATE / methods / 2))
    error = math.hypot(_median_error(old), _median_error(new))
    tolerance = max(quantile * error, MIN_STEP_TIME_TOLERANCE * old.ratio.median)
    return Comparison(
        *entry.key,
        "step time ratio",
        _judge(old.ratio.median - new.ratio.median, tolerance),
        f"{old.ratio.median:.3f}",
        f"{new.ratio.median:.3f}",
        f"{tolerance:.3f}",
        old.ratio == new.ratio,
    )


def _compare_memory(old: StepMeasurement, new: StepMeasurement, entry: Entry) -> Comparison:
    before, after = old.peak_memory_bytes / 2**20, new.peak_memory_bytes / 2**20
    tolerance = MEMORY_TOLERANCE * before
    return Comparison(
        *entry.key,
        "step memory MiB",
        _judge(before - after, tolerance),
        f"{before:.1f}",
        f"{after:.1f}",
        f"{tolerance:.1f}",
        before == after,
    )


def _median_error(step: StepMeasurement) -> float:
    """Return the standard error of the median, estimated from quartiles to ignore outliers."""
    low, high = step.ratio.quartiles
    sd = (high - low) / (2 * stats.norm.ppf(0.75))
    return math.sqrt(math.pi / 2 / step.rounds) * sd


def divide_spreads(times: Spread, reference: Spread) -> Spread:
    """Return the ratio of two medians, with the widest quartiles that both spreads allow."""
    (low, high), (reference_low, reference_high) = times.quartiles, reference.quartiles
    return Spread(
        median=times.median / reference.median,
        quartiles=(low / reference_high, high / reference_low),
    )


def _judge(gain: float, tolerance: float) -> Verdict:
    if abs(gain) <= tolerance:
        return "same"
    return "better" if gain > 0 else "worse"


def _common_seeds(old: Entry, new: Entry) -> list[int]:
    return sorted(old.traces.keys() & new.traces.keys())
