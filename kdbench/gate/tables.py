"""Rendering of a gate's comparisons as terminal or Markdown tables."""

from collections import Counter
from collections.abc import Sequence

from kdbench.errors import pluralize
from kdbench.gate.compare import REGRESSIONS, Comparison
from kdbench.gate.record import Baseline
from kdbench.report.tables.render import titled_table
from kdbench.results.schema import Environment


def render(
    comparisons: Sequence[Comparison],
    baseline: Baseline,
    environment: Environment,
    markdown: bool = False,
) -> str:
    """Return one table per architecture, both environments, and a one-line summary.

    Args:
        comparisons: rows of the tables.
        baseline: the baseline that was compared with.
        environment: where the new numbers were measured.
        markdown: return Markdown instead of text for a terminal.
    """
    tables = [
        titled_table(
            f"{baseline.suite}, {architecture}",
            [_make_row(c) for c in comparisons if c.architecture == architecture],
            markdown,
            left=2,
        )
        for architecture in dict.fromkeys(c.architecture for c in comparisons)
    ]
    environments = [
        f"Baseline: {_describe_environment(baseline.environment)}.",
        f"Now: {_describe_environment(environment)}.",
    ]
    return "\n".join([*tables, *environments, summarize(comparisons), ""])


def summarize(comparisons: Sequence[Comparison]) -> str:
    """Return one sentence with the overall verdict and the number of measures per verdict."""
    counts = Counter(comparison.verdict for comparison in comparisons)
    identical = sum(comparison.identical for comparison in comparisons)
    parts = [f"{number} {verdict}" for verdict, number in counts.items()]
    failed = any(comparison.verdict in REGRESSIONS for comparison in comparisons)
    return (
        f"{'REGRESSION' if failed else 'No regression'}: {pluralize(len(comparisons), 'measure')}: "
        f"{', '.join(parts)}, {identical} of them identical."
    )


def _make_row(comparison: Comparison) -> dict[str, str]:
    return {
        "method": comparison.method,
        "measure": comparison.measure,
        "baseline": comparison.baseline,
        "now": comparison.now,
        "tolerance": comparison.tolerance,
        "verdict": "identical" if comparison.identical else comparison.verdict,
    }


def _describe_environment(environment: Environment) -> str:
    commit = "" if environment.commit is None else f", commit {environment.commit[:8]}"
    dirty = " with uncommitted changes" if environment.dirty else ""
    threads = pluralize(environment.threads, "thread")
    return f"{environment.device}, {threads}, torch {environment.torch}{commit}{dirty}"
