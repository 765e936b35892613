"""Leaderboards as text: terminal and markdown for readers, CSV and JSON for programs."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import pandas as pd
from tabulate import tabulate

from kdbench.report.summary import BOARD

Format = Literal["terminal", "markdown", "csv", "json"]
FORMATS: tuple[str, ...] = get_args(Format)
MISSING = "n/a"
WAITING = "waiting for data"


def render(board: pd.DataFrame, form: Format, against: str = "baseline") -> str:
    """The leaderboard in one of FORMATS; numbers in CSV and JSON are not rounded."""
    if form == "csv":
        return board.to_csv(index=False)
    if form == "json":
        return board.to_json(orient="records", indent=1)
    clashes = board.groupby(["suite", "architecture"]).suite_hash.nunique().max() > 1
    sections = []
    for key, rows in board.groupby(BOARD, sort=True):
        suite, digest, architecture = map(str, key)
        # The same name over different recipes: two leaderboards, told apart by their hash.
        name = f"{suite} ({digest[:8]})" if clashes else suite
        sections.append(_section(f"{name}, {architecture}", rows, form, against))
    return "\n".join(sections)


def _section(title: str, rows: pd.DataFrame, form: Format, against: str) -> str:
    kinds = ", ".join(sorted(rows.memory_kind.dropna().unique()))
    memory = f"peak MiB ({kinds or MISSING})"
    mixed = rows.step.nunique() > 1
    cells = [_row(row, against, memory, mixed) for _, row in rows.iterrows()]
    if rows.waiting_share.isna().all():
        cells = [{name: text for name, text in row.items() if name != WAITING} for row in cells]
    return titled_table(title, cells, markdown=form == "markdown")


def titled_table(
    title: str, cells: Sequence[Mapping[str, str]], markdown: bool, left: int = 1
) -> str:
    """Rows of finished texts under a heading; the first `left` columns hold words."""
    style = "github" if markdown else "simple"
    heading = f"### {title}\n" if markdown else title
    aligned = ["left"] * left + ["right"] * (len(cells[0]) - left)
    table = tabulate(cells, headers="keys", tablefmt=style, disable_numparse=True, colalign=aligned)
    return f"{heading}\n{table}\n"


def _row(row: pd.Series, against: str, memory: str, mixed: bool) -> dict[str, str]:
    trained, deployed = _millions(row.parameters_trained), _millions(row.parameters_deployed)
    return {
        "method": str(row.method),
        "student top-1 %": _spread(row.student_top1, row.student_top1_sd),
        "n": _count(row),
        f"vs {against}": _number(row.difference, "+.2f"),
        "ensemble %": _spread(row.ensemble_top1, row.ensemble_top1_sd),
        "images/s": _rate(row, mixed),
        memory: _number(row.peak_memory_bytes / 2**20, ",.0f"),
        "training": _duration(row.training_seconds),
        WAITING: _number(row.waiting_share, ".0%"),
        "params trained / deployed": f"{trained} / {deployed}",
    }


def _rate(row: pd.Series, mixed: bool) -> str:
    """Rates of runs that shared a device are none; compiled and eager ones are told apart."""
    if row.shared:
        return "shared"
    rate = _number(row.images_per_second, ",.0f")
    return f"{rate} ({row.step})" if mixed and rate != MISSING else rate


def _number(value: float, spec: str) -> str:
    return MISSING if math.isnan(value) else format(value, spec)


def _spread(mean: float, sd: float) -> str:
    """Mean ± sample standard deviation; the latter is n/a for one seed."""
    return MISSING if math.isnan(mean) else f"{mean:.2f} ± {_number(sd, '.2f')}"


def _millions(count: float) -> str:
    return MISSING if math.isnan(count) else f"{count / 1e6:.2f} M"


def _duration(seconds: float) -> str:
    if math.isnan(seconds):
        return MISSING
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _count(row: pd.Series) -> str:
    lost = [f"{row[kind]} {kind}" for kind in ("diverged", "failed") if row[kind]]
    return f"{row.n} ({', '.join(lost)})" if lost else str(row.n)
