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
from kdbench.gate.record import Baseline, Entry, Losses, StepFigures

FALSE_ALARM_RATE = 0.01
"""Share of gates in which accuracy, or step times, may fail although nothing changed."""

COMPARED_ROLES = ("student", "ensemble")
"""Roles whose accuracy is compared."""

LOSS_FLOOR = 1e-4
"""Least relative tolerance of losses: ten times the effect of another number of threads."""

STEP_FLOOR = 0.25
"""Least relative tolerance of a ratio of step times; processes differed by up to 13 %."""

MEMORY_MARGIN = 0.5
"""Relative tolerance of the memory that a step adds; processes differed by up to 22 %."""

Verdict = Literal["same", "better", "worse", "changed", "new", "missing", "failed"]
"""Outcome of a comparison. Losses are `changed`, because they have no better or worse."""

REGRESSIONS: frozenset[Verdict] = frozenset({"worse", "changed", "missing", "failed"})


@dataclass(frozen=True)
class Finding:
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
) -> list[Finding]:
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
    findings = [Finding(*key, "method", "missing") for key in expected if key not in entries]
    # Use all methods of the baseline: the spread of a few would be too uncertain.
    spreads = _seed_spreads([e for e in baseline.entries if e.architecture in architectures])
    for key, new in entries.items():
        findings += _unfinished_findings(new)
        old = expected.get(key)
        if old is None:
            findings.append(Finding(*key, "method", "new"))
        else:
            findings += _accuracy_findings(old, new, spreads, len(expected))
            findings += _loss_findings(old, new)
            findings += _cost_findings(old, new, len(expected), counts_bytes)
    return findings


def loss_distance(before: Losses, after: Losses, step: int) -> float:
    """Return the root mean square of the relative differences between the losses of a step."""
    pairs = [(values[step], after[term][step]) for term, values in before.items()]
    squares = [((now - then) / then) ** 2 for then, now in pairs if then]
    return math.sqrt(sum(squares) / len(squares)) if squares else 0.0


def _unfinished_findings(entry: Entry) -> Iterator[Finding]:
    for seed, reason in entry.unfinished.items():
        yield Finding(*entry.key, f"seed {seed}", "failed", now=reason)


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


def _accuracy_findings(
    old: Entry,
    new: Entry,
    spreads: dict[tuple[str, str], tuple[float, int]],
    methods: int,
) -> Iterator[Finding]:
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
        yield Finding(
            *new.key,
            f"{role} top-1 %",
            _verdict(after - before, tolerance),
            f"{before:.2f}",
            f"{after:.2f}",
            "n/a (one seed)" if math.isinf(tolerance) else f"{tolerance:.2f}",
            all(a == b for a, b in pairs),
        )


def _loss_findings(old: Entry, new: Entry) -> Iterator[Finding]:
    seeds = _common_seeds(old, new)
    if not seeds or old.rounding is None:
        return
    pairs = [(old.traces[seed], new.traces[seed]) for seed in seeds]
    training = [(before.losses, after.losses) for before, after in pairs]
    evaluation = [(before.evaluation, after.evaluation) for before, after in pairs]
    yield _loss_finding(new, "training losses", training, old.rounding.losses)
    yield _loss_finding(new, "evaluation losses", evaluation, old.rounding.evaluation)


def _loss_finding(
    new: Entry, name: str, pairs: list[tuple[Losses, Losses]], rounding: list[float]
) -> Finding:
    before, after = (set(losses) for losses in pairs[0])
    if before != after:
        removed, added = (
            ", ".join(sorted(names)) or "none" for names in (before - after, after - before)
        )
        return Finding(*new.key, name, "changed", f"removed: {removed}", f"added: {added}")
    limits = [max(value, LOSS_FLOOR) for value in rounding]
    steps = range(len(limits))
    # A fault moves every seed. Rounding can move one seed far, by flipping a ReLU.
    distances = [min(loss_distance(*pair, step) for pair in pairs) for step in steps]
    worst = max(steps, key=lambda step: distances[step] / limits[step])
    return Finding(
        *new.key,
        f"{name}, step {worst + 1}",
        "changed" if distances[worst] > limits[worst] else "same",
        now=f"{distances[worst]:.1e} off",
        tolerance=f"{limits[worst]:.1e}",
        identical=all(before == after for before, after in pairs),
    )


def _cost_findings(old: Entry, new: Entry, methods: int, counts_bytes: bool) -> Iterator[Finding]:
    if old.training_flops is not None and new.training_flops is not None:
        yield _count_finding(new, "training GFLOP", old.training_flops, new.training_flops)
    if old.step is None or new.step is None:
        return
    if counts_bytes:
        yield _count_finding(new, "GB a step", old.step.bytes, new.step.bytes)
    yield _time_finding(old.step, new.step, new, methods)
    yield _memory_finding(old.step, new.step, new)


def _count_finding(new: Entry, measure: str, before: int, after: int) -> Finding:
    return Finding(
        *new.key,
        measure,
        _verdict(before - after, 0),
        f"{before / 1e9:.3f}",
        f"{after / 1e9:.3f}",
        "0",
        before == after,
    )


def _time_finding(old: StepFigures, new: StepFigures, entry: Entry, methods: int) -> Finding:
    quantile = float(stats.norm.isf(FALSE_ALARM_RATE / methods / 2))
    error = math.hypot(_median_error(old), _median_error(new))
    tolerance = max(quantile * error, STEP_FLOOR * old.ratio.median)
    return Finding(
        *entry.key,
        "step time ratio",
        _verdict(old.ratio.median - new.ratio.median, tolerance),
        f"{old.ratio.median:.3f}",
        f"{new.ratio.median:.3f}",
        f"{tolerance:.3f}",
        old.ratio == new.ratio,
    )


def _memory_finding(old: StepFigures, new: StepFigures, entry: Entry) -> Finding:
    before, after = old.peak_memory_bytes / 2**20, new.peak_memory_bytes / 2**20
    tolerance = MEMORY_MARGIN * before
    return Finding(
        *entry.key,
        "step memory MiB",
        _verdict(before - after, tolerance),
        f"{before:.1f}",
        f"{after:.1f}",
        f"{tolerance:.1f}",
        before == after,
    )


def _median_error(step: StepFigures) -> float:
    """Return the standard error of the median, from quartiles because of outliers."""
    low, high = step.ratio.quartiles
    sd = (high - low) / (2 * stats.norm.ppf(0.75))
    return math.sqrt(math.pi / 2 / step.rounds) * sd


def spread_of_ratio(times: Spread, reference: Spread) -> Spread:
    """Return the ratio of two spreads measured in turn, with the widest possible quartiles."""
    (low, high), (least, most) = times.quartiles, reference.quartiles
    return Spread(median=times.median / reference.median, quartiles=(low / most, high / least))


def _verdict(gain: float, tolerance: float) -> Verdict:
    if abs(gain) <= tolerance:
        return "same"
    return "better" if gain > 0 else "worse"


def _common_seeds(old: Entry, new: Entry) -> list[int]:
    return sorted(old.traces.keys() & new.traces.keys())
