"""Rendering of leaderboards as terminal, Markdown or LaTeX tables, CSV or JSON."""

import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import pandas as pd
from tabulate import tabulate

from kdbench.report.analysis.summary import each_board
from kdbench.report.tables.columns import DEFAULT, OPTIONAL_COLUMNS, PAPER, Column, columns
from kdbench.report.tables.latex import leaderboard_table, plain_table
from kdbench.report.tables.notes import caveats, legend, name_collisions, suite_notes, verdicts
from kdbench.report.tables.published import (
    PUBLISHED_OPTIONAL_COLUMNS,
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
    """Return the leaderboard in one of FORMATS. CSV and JSON hold all numbers, unrounded.

    Args:
        board: the leaderboard, from `summary.leaderboard`.
        form: output format.
        against: method that differences refer to.
        names: columns to show; None means the usual ones.
        sources: published numbers, shown below the tables they belong to.
        width: terminal width in characters; optional columns are dropped until the table fits.
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
    return "\n".join([*(f"{mark}{note}\n" for note in name_collisions(board)), *sections])


@dataclass(frozen=True)
class TextTable:
    """A table of formatted texts with a title and notes."""

    title: str
    rows: Sequence[Mapping[str, str]]
    """Texts by heading, one mapping per row."""
    text_columns: Container[str]
    """Headings of left-aligned columns; all others are right-aligned."""
    optional: Sequence[str] = ()
    """Headings of columns that are dropped on narrow terminals, least important first."""
    left_out: tuple[str, ...] = ()
    notes: Sequence[str] = ()
    """Sentences below the table."""
    instead: Mapping[str, str] = field(default_factory=dict)
    """Notes that replace columns that are dropped, by heading."""

    def to_fit(self, width: int) -> "TextTable":
        """Return the table with as many optional columns as fit, most important first."""
        optional = [heading for heading in self.optional if heading in self.rows[0]]
        fitting = self._without(optional)
        for heading in reversed(optional):
            wider = self._without([name for name in fitting.left_out if name != heading])
            if wider._width() <= width:
                fitting = wider
        return fitting

    def _without(self, headings: Sequence[str]) -> "TextTable":
        rows = [
            {name: text for name, text in row.items() if name not in headings} for row in self.rows
        ]
        notes = [self.instead[name] for name in headings if name in self.instead]
        return replace(self, rows=rows, left_out=tuple(headings), notes=[*self.notes, *notes])

    def _width(self) -> int:
        return max(map(len, self._table("simple").splitlines()))

    def text(self, markdown: bool) -> str:
        """Return the table for a terminal or as Markdown."""
        if markdown:
            rows = [{k: escape_markdown(text) for k, text in row.items()} for row in self.rows]
            table = replace(self, rows=rows)._table("github")
            notes = "".join(f"- {escape_markdown(note)}\n" for note in self.notes)
            return f"### {escape_markdown(self.title)}\n\n{table}\n" + (notes and f"\n{notes}")
        lines = [self.title, self._table("simple")]
        if self.left_out:
            names = ", ".join(self.left_out)
            lines.append(f"Columns left out to fit the terminal: {names}. Piped output has all.")
        return "\n".join([*lines, *self.notes]) + "\n"

    def latex(self, *before: str) -> str:
        """Return the table as LaTeX; `before`, the title and the notes form the caption."""
        return plain_table([*before, self.title, *self.notes], self.rows, self.text_columns)

    def _table(self, style: str) -> str:
        aligned = ["left" if heading in self.text_columns else "right" for heading in self.rows[0]]
        return tabulate(
            self.rows, headers="keys", tablefmt=style, disable_numparse=True, colalign=aligned
        )


def titled_table(
    title: str, cells: Sequence[Mapping[str, str]], markdown: bool, left: int = 1
) -> str:
    """Return rows of texts under a title; the first `left` columns are left-aligned."""
    return TextTable(title, cells, list(cells[0])[:left]).text(markdown)


def _leaderboard(
    title: str, rows: pd.DataFrame, shown: Sequence[Column], against: str
) -> TextTable:
    cells = [{column.heading: column.text(row) for column in shown} for _, row in rows.iterrows()]
    heading = {column.name: column.heading for column in shown}
    has_verdicts = "verdict" in heading and rows.p.notna().any()
    return TextTable(
        title,
        cells,
        text_columns=[column.heading for column in shown if column.words],
        optional=[heading[name] for name in OPTIONAL_COLUMNS if name in heading],
        notes=[*suite_notes(rows), *(legend(rows) if has_verdicts else []), *caveats(rows)],
        instead={heading["verdict"]: verdicts(rows, against)} if has_verdicts else {},
    )


def _published(cells: Sequence[Mapping[str, str]], notes: Sequence[str]) -> list[TextTable]:
    if not cells:
        return []
    return [TextTable(TITLE, cells, WORDS, optional=PUBLISHED_OPTIONAL_COLUMNS, notes=notes)]


def escape_markdown(text: str) -> str:
    """Escape characters that Markdown would interpret as cells, tags, code or links."""
    escaped = re.sub(r"([\\|`*])", r"\\\1", text).replace("](", "]\\(")
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
