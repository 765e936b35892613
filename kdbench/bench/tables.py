"""Benchmark results as text: terminal and Markdown for readers, JSON for programs."""

from typing import Literal

from kdbench.bench.record import Benchmark, StepCost
from kdbench.errors import pluralize
from kdbench.report.tables.columns import MISSING
from kdbench.report.tables.render import TextTable

BenchFormat = Literal["terminal", "markdown", "json"]


def render(benchmark: Benchmark, form: BenchFormat) -> str:
    """Return one table per architecture, followed by the conditions of the measurement."""
    if form == "json":
        return benchmark.model_dump_json(indent=1) + "\n"
    architectures = dict.fromkeys(row.architecture for row in benchmark.rows)
    sections = [_section(benchmark, name, form) for name in architectures]
    return "\n".join([*sections, _conditions(benchmark)])


def _section(benchmark: Benchmark, architecture: str, form: BenchFormat) -> str:
    rows = [row for row in benchmark.rows if row.architecture == architecture]
    cells = [_cells(row, benchmark.against) for row in rows]
    title = f"{benchmark.suite}, {architecture}, batch {benchmark.batch_size}"
    notes = []
    if any(row.ratio is None for row in rows):
        same = "with the same number of networks and the same way of running steps"
        notes.append(f"{MISSING}: no {benchmark.against} {same} was measured.")
    table = TextTable(title, cells, text_columns=("method", "step"), notes=notes)
    return table.text(markdown=form == "markdown")


def _cells(row: StepCost, against: str) -> dict[str, str]:
    low, high = row.milliseconds.quartiles
    ratio, spread = MISSING, MISSING
    if row.ratio is not None:
        ratio = f"{row.ratio.median:.3f}"
        spread = "{:.3f}-{:.3f}".format(*row.ratio.quartiles)
    return {
        "method": row.method,
        "step": row.step,
        "networks": str(row.networks),
        "ms/step": f"{row.milliseconds.median:.1f}",
        "IQR": f"{high - low:.1f}",
        "images/s": f"{row.images_per_second:,.0f}",
        f"/ {against}": ratio,
        "quartiles": spread,
        "data": f"{100 * row.data_share:.1f} %",
        "peak MiB": f"{row.peak_memory_bytes / 2**20:,.0f}",
        "operations": f"{row.operations:,}",
        "GB": f"{row.bytes / 1e9:.2f}",
        "GFLOP": f"{row.flops / 1e9:.1f}",
        "floor ms": f"{row.floor_milliseconds:.1f}",
        "of floor": f"{100 * row.floor_milliseconds / row.milliseconds.median:.0f} %",
    }


def _conditions(benchmark: Benchmark) -> str:
    env = benchmark.environment
    return (
        f"{env.device}, {pluralize(env.threads, 'thread')}, {env.system}, {env.precision}; "
        f"torch {env.torch}, Python {env.python}, kdbench {env.kdbench}; {benchmark.date}. "
        f"Median of {benchmark.rounds} rounds, all methods in turn; copies "
        f"{benchmark.bytes_per_second / 1e9:,.0f} GB/s, matrix products "
        f"{benchmark.flops_per_second / 1e12:,.2f} TFLOP/s.\n"
    )
