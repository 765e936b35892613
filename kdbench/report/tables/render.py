"""Leaderboards as text: terminal, markdown and LaTeX for readers, CSV and JSON for programs."""

import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import pandas as pd
from tabulate import tabulate

from kdbench.report.analysis.summary import each_board
from kdbench.report.tables.columns import DEFAULT, DISPENSABLE, PAPER, Column, columns
from kdbench.report.tables.latex import leaderboard_table, plain_table
from kdbench.report.tables.notes import about, clashes, doubts, verdicts
from kdbench.report.tables.published import (
    SPARE,
    TITLE,
    WORDS,
    Source,
    published_cells,
    published_notes,
)

Format = Literal["terminal", "markdown", "latex", "csv", "json"]
FORMATS: tuple[str, ...] = get_args(Format)


def render(
    board: pd.DataFrame,
    form: Format,
    against: str = "baseline",
    names: Sequence[str] | None = None,
    sources: Sequence[Source] = (),
    width: int | None = None,
) -> str:
    """The leaderboard in one of FORMATS; CSV and JSON hold every number, not rounded.

    `names` chooses columns. With `width`, in characters, a terminal's table leaves out what it
    can do without until it fits. `sources` stand below the boards that they go with.
    """
    if form == "csv":
        by_seed = board.student_top1_by_seed.map(json.dumps)
        return board.assign(student_top1_by_seed=by_seed).to_csv(index=False)
    if form == "json":
        return board.to_json(orient="records", indent=1, double_precision=15)
    sections = []
    for title, _, rows in each_board(board):
        shown = columns(rows, names, against, PAPER if form == "latex" else DEFAULT)
        others, notes = published_cells(sources, rows), published_notes(sources, rows)
        if form == "latex":
            sections.append(leaderboard_table(title, rows, shown, against))
            sections += [table.latex(title) for table in _published(others, notes)]
        else:
            tables = [_leaderboard(title, rows, shown, against), *_published(others, notes)]
            if width is not None and names is None and form == "terminal":
                tables = [table.to_fit(width) for table in tables]
            sections += [table.text(markdown=form == "markdown") for table in tables]
    mark = "% " if form == "latex" else ""
    return "\n".join([*(f"{mark}{said}\n" for said in clashes(board)), *sections])


@dataclass(frozen=True)
class TextTable:
    """Finished texts by heading, a row each, under a title."""

    title: str
    rows: Sequence[Mapping[str, str]]
    words: Container[str]
    """Headings of columns that hold words: they stand on the left."""
    spare: Sequence[str] = ()
    """Headings of columns that a narrow terminal has where they fit, the least important first."""
    left_out: tuple[str, ...] = ()
    notes: Sequence[str] = ()
    """Sentences below it."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """By heading, what is said below in the place of a column that is left out."""

    def to_fit(self, width: int) -> "TextTable":
        """With those of its spare columns for which there is room, the most important first."""
        spare = [heading for heading in self.spare if heading in self.rows[0]]
        fitting = self._without(spare)
        for heading in reversed(spare):
            wider = self._without([name for name in fitting.left_out if name != heading])
            if wider._width() <= width:
                fitting = wider
        return fitting

    def _without(self, headings: Sequence[str]) -> "TextTable":
        rows = [
            {name: text for name, text in row.items() if name not in headings} for row in self.rows
        ]
        said = [self.instead[name] for name in headings if name in self.instead]
        return replace(self, rows=rows, left_out=tuple(headings), notes=[*self.notes, *said])

    def _width(self) -> int:
        return max(map(len, self._table("simple").splitlines()))

    def text(self, markdown: bool) -> str:
        if markdown:
            rows = [{k: escape_markdown(text) for k, text in row.items()} for row in self.rows]
            table = replace(self, rows=rows)._table("github")
            notes = "".join(f"- {escape_markdown(note)}\n" for note in self.notes)
            return f"### {escape_markdown(self.title)}\n\n{table}\n" + (notes and f"\n{notes}")
        lines = [self.title, self._table("simple")]
        if self.left_out:
            lines.append(f"Left out to fit: {', '.join(self.left_out)}; a pipe gets them all.")
        return "\n".join([*lines, *self.notes]) + "\n"

    def latex(self, *before: str) -> str:
        """Its title and notes are the caption, after the sentences `before`."""
        return plain_table([*before, self.title, *self.notes], self.rows, self.words)

    def _table(self, style: str) -> str:
        aligned = ["left" if heading in self.words else "right" for heading in self.rows[0]]
        return tabulate(
            self.rows, headers="keys", tablefmt=style, disable_numparse=True, colalign=aligned
        )


def titled_table(
    title: str, cells: Sequence[Mapping[str, str]], markdown: bool, left: int = 1
) -> str:
    """Rows of finished texts under a heading; the first `left` columns hold words."""
    return TextTable(title, cells, list(cells[0])[:left]).text(markdown)


def _leaderboard(
    title: str, rows: pd.DataFrame, shown: Sequence[Column], against: str
) -> TextTable:
    cells = [{column.heading: column.text(row) for column in shown} for _, row in rows.iterrows()]
    heading = {column.name: column.heading for column in shown}
    told_apart = "verdict" in heading and rows.p_holm.notna().any()
    return TextTable(
        title,
        cells,
        words=[column.heading for column in shown if column.words],
        spare=[heading[name] for name in DISPENSABLE if name in heading],
        notes=[*about(rows), *doubts(rows)],
        instead={heading["verdict"]: verdicts(rows, against)} if told_apart else {},
    )


def _published(cells: Sequence[Mapping[str, str]], notes: Sequence[str]) -> list[TextTable]:
    return [TextTable(TITLE, cells, words=WORDS, spare=SPARE, notes=notes)] if cells else []


def escape_markdown(text: str) -> str:
    """Text that a reader of markdown shows as it stands: no cell, tag, code or link of its own."""
    escaped = re.sub(r"([\\|`*])", r"\\\1", text).replace("](", "]\\(")
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
