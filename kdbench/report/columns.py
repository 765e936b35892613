"""Columns of a leaderboard: heading, text of a cell, value to sort by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from kdbench.report.tables import _row


@dataclass(frozen=True)
class Column:
    name: str
    heading: str
    text: Callable[[pd.Series], str]
    value: Callable[[pd.Series], float | str | None]
    words: bool = False
    better: Literal["high", "low"] | None = None


def columns(board: pd.DataFrame, names: Sequence[str] | None, against: str) -> list[Column]:
    """The columns of a board."""
    memory = f"peak MiB ({', '.join(sorted(board.memory_kind.dropna().unique())) or 'n/a'})"
    mixed = board.step.nunique() > 1

    def text(heading: str) -> Callable[[pd.Series], str]:
        return lambda row: _row(row, against, memory, mixed)[heading]

    def value(name: str) -> Callable[[pd.Series], float | str | None]:
        return lambda row: None if pd.isna(row[name]) else row[name]

    made = [
        ("method", "method"),
        ("student_top1", "student top-1 %"),
        ("n", "n"),
        ("difference", f"vs {against}"),
        ("ensemble_top1", "ensemble %"),
        ("images_per_second", "images/s"),
        ("peak_memory_bytes", memory),
        ("training_seconds", "training"),
        ("parameters_trained", "params trained / deployed"),
    ]
    return [Column(n, h, text(h), value(n), words=n == "method") for n, h in made]
