"""What `kdbench gate` does: train, time, compare, and only when told write a baseline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdbench.engine.device import make_accelerator
from kdbench.engine.environment import environment
from kdbench.engine.spec import HARNESS_VERSION, RunSpec
from kdbench.errors import UserError
from kdbench.gate.compare import REGRESSIONS, Finding, compare
from kdbench.gate.measure import (
    AGAINST,
    entries_of,
    perturbed,
    step_by_step,
    time_steps,
    train,
    with_rounding,
    with_suite,
)
from kdbench.gate.record import Baseline, Entry, read_baseline
from kdbench.gate.tables import render
from kdbench.launch.execution import Execution
from kdbench.launch.plan import make_specs
from kdbench.suite.suite import Suite


@dataclass(frozen=True)
class Asked:
    """What a gate is to cover; None leaves it to the baseline, and to the suite without one."""

    suite: Suite
    methods: list[str]
    architectures: list[str] | None = None
    seeds: int | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class Gate:
    """A comparison, and the baseline that what was measured now would make."""

    old: Baseline | None
    new: Baseline
    findings: list[Finding]

    @property
    def passed(self) -> bool:
        return not any(finding.verdict in REGRESSIONS for finding in self.findings)

    def render(self, markdown: bool = False) -> str:
        if self.old is None:
            return "There was no baseline of this suite to compare with.\n"
        return render(self.findings, self.old, self.new.environment, markdown)


def gate(
    asked: Asked,
    file: Path,
    how: Execution,
    update: bool,
    on_message: Callable[[str], None],
) -> Gate:
    """Measure and compare; with `update` what is needed for a new baseline is measured too.

    Raises:
        UserError: no baseline, one of another suite, or an update that must not be.
    """
    old = None if update and not file.exists() else read_baseline(file)
    asked = _completed(asked, old)
    specs = make_specs(
        asked.suite, asked.methods, asked.architectures or [], asked.seeds or asked.suite.seeds
    )
    here = environment(make_accelerator().device, 1, asked.suite.precision, "kdbench gate")
    if update:
        _check_update(old, specs, asked.methods, here.dirty)
    elif old is not None:
        _check_suite(asked.suite, old)
    steps = step_by_step(asked.suite)
    long, short = train(specs, how), train(with_suite(specs, steps), how)
    entries = entries_of(long, short, time_steps(specs, on_message))
    if update:
        _check_finished(entries)
        disturbed = train(with_suite(specs, perturbed(steps)), how)
        entries = [with_rounding(entry, disturbed) for entry in entries]
    new = Baseline(
        suite=asked.suite.name,
        suite_hash=asked.suite.digest(),
        epochs=asked.suite.schedule.epochs,
        seeds=asked.seeds or asked.suite.seeds,
        harness_version=HARNESS_VERSION,
        against=AGAINST,
        environment=here,
        entries=entries,
    )
    comparable = old is not None and old.suite_hash == new.suite_hash
    names = None if "all" in asked.methods else {spec.method_name for spec in specs}
    findings = []
    if old is not None and comparable:
        findings = compare(old, entries, names, here.torch)
    return Gate(old if comparable else None, new, findings)


def _completed(asked: Asked, old: Baseline | None) -> Asked:
    """What was left open is as in the baseline."""
    epochs = asked.epochs
    if old is not None:
        epochs = epochs or old.epochs
        asked = replace(
            asked,
            architectures=asked.architectures or old.architectures,
            seeds=asked.seeds or old.seeds,
        )
    return asked if epochs is None else replace(asked, suite=asked.suite.with_epochs(epochs))


def _check_suite(suite: Suite, old: Baseline) -> None:
    if suite.digest() != old.suite_hash:
        raise UserError(
            f"The baseline is of another version of suite '{old.suite}', or of another suite than "
            f"'{suite.name}': no number compares; --update makes a new one."
        )


def _check_update(
    old: Baseline | None, specs: Sequence[RunSpec], methods: list[str], dirty: bool | None
) -> None:
    if dirty:
        raise UserError(
            "--update is refused: kdbench, methods or suites have changes that no commit holds, "
            "and a baseline names the commit that made it; commit them first."
        )
    if old is None:
        return
    kept = {spec.method_name for spec in specs}
    gone = set() if "all" in methods else {entry.method for entry in old.entries} - kept
    for lost, option in (
        (gone, "--methods"),
        (set(old.architectures) - {spec.architecture for spec in specs}, "--architectures"),
    ):
        if lost:
            raise UserError(
                f"--update writes the whole baseline, and would lose {', '.join(sorted(lost))}; "
                f"leave out {option}."
            )


def _check_finished(entries: Sequence[Entry]) -> None:
    for entry in entries:
        for seed, reason in entry.unfinished.items():
            raise UserError(
                f"{entry.method} {entry.architecture} seed {seed} {reason}; no baseline was "
                "written, since one holds finished runs only."
            )
