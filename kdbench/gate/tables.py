"""Rendering of a gate's findings as terminal or Markdown tables."""

from collections import Counter
from collections.abc import Sequence

from kdbench.errors import pluralize
from kdbench.gate.compare import REGRESSIONS, Finding
from kdbench.gate.record import Baseline
from kdbench.report.tables.render import titled_table
from kdbench.results.schema import Environment


def render(
    findings: Sequence[Finding],
    baseline: Baseline,
    environment: Environment,
    markdown: bool = False,
) -> str:
    """Return one table per architecture, both environments, and a one-line summary.

    Args:
        findings: rows of the tables.
        baseline: the baseline that was compared with.
        environment: where the new numbers were measured.
        markdown: return Markdown instead of text for a terminal.
    """
    tables = [
        titled_table(
            f"{baseline.suite}, {architecture}",
            [_make_row(c) for c in findings if c.architecture == architecture],
            markdown,
            left=2,
        )
        for architecture in dict.fromkeys(c.architecture for c in findings)
    ]
    environments = [
        f"Baseline: {_describe_environment(baseline.environment)}.",
        f"Now: {_describe_environment(environment)}.",
    ]
    return "\n".join([*tables, *environments, summarize(findings), ""])


def summarize(findings: Sequence[Finding]) -> str:
    """Return one sentence with the overall verdict and the number of measures per verdict."""
    counts = Counter(finding.verdict for finding in findings)
    identical = sum(finding.identical for finding in findings)
    parts = [f"{number} {verdict}" for verdict, number in counts.items()]
    failed = any(finding.verdict in REGRESSIONS for finding in findings)
    return (
        f"{'REGRESSION' if failed else 'No regression'}: {pluralize(len(findings), 'measure')}: "
        f"{', '.join(parts)}, {identical} of them identical."
    )


def _make_row(finding: Finding) -> dict[str, str]:
    return {
        "method": finding.method,
        "measure": finding.measure,
        "baseline": finding.baseline,
        "now": finding.now,
        "tolerance": finding.tolerance,
        "verdict": "identical" if finding.identical else finding.verdict,
    }


def _describe_environment(environment: Environment) -> str:
    commit = "" if environment.commit is None else f", commit {environment.commit[:8]}"
    dirty = " with uncommitted changes" if environment.dirty else ""
    threads = pluralize(environment.threads, "thread")
    return f"{environment.device}, {threads}, torch {environment.torch}{commit}{dirty}"
