"""The `kdbench gate` command: trains, times, compares, and writes a baseline on request."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdbench.engine.device import make_accelerator
from kdbench.engine.environment import environment
from kdbench.engine.spec import HARNESS_VERSION, RunSpec
from kdbench.errors import UserError
from kdbench.gate.compare import REGRESSIONS, Comparison, compare
from kdbench.gate.measure import (
    REFERENCE_METHOD,
    add_rounding,
    build_entries,
    perturbed,
    single_step_suite,
    time_steps,
    train,
    with_suite,
)
from kdbench.gate.record import Baseline, Entry, read_baseline
from kdbench.gate.tables import render
from kdbench.launch.execution import Execution
from kdbench.launch.plan import make_specs
from kdbench.suite.suite import Suite


@dataclass(frozen=True)
class GateRequest:
    """Suite, methods and schedule that a gate covers.

    None means the value of the baseline, or that of the suite if there is no baseline.
    """

    suite: Suite
    methods: list[str]
    architectures: list[str] | None = None
    seeds: int | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class GateReport:
    """Comparisons with the old baseline, and the new baseline that the measurements make."""

    old: Baseline | None
    new: Baseline
    comparisons: list[Comparison]

    @property
    def passed(self) -> bool:
        """True if no comparison is a regression."""
        return not any(comparison.verdict in REGRESSIONS for comparison in self.comparisons)

    def render(self, markdown: bool = False) -> str:
        """Return the comparisons as tables, for a terminal or as Markdown."""
        if self.old is None:
            return "There is no baseline of this suite to compare with.\n"
        return render(self.comparisons, self.old, self.new.environment, markdown)


def run_gate(
    request: GateRequest,
    file: Path,
    config: Execution,
    update: bool,
    on_message: Callable[[str], None],
) -> GateReport:
    """Measure all methods and compare them with the baseline.

    Args:
        request: suite, methods and schedule to cover.
        file: file of the baseline. It is read, never written.
        config: execution settings of the runs.
        update: also measure the loss tolerances that a new baseline needs.
        on_message: called with messages for the user.

    Raises:
        UserError: The baseline is missing or of another suite, or it must not be updated.
    """
    old = None if update and not file.exists() else read_baseline(file)
    request = _with_baseline_defaults(request, old)
    seeds = request.seeds or request.suite.seeds
    specs = make_specs(request.suite, request.methods, request.architectures or [], seeds)
    new_environment = environment(
        make_accelerator().device, 1, request.suite.precision, "kdbench gate"
    )
    if update:
        _check_update(old, specs, request.methods, new_environment.dirty)
    elif old is not None:
        _check_suite(request.suite, old)
    entries = _measure_entries(request.suite, specs, config, update, on_message)
    new = Baseline(
        suite=request.suite.name,
        suite_hash=request.suite.digest(),
        epochs=request.suite.schedule.epochs,
        seeds=seeds,
        harness_version=HARNESS_VERSION,
        against=REFERENCE_METHOD,
        environment=new_environment,
        entries=entries,
    )
    comparable = old is not None and old.suite_hash == new.suite_hash
    names = None if "all" in request.methods else {spec.method_name for spec in specs}
    comparisons = []
    if old is not None and comparable:
        comparisons = compare(old, entries, names, new_environment.torch)
    return GateReport(old if comparable else None, new, comparisons)


def _measure_entries(
    suite: Suite,
    specs: Sequence[RunSpec],
    config: Execution,
    update: bool,
    on_message: Callable[[str], None],
) -> list[Entry]:
    single_steps = single_step_suite(suite)
    long, short = train(specs, config), train(with_suite(specs, single_steps), config)
    entries = build_entries(long, short, time_steps(specs, on_message))
    if update:
        _check_finished(entries)
        perturbed_results = train(with_suite(specs, perturbed(single_steps)), config)
        entries = [add_rounding(entry, perturbed_results) for entry in entries]
    return entries


def _with_baseline_defaults(request: GateRequest, old: Baseline | None) -> GateRequest:
    """Fill in the values that the request leaves open from the baseline."""
    epochs = request.epochs
    if old is not None:
        epochs = epochs or old.epochs
        request = replace(
            request,
            architectures=request.architectures or old.architectures,
            seeds=request.seeds or old.seeds,
        )
    return request if epochs is None else replace(request, suite=request.suite.with_epochs(epochs))


def _check_suite(suite: Suite, old: Baseline) -> None:
    if suite.digest() != old.suite_hash:
        raise UserError(
            f"The baseline was made with another version of suite '{old.suite}', or with another "
            f"suite than '{suite.name}', so no numbers are comparable; make a new one with "
            "--update."
        )


def _check_update(
    old: Baseline | None, specs: Sequence[RunSpec], methods: list[str], dirty: bool | None
) -> None:
    if dirty:
        raise UserError(
            "--update needs a clean checkout, because a baseline names the commit that made it; "
            "commit the changes in kdbench, methods and suites first."
        )
    if old is None:
        return
    kept = {spec.method_name for spec in specs}
    dropped = set() if "all" in methods else {entry.method for entry in old.entries} - kept
    for lost, option in (
        (dropped, "--methods"),
        (set(old.architectures) - {spec.architecture for spec in specs}, "--architectures"),
    ):
        if lost:
            raise UserError(
                f"--update replaces the whole baseline and would lose {', '.join(sorted(lost))}; "
                f"remove {option}."
            )


def _check_finished(entries: Sequence[Entry]) -> None:
    for entry in entries:
        for seed, reason in entry.unfinished.items():
            raise UserError(
                f"{entry.method} {entry.architecture} seed {seed} {reason}. No baseline was "
                "written, because a baseline holds finished runs only."
            )
