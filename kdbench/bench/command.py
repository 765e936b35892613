"""What `kdbench bench` does: build, time in turn, compare."""

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
"""Of random images: throughput does not depend on what they show."""

Progress = Callable[[str, float], None]
"""Told what is being done, and which share of all is."""

Key = tuple[str, Mode]
"""Method and mode."""

Made = TypeVar("Made")


def bench(
    specs: Sequence[RunSpec],
    compile: Sequence[Compile],
    rounds: int,
    against: str,
    progress: Progress,
    on_message: Callable[[str], None],
    on_failure: Callable[[str], None],
) -> Benchmark:
    """Time the steps of all specs, an architecture after the other, all its methods in turn.

    What runs out of memory has no row, `on_failure` is told, and the others are measured.

    Raises:
        UserError: no rounds, or a way of running steps that this device does not offer.
    """
    if rounds < 1:
        raise UserError(f"--rounds must be at least 1, not {rounds}.")
    suite, device = specs[0].suite, make_accelerator().device
    names = list(dict.fromkeys(spec.architecture for spec in specs))
    # `auto` is what a short run takes: nobody waits for a compiler to see a first figure.
    short = suite.with_epochs(1)
    modes = {
        name: [resolve_compile_mode(how, short, name, device) for how in compile] for name in names
    }
    rates = measure_rates(device, suite.precision)
    images = random_images(suite.data, BATCHES * suite.batch_size).to(device)
    rows: list[StepCost] = []
    for index, name in enumerate(names):
        chosen = [spec for spec in specs if spec.architecture == name]

        def report(what: str, share: float, done: int = index, name: str = name) -> None:
            progress(f"{name}: {what}", (done + share) / len(names))

        rows += _architecture(
            chosen, modes[name], images, rounds, against, rates, report, on_message, on_failure
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


def _architecture(
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
    fitting = partial(_fitting, MemoryMeter(images.pixels.device), on_failure)
    wanted = [(spec, mode) for mode in dict.fromkeys(modes) for spec in specs]
    references = {(s.networks, mode): _reference(s, against) for s, mode in wanted}
    todo = {(spec.method_name, mode): (spec, mode) for spec, mode in wanted}
    todo |= {(s.method_name, mode): (s, mode) for (_, mode), s in references.items() if s}
    subjects: dict[Key, Subject] = {}
    for index, (key, (spec, mode)) in enumerate(todo.items()):
        progress(f"preparing {spec.method_name} ({mode})", 0.5 * index / len(todo))
        said = partial(_say, on_message, spec)
        made = fitting(spec, mode, partial(Subject, spec, mode, images, said))
        if made is not None:
            subjects[key] = made
    times: dict[Key, list[float]] = {key: [] for key in subjects}
    loading: dict[Key, list[float]] = {key: [] for key in subjects}
    for done in range(rounds):
        progress(f"round {done + 1} of {rounds}", 0.5 + 0.5 * done / rounds)
        for key, subject in list(subjects.items()):
            seconds = fitting(*todo[key], partial(_window, subject))
            if seconds is None:
                del subjects[key]
            else:
                times[key].append(seconds[0])
                loading[key].append(seconds[1])
    rows = []
    for spec, mode in wanted:
        key = spec.method_name, mode
        reference = references[spec.networks, mode]
        beside = (reference.method_name, mode) if reference else None
        if key in subjects:
            others = times[beside] if beside in subjects else None
            rows.append(_row(subjects[key], times[key], loading[key], others, rates))
    return rows


def _window(subject: Subject) -> tuple[float, float]:
    """Seconds a step, and those for its data alone."""
    return subject.train(subject.steps), subject.load(subject.steps)


def _fitting(
    meter: MemoryMeter,
    on_failure: Callable[[str], None],
    spec: RunSpec,
    mode: Mode,
    make: Callable[[], Made],
) -> Made | None:
    """What is made, or None where memory ran out in it, which is told."""
    try:
        return make()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    peak = f"{meter.peak() / 2**20:,.0f} MiB"
    clear_device_cache(garbage_collection=True)
    on_failure(
        f"'{spec.entry.name}' ({spec.architecture}, {mode}) ran out of memory at batch size "
        f"{spec.suite.batch_size}, peak {peak}; a smaller batch_size in the suite needs less."
    )
    return None


def _say(on_message: Callable[[str], None], spec: RunSpec, reason: str) -> None:
    on_message(f"'{spec.entry.name}' {reason}.")


def _reference(spec: RunSpec, against: str) -> RunSpec | None:
    """The reference with as many networks; None where it does not take that many."""
    (entry,) = find_methods([against])
    default = len(spec.architecture.split("+")) > 1 or spec.networks == spec.suite.networks
    networks = {} if default else {"networks": str(spec.networks)}
    reference = RunSpec(spec.suite, spec.architecture, entry, entry.options(networks), spec.seed)
    takes = entry.method.fixed_networks in (None, spec.networks)
    if not takes or spec.networks < entry.method.minimum_networks:
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
        floor_milliseconds=1000 * work.floor(rates),
    )


def _spread(values: list[float]) -> Spread:
    if len(values) == 1:
        return Spread(median=values[0], quartiles=(values[0], values[0]))
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=middle, quartiles=(low, high))
