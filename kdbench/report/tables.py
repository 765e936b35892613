"""Leaderboards as text: terminal, markdown and LaTeX for readers, CSV and JSON for programs."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import pandas as pd
from tabulate import tabulate

from kdbench.report.columns import DISPENSABLE, Column, columns
from kdbench.report.latex import leaderboard_table, published_table
from kdbench.report.published import TITLE, Source, published_cells
from kdbench.report.summary import BOARD

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
        return board.to_json(orient="records", indent=1)
    sections = []
    recipes = board.groupby("suite").suite_hash.nunique()
    for key, rows in board.groupby(BOARD, sort=True):
        suite, digest, architecture = map(str, key)
        name = f"{suite} ({digest[:8]})" if recipes[suite] > 1 else suite
        title = f"{name}, {architecture}"
        shown = columns(rows, names, against)
        others = published_cells(sources, rows)
        if form == "latex":
            sections.append(leaderboard_table(title, rows, shown, against))
            sections += [published_table(title, others)] if others else []
            continue
        markdown = form == "markdown"
        fit = width if names is None and not markdown else None
        sections.append(_section(title, rows, shown, markdown, fit))
        sections += [titled_table(TITLE, others, markdown, left=2)] if others else []
    return "\n".join([*_clashes(recipes, comment=form == "latex"), *sections])


def titled_table(
    title: str, cells: Sequence[Mapping[str, str]], markdown: bool, left: int = 1
) -> str:
    """Rows of finished texts under a heading; the first `left` columns hold words."""
    return _titled(title, cells, markdown, list(cells[0])[:left])


def _titled(
    title: str, cells: Sequence[Mapping[str, str]], markdown: bool, words: Sequence[str]
) -> str:
    heading = f"### {escape_markdown(title)}\n" if markdown else title
    return f"{heading}\n{_table(cells, markdown, words)}\n"


def _table(cells: Sequence[Mapping[str, str]], markdown: bool, words: Sequence[str]) -> str:
    aligned = ["left" if heading in words else "right" for heading in cells[0]]
    if markdown:
        cells = [{key: escape_markdown(text) for key, text in row.items()} for row in cells]
    style = "github" if markdown else "simple"
    return tabulate(cells, headers="keys", tablefmt=style, disable_numparse=True, colalign=aligned)


def _section(
    title: str, rows: pd.DataFrame, shown: Sequence[Column], markdown: bool, width: int | None
) -> str:
    words = [column.heading for column in shown if column.words]
    cells = [{column.heading: column.text(row) for column in shown} for _, row in rows.iterrows()]
    heading = {column.name: column.heading for column in shown}
    left_out: list[str] = []
    for name in DISPENSABLE:
        if width is None or _width(_table(cells, markdown, words)) <= width:
            break
        if name in heading:
            left_out.append(name)
            cells = [{k: text for k, text in row.items() if k != heading[name]} for row in cells]
    text = _titled(title, cells, markdown, words)
    return f"{text}Left out to fit: {', '.join(left_out)} (--columns all).\n" if left_out else text


def _width(table: str) -> int:
    return max(map(len, table.splitlines()))


def _clashes(recipes: "pd.Series[int]", comment: bool) -> list[str]:
    """A line for each suite whose name stands for several recipes."""
    mark = "% " if comment else ""
    return [
        f"{mark}{count} recipes go by the name '{suite}': tables are told apart by their hash.\n"
        for suite, count in recipes.items()
        if count > 1
    ]


def escape_markdown(text: str) -> str:
    """Text that a reader of markdown shows as it stands: no cell, tag, code or link of its own."""
    escaped = re.sub(r"([\\|`*])", r"\\\1", text).replace("](", "]\\(")
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
