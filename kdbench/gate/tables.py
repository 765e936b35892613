"""What a gate found, as text: terminal and markdown."""

from collections import Counter
from collections.abc import Sequence

from kdbench.errors import pluralize
from kdbench.gate.compare import REGRESSIONS, Finding
from kdbench.gate.record import Baseline
from kdbench.report.tables.render import titled_table
from kdbench.results.schema import Environment


def render(
    findings: Sequence[Finding], baseline: Baseline, now: Environment, markdown: bool = False
) -> str:
    """A table an architecture, and one line that says what came of it."""
    sections = [
        titled_table(
            f"{baseline.suite}, {architecture}",
            [_cells(f) for f in findings if f.architecture == architecture],
            markdown,
            left=2,
        )
        for architecture in dict.fromkeys(f.architecture for f in findings)
    ]
    stored = _conditions(baseline.environment)
    conditions = [f"Baseline: {stored}.", f"Now: {_conditions(now)}.", verdict(findings)]
    return "\n".join([*sections, *conditions, ""])


def verdict(findings: Sequence[Finding]) -> str:
    """How many measures came out how."""
    counts = Counter(finding.verdict for finding in findings)
    identical = sum(finding.identical for finding in findings)
    parts = [f"{number} {name}" for name, number in counts.items()]
    failed = any(finding.verdict in REGRESSIONS for finding in findings)
    return (
        f"{'REGRESSION' if failed else 'No regression'}: {pluralize(len(findings), 'measure')}: "
        f"{', '.join(parts)}, {identical} of them identical."
    )


def _cells(finding: Finding) -> dict[str, str]:
    return {
        "method": finding.method,
        "measure": finding.measure,
        "baseline": finding.baseline,
        "now": finding.now,
        "tolerance": finding.tolerance,
        "verdict": "identical" if finding.identical else finding.verdict,
    }


def _conditions(made: Environment) -> str:
    commit = "" if made.commit is None else f", commit {made.commit[:8]}"
    dirty = " with changes" if made.dirty else ""
    return f"{made.device}, {pluralize(made.threads, 'thread')}, torch {made.torch}{commit}{dirty}"
