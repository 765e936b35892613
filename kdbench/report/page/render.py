"""Rendering of all results as one self-contained HTML page."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import pandas as pd
from markupsafe import Markup

from kdbench.report.analysis.boards import Board, boards
from kdbench.report.analysis.cost import (
    ByGroup,
    Group,
    cost_frame,
    equal_cost,
    equal_cost_tables,
    select_tables,
)
from kdbench.report.analysis.protocol import description, read_suite
from kdbench.report.figures.captioned import CaptionedFigure, captioned_figures
from kdbench.report.figures.style import drawing, inline_svg, visible
from kdbench.report.page.fidelity import FIDELITY, fidelity
from kdbench.report.tables.columns import Column, columns
from kdbench.report.tables.notes import caveats, name_collisions
from kdbench.report.tables.published import (
    Source,
    published_apart,
    published_cells,
    published_notes,
)
from kdbench.results.files import DamagedFile
from kdbench.results.schema import Result


@dataclass(frozen=True)
class Table:
    """Headings and rows of formatted texts."""

    headings: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and the value that it is sorted by. None sorts last in either order."""

    text: str
    value: float | str | None


@dataclass(frozen=True)
class RunDetails:
    """One run: a summary line, and further facts by title."""

    seed: int
    status: str
    line: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Section:
    """The content of a board, as the template shows it."""

    anchor: str
    title: str
    description: str
    recipe: str
    columns: list[Column]
    rows: dict[str, list[Cell]]
    """Cells by method."""
    notes: list[str]
    """Notes below the table."""
    published: Table | None
    """Published numbers of other authors."""
    published_notes: list[str]
    """Sources and protocols of the published numbers."""
    equal_cost: list[tuple[str, Table | str]]
    """Titles and tables of controls at equal cost, or the anchor of the board that already shows
    the table."""
    figures: dict[str, tuple[CaptionedFigure, Markup | None]]
    run_details: dict[str, list[RunDetails]]
    """Runs by method."""


def render_page(
    results: Sequence[Result],
    against: str,
    sources: Sequence[Source] = (),
    damaged: Sequence[DamagedFile] = (),
    names: Sequence[str] | None = None,
    siblings: Sequence[Result] = (),
) -> str:
    """Return the page as HTML; equal results give identical text.

    Args:
        results: at least one result.
        against: method that differences and cost refer to.
        sources: published numbers of other authors.
        damaged: files that were left out.
        names: columns of the tables; None means the usual ones.
        siblings: results of the same suites with other epochs, which appear only in figures and
            tables of cost.
    """
    all_results = [*results, *siblings]
    costs = cost_frame(all_results)
    controls = equal_cost_tables(equal_cost(all_results, against), against)
    templates = resources.files("kdbench.report.page") / "templates"
    script, style = ((templates / name).read_text("utf-8") for name in ("page.js", "page.css"))
    shown = boards(results, against)
    others, notes = published_apart(sources, [board.rows for board in shown])
    tabulated: dict[Group, str] = {}
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            sections=[
                _section(
                    f"board-{index}",
                    board,
                    columns(board.rows, names, against),
                    costs,
                    controls,
                    tabulated,
                    sources,
                    against,
                )
                for index, board in enumerate(shown, start=1)
            ],
            name_collisions=name_collisions(pd.concat([board.rows for board in shown])),
            published=_table(others) if others else None,
            published_notes=notes,
            against=against,
            runs=len(results),
            damaged=damaged,
            fidelity=fidelity(FIDELITY),
            script=Markup(script),
            style=Markup(style),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("kdbench.report.page"),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _finalize(value: object) -> object:
    return value if isinstance(value, Markup) else visible(str(value))


def _section(
    anchor: str,
    board: Board,
    shown: list[Column],
    costs: pd.DataFrame,
    controls: ByGroup,
    tabulated: dict[Group, str],
    sources: Sequence[Source],
    against: str,
) -> Section:
    with drawing():
        figures = {
            item.name: (item, _inlined(item, f"{anchor}-{item.name}"))
            for item in captioned_figures(board, costs, against)
        }
    return Section(
        anchor,
        board.title,
        description(board.results[0]),
        _recipe(board.results[0]),
        shown,
        {
            row.method: [Cell(column.text(row), _sortable(column.value(row))) for column in shown]
            for _, row in board.rows.iterrows()
        },
        caveats(board.rows),
        _published(sources, board),
        published_notes(sources, board.rows),
        _equal_cost(controls, board, tabulated, anchor),
        figures,
        {method: [_run_details(run) for run in runs] for method, runs in board.runs.items()},
    )


def _published(sources: Sequence[Source], board: Board) -> Table | None:
    cells = published_cells(sources, board.rows)
    return _table(cells) if cells else None


def _equal_cost(
    controls: ByGroup, board: Board, tabulated: dict[Group, str], anchor: str
) -> list[tuple[str, Table | str]]:
    """Return the equal-cost tables of a board's recipe, with any number of epochs.

    `tabulated` maps groups to the anchor of the board that shows their table; it is updated.
    """
    shown: list[tuple[str, Table | str]] = []
    for group, table in select_tables(controls, board.results).items():
        title = " ".join([f"{table.title}.", *table.notes])
        shown.append((title, tabulated.get(group) or _table(table.rows)))
        tabulated.setdefault(group, anchor)
    return shown


def _table(cells: Sequence[Mapping[str, str]]) -> Table:
    return Table(list(cells[0]), [list(row.values()) for row in cells])


def _inlined(item: CaptionedFigure, salt: str) -> Markup | None:
    return None if item.figure is None else Markup(inline_svg(item.figure, salt, item.summary))


def _sortable(value: float | str | None) -> float | str | None:
    return None if value is None or pd.isna(value) else value


def _recipe(result: Result) -> str:
    """Return a one-line summary of a result's suite; empty if it cannot be read."""
    suite = read_suite(result)
    if suite is None:
        return ""
    train = suite.data.train
    used, total = suite.data.count(train), train.images
    return (
        f"{suite.data.name}, {used:,}"
        + (f" of {total:,}" if used < total else "")
        + f" training images, {suite.data.classes} classes; {suite.schedule.epochs} epochs, "
        f"batch {suite.batch_size}, {suite.precision}, {suite.networks} networks"
    )


def _run_details(run: Result) -> RunDetails:
    env, cost = run.environment, run.cost
    facts = {"reason": run.reason, "command": env.command}
    if cost:
        facts["cost"] = _pairs(cost.model_dump(exclude_none=True))
    facts |= {
        "options": _pairs(run.options),
        "environment": _pairs(env.model_dump(exclude={"command"}, exclude_none=True)),
        "notes": _pairs(run.notes),
        "fingerprint": run.fingerprint,
    }
    top1 = run.last["student"].top1 if run.status == "finished" and run.last else None
    line = run.status if top1 is None else f"{top1:.2f} %"
    return RunDetails(run.identity.seed, run.status, line, {k: v for k, v in facts.items() if v})


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {_value(value)}" for name, value in values.items())


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
