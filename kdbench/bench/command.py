"""The `kdbench bench` command: builds the methods, times their steps in turn, compares them."""

import statistics
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache

from kdbench.bench.record import Benchmark, Spread, StepCost
from kdbench.bench.roofline import DeviceRates, measure_rates
from kdbench.bench.subject import Subject
from kdbench.data import Images, random_images
from kdbench.discovery import find_methods
from kdbench.engine.compile_mode import Compile, resolve_compile_mode
from kdbench.engine.device import make_accelerator
from kdbench.engine.environment import environment
from kdbench.engine.measure import MemoryMeter, is_out_of_memory
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import Mode
from kdbench.errors import UserError

BATCHES = 8
"""Number of batches of random images. Throughput does not depend on image content."""

Progress = Callable[[str, float], None]
"""Called with a description of the current activity and the share of work done."""

Key = tuple[str, Mode]
"""Method and mode."""

Value = TypeVar("Value")


def bench(
    specs: Sequence[RunSpec],
    compile: Sequence[Compile],
    rounds: int,
    against: str,
    progress: Progress,
    on_message: Callable[[str], None],
    on_failure: Callable[[str], None],
) -> Benchmark:
    """Time the training steps of all specs, one architecture after the other.

    The methods of an architecture are timed in turn, `rounds` times. A method that runs out of
    memory gets no row; `on_failure` is called with a message, and the others are measured.

    Args:
        specs: methods and architectures to measure, under one suite.
        compile: ways of running steps; each gives one row per spec.
        rounds: number of timed windows of each method.
        against: method that ratios refer to.
        progress: called with the activity and the share of work done.
        on_message: called with messages for the user.
        on_failure: called with a message when a method runs out of memory.

    Raises:
        UserError: There are no rounds, or the device does not support a way of running steps.
    """
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, got {rounds}.")
    suite, device = specs[0].suite, make_accelerator().device
    names = list(dict.fromkeys(spec.architecture for spec in specs))
    # `auto` means the mode of a short run, which does not compile.
    short = suite.with_epochs(1)
    modes = {
        name: [resolve_compile_mode(mode, short, name, device) for mode in compile]
        for name in names
    }
    rates = measure_rates(device, suite.precision)
    images = random_images(suite.data, BATCHES * suite.batch_size).to(device)
    rows: list[StepCost] = []
    for index, name in enumerate(names):
        selected = [spec for spec in specs if spec.architecture == name]

        def report(activity: str, share: float, done: int = index, name: str = name) -> None:
            progress(f"{name}: {activity}", (done + share) / len(names))

        rows += _bench_architecture(
            selected, modes[name], images, rounds, against, rates, report, on_message, on_failure
        )
    return Benchmark(
        suite=suite.name,
        batch_size=suite.batch_size,
        against=against,
        rounds=rounds,
        date=datetime.now(UTC).date().isoformat(),
        environment=environment(device, 1, suite.precision, "kdbench bench"),
        bytes_per_second=rates.bytes_per_second,
        flops_per_second=rates.flops_per_second,
        rows=rows,
    )


def _bench_architecture(
    specs: list[RunSpec],
    modes: list[Mode],
    images: Images,
    rounds: int,
    against: str,
    rates: DeviceRates,
    progress: Progress,
    on_message: Callable[[str], None],
    on_failure: Callable[[str], None],
) -> list[StepCost]:
    torch.compiler.reset()
    unless_out_of_memory = partial(
        _unless_out_of_memory, MemoryMeter(images.pixels.device), on_failure
    )
    requested = [(spec, mode) for mode in dict.fromkeys(modes) for spec in specs]
    references = {(s.networks, mode): _reference(s, against) for s, mode in requested}
    todo = {(spec.method_name, mode): (spec, mode) for spec, mode in requested}
    todo |= {(s.method_name, mode): (s, mode) for (_, mode), s in references.items() if s}
    subjects: dict[Key, Subject] = {}
    for index, (key, (spec, mode)) in enumerate(todo.items()):
        progress(f"preparing {spec.method_name} ({mode})", 0.5 * index / len(todo))
        on_fallback = partial(_report_fallback, on_message, spec)
        build = partial(Subject, spec, mode, images, on_fallback)
        subject = unless_out_of_memory(spec, mode, build)
        if subject is not None:
            subjects[key] = subject
    times: dict[Key, list[float]] = {key: [] for key in subjects}
    loading: dict[Key, list[float]] = {key: [] for key in subjects}
    for done in range(rounds):
        progress(f"round {done + 1} of {rounds}", 0.5 + 0.5 * done / rounds)
        for key, subject in list(subjects.items()):
            seconds = unless_out_of_memory(*todo[key], partial(_window, subject))
            if seconds is None:
                del subjects[key]
            else:
                times[key].append(seconds[0])
                loading[key].append(seconds[1])
    rows = []
    for spec, mode in requested:
        key = spec.method_name, mode
        reference = references[spec.networks, mode]
        reference_key = (reference.method_name, mode) if reference else None
        if key in subjects:
            reference_times = times[reference_key] if reference_key in subjects else None
            rows.append(_row(subjects[key], times[key], loading[key], reference_times, rates))
    return rows


def _window(subject: Subject) -> tuple[float, float]:
    """Return the seconds per step, and the seconds per step to make its batch."""
    return subject.train(subject.steps), subject.load(subject.steps)


def _unless_out_of_memory(
    meter: MemoryMeter,
    on_failure: Callable[[str], None],
    spec: RunSpec,
    mode: Mode,
    make: Callable[[], Value],
) -> Value | None:
    """Return what `make` returns, or report that it ran out of memory and return None."""
    try:
        return make()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    peak = f"{meter.peak() / 2**20:,.0f} MiB"
    clear_device_cache(garbage_collection=True)
    on_failure(
        f"'{spec.entry.name}' ({spec.architecture}, {mode}) ran out of memory at batch size "
        f"{spec.suite.batch_size}, peak {peak}; use a suite with a smaller batch_size."
    )
    return None


def _report_fallback(on_message: Callable[[str], None], spec: RunSpec, reason: str) -> None:
    on_message(f"'{spec.entry.name}' {reason}.")


def _reference(spec: RunSpec, against: str) -> RunSpec | None:
    """Return the reference with the same number of networks, or None if it does not support it."""
    (entry,) = find_methods([against])
    default = len(spec.architecture.split("+")) > 1 or spec.networks == spec.suite.networks
    networks = {} if default else {"networks": str(spec.networks)}
    reference = RunSpec(spec.suite, spec.architecture, entry, entry.options(networks), spec.seed)
    supported = entry.method.fixed_networks in (None, spec.networks)
    if not supported or spec.networks < entry.method.minimum_networks:
        return None
    return reference


def _row(
    subject: Subject,
    times: list[float],
    loading: list[float],
    reference: list[float] | None,
    rates: DeviceRates,
) -> StepCost:
    spec, work = subject.spec, subject.work
    median = statistics.median(times)
    ratio = reference and _spread([a / b for a, b in zip(times, reference, strict=True)])
    return StepCost(
        method=spec.method_name,
        architecture=spec.architecture,
        networks=spec.networks,
        views=spec.views,
        step=subject.step.mode,
        milliseconds=_spread([1000 * seconds for seconds in times]),
        images_per_second=spec.suite.batch_size / median,
        ratio=ratio or None,
        data_share=statistics.median(loading) / median,
        peak_memory_bytes=subject.peak_memory_bytes,
        operations=work.operations,
        bytes=work.bytes,
        flops=work.flops,
        floor_milliseconds=1000 * work.min_seconds(rates),
    )


def _spread(values: list[float]) -> Spread:
    if len(values) == 1:
        return Spread(median=values[0], quartiles=(values[0], values[0]))
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=middle, quartiles=(low, high))
