"""The measurements of a gate: accuracies, losses of single steps, and step times."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from rich.console import Console
from rich.progress import Progress

from kdbench.bench.command import bench
from kdbench.bench.record import Benchmark
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError
from kdbench.gate.compare import divide_spreads, loss_distance
from kdbench.gate.record import Entry, Losses, Rounding, StepMeasurement, Trace
from kdbench.launch.execution import Execution
from kdbench.launch.local import execute
from kdbench.launch.plan import PlannedRun, make_specs
from kdbench.results.files import result_path
from kdbench.results.schema import Result
from kdbench.suite.sections import Split
from kdbench.suite.suite import Suite

Key = tuple[str, str]
"""Architecture and method."""

REFERENCE_METHOD = "independent"
"""Method that step times are relative to."""

ROUNDS = 30
"""Timed windows of each method; enough to detect a step 30 % slower on a busy machine."""

STEPS = 8
"""Number of training steps whose losses are compared one by one."""

PERTURBATION = 1e-5
"""Relative change of the learning rate. It moves losses ten times as far as the rounding of
another CPU does (docs/gate.md)."""


def train(specs: Sequence[RunSpec], config: Execution) -> list[Result]:
    """Train all runs, even those that have a result, because the code may have changed.

    Raises:
        UserError: `execute` raises it.
    """
    runs = [PlannedRun(s, result_path(config.results, s.identity()), "to run") for s in specs]
    return execute(runs, replace(config, overwrite=True))


def single_step_suite(suite: Suite) -> Suite:
    """Return the suite with STEPS epochs of one step each, so that a history holds single steps.

    Rounding has hardly changed the losses after so few steps, but the schedule has all its parts:
    warm-up, milestones and ramps. An epoch is as close to one batch as whole classes allow.
    """
    data = suite.data
    images_per_class = math.ceil(suite.batch_size / data.classes)
    splits = {
        "train": _limit_per_class(data.train, images_per_class),
        "test": _limit_per_class(data.test, 1),
    }
    changes = {"data": data.model_copy(update=splits), "name": f"{suite.name}-steps"}
    changes["evaluate_every"] = 1
    return suite.with_epochs(STEPS).model_copy(update=changes)


def perturbed(suite: Suite) -> Suite:
    """Return the suite with a slightly changed learning rate."""
    rate = suite.optimizer.learning_rate * (1 + PERTURBATION)
    recipe = suite.optimizer.model_copy(update={"learning_rate": rate})
    return suite.model_copy(update={"optimizer": recipe})


def with_suite(specs: Sequence[RunSpec], suite: Suite) -> list[RunSpec]:
    """Return the same runs under another suite."""
    return [replace(spec, suite=suite) for spec in specs]


def time_steps(
    specs: Sequence[RunSpec], on_message: Callable[[str], None]
) -> dict[Key, StepMeasurement]:
    """Time eager steps of each method, alternating with steps of REFERENCE_METHOD.

    Raises:
        UserError: A method runs out of memory.
    """
    once = [spec for spec in specs if spec.seed == 0]
    architectures = list(dict.fromkeys(spec.architecture for spec in once))
    names = {spec.method_name for spec in once}
    if REFERENCE_METHOD not in names:
        once += make_specs(once[0].suite, [REFERENCE_METHOD], architectures)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("timing", total=1)

        def show(activity: str, share: float) -> None:
            bar.update(task, description=activity, completed=share)

        def fail(message: str) -> None:
            raise UserError(message)

        benchmark = bench(once, ["off"], ROUNDS, REFERENCE_METHOD, show, on_message, fail)
    return {key: step for key, step in _step_measurements(benchmark).items() if key[1] in names}


def build_entries(
    long: Sequence[Result], short: Sequence[Result], steps: Mapping[Key, StepMeasurement]
) -> list[Entry]:
    """Return one entry per method and architecture.

    Args:
        long: results of the suite's own schedule, which give accuracies.
        short: results of `single_step_suite`, which give the losses of single steps.
        steps: step times and memory.
    """
    runs: dict[Key, list[Result]] = {}
    losses: dict[Key, dict[int, Result]] = {}
    for result in long:
        runs.setdefault(_key_of(result), []).append(result)
    for result in short:
        losses.setdefault(_key_of(result), {})[result.identity.seed] = result
    return [_build_entry(runs[key], losses[key], steps.get(key)) for key in runs]


def add_rounding(entry: Entry, perturbed_results: Sequence[Result]) -> Entry:
    """Return the entry with its rounding tolerance at each step.

    The tolerance is the largest distance, over seeds and earlier steps, between the losses and
    those of a run with a perturbed learning rate. It is at least PERTURBATION.
    """
    others = {
        result.identity.seed: result
        for result in perturbed_results
        if _key_of(result) == entry.key and result.status == "finished"
    }
    seeds = entry.traces.keys() & others.keys()
    losses = [(entry.traces[s].losses, _training_losses(others[s])) for s in seeds]
    evaluation = [(entry.traces[s].evaluation, _evaluation_losses(others[s])) for s in seeds]
    rounding = Rounding(
        losses=_largest_distances(losses), evaluation=_largest_distances(evaluation)
    )
    return entry.model_copy(update={"rounding": rounding})


def _largest_distances(pairs: Sequence[tuple[Losses, Losses]]) -> list[float]:
    largest = (
        max((loss_distance(*pair, step) for pair in pairs), default=0.0) for step in range(STEPS)
    )
    return list(accumulate(largest, max, initial=PERTURBATION))[1:]


def _key_of(result: Result) -> Key:
    return result.identity.architecture, result.identity.method


def _limit_per_class(split: Split, per_class: int) -> Split:
    limit = per_class if split.per_class is None else min(split.per_class, per_class)
    return split.model_copy(update={"per_class": limit})


def _build_entry(
    runs: Sequence[Result], losses: Mapping[int, Result], step: StepMeasurement | None
) -> Entry:
    pairs = [(run, losses[run.identity.seed]) for run in runs]
    finished = [pair for pair in pairs if all(run.status == "finished" for run in pair)]
    flops = {run.cost.training_flops for run, _ in finished if run.cost is not None}
    return Entry(
        architecture=runs[0].identity.architecture,
        method=runs[0].identity.method,
        method_hash=runs[0].identity.method_hash,
        traces={run.identity.seed: _build_trace(run, short) for run, short in finished},
        unfinished={
            run.identity.seed: f"{run.status}: {run.reason}"
            for pair in pairs
            for run in pair
            if run.status != "finished"
        },
        training_flops=next(iter(flops), None),
        step=step,
    )


def _build_trace(run: Result, short: Result) -> Trace:
    assert run.last is not None
    return Trace(
        top1={role: metrics.top1 for role, metrics in run.last.items()},
        losses=_training_losses(short),
        evaluation=_evaluation_losses(short),
    )


def _training_losses(short: Result) -> Losses:
    return _transpose([epoch.losses for epoch in short.history])


def _evaluation_losses(short: Result) -> Losses:
    return _transpose([{r: m.loss for r, m in epoch.metrics.items()} for epoch in short.history])


def _transpose(steps: Sequence[Mapping[str, float]]) -> Losses:
    """Return the values of each name in order, rounded to the precision of float32."""
    return {name: [float(f"{step[name]:.9g}") for step in steps] for name in steps[0]}


def _step_measurements(benchmark: Benchmark) -> dict[tuple[str, str], StepMeasurement]:
    references = {
        row.architecture: row.milliseconds
        for row in benchmark.rows
        if row.method == benchmark.against
    }
    return {
        (row.architecture, row.method): StepMeasurement(
            ratio=row.ratio or divide_spreads(row.milliseconds, references[row.architecture]),
            rounds=benchmark.rounds,
            peak_memory_bytes=row.peak_memory_bytes,
            bytes=row.bytes,
        )
        for row in benchmark.rows
        if row.ratio is not None or row.architecture in references
    }
