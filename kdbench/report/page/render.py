"""All results as one HTML page that needs no network and no other file."""

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
    groups_of,
)
from kdbench.report.analysis.protocol import description, suite_of
from kdbench.report.figures.captioned import Drawn, drawn
from kdbench.report.figures.style import drawing, inline_svg, visible
from kdbench.report.page.fidelity import FIDELITY, fidelity
from kdbench.report.tables.columns import Column, columns
from kdbench.report.tables.notes import clashes, doubts
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
    """Headings and rows of finished texts."""

    headings: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Cell:
    """Text, and the value that it is sorted by: None is last in either order."""

    text: str
    value: float | str | None


@dataclass(frozen=True)
class Fold:
    """One run: a line, and what stands behind it by its name."""

    seed: int
    status: str
    line: str
    facts: dict[str, str]


@dataclass(frozen=True)
class Section:
    """What the template shows of a board."""

    anchor: str
    title: str
    description: str
    recipe: str
    columns: list[Column]
    rows: dict[str, list[Cell]]
    """By method."""
    notes: list[str]
    """Below them."""
    published: Table | None
    """Numbers of others, under their own protocols."""
    published_notes: list[str]
    """Where they stand, and those protocols."""
    equal_cost: list[tuple[str, Table | str]]
    """Controls that were trained for as many FLOPs, under their titles; an anchor where the table
    stands there already, below a board of the same recipe over other epochs.
    """
    figures: dict[str, tuple[Drawn, Markup | None]]
    folds: dict[str, list[Fold]]
    """By method."""


def render_page(
    results: Sequence[Result],
    against: str,
    sources: Sequence[Source] = (),
    damaged: Sequence[DamagedFile] = (),
    names: Sequence[str] | None = None,
    siblings: Sequence[Result] = (),
) -> str:
    """The page; equal results give equal text.

    Args:
        results: at least one.
        against: method that differences and cost refer to.
        sources: of numbers that others have published.
        damaged: files that were left out.
        names: columns of the tables; None takes the usual ones.
        siblings: results of the same suites under other epochs, where they are not shown: they
            are in figures and tables of cost.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("kdbench.report"),
        autoescape=True,
        finalize=_finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    costed = [*results, *siblings]
    costs = cost_frame(costed)
    controls = equal_cost_tables(equal_cost(costed, against), against)
    templates = resources.files("kdbench.report") / "templates"
    script, style = ((templates / name).read_text("utf-8") for name in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = boards(results, against)
    others, notes = published_apart(sources, [board.rows for board in shown])
    tabulated: dict[Group, str] = {}
    return environment.get_template("page.html.j2").render(
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
        clashes=clashes(pd.concat([board.rows for board in shown])),
        published=_table(others) if others else None,
        published_notes=notes,
        against=against,
        runs=len(results),
        damaged=damaged,
        fidelity=fidelity(FIDELITY),
        script=Markup(script),
        style=Markup(style),
        script_hash=digest,
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
            for item in drawn(board, costs, against)
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
        doubts(board.rows),
        _published(sources, board),
        published_notes(sources, board.rows),
        _equal_cost(controls, board, tabulated, anchor),
        figures,
        {method: [_fold(run) for run in runs] for method, runs in board.runs.items()},
    )


def _published(sources: Sequence[Source], board: Board) -> Table | None:
    cells = published_cells(sources, board.rows)
    return _table(cells) if cells else None


def _equal_cost(
    controls: ByGroup, board: Board, tabulated: dict[Group, str], anchor: str
) -> list[tuple[str, Table | str]]:
    """Of the board's recipe, over any number of epochs; `tabulated` learns where it stands."""
    found = {group: controls[group] for group in groups_of(board.results) if group in controls}
    shown: list[tuple[str, Table | str]] = []
    for group, table in found.items():
        title = " ".join([f"{table.title}.", *table.notes])
        shown.append((title, tabulated.get(group) or _table(table.rows)))
        tabulated.setdefault(group, anchor)
    return shown


def _table(cells: Sequence[Mapping[str, str]]) -> Table:
    return Table(list(cells[0]), [list(row.values()) for row in cells])


def _inlined(item: Drawn, salt: str) -> Markup | None:
    return None if item.figure is None else Markup(inline_svg(item.figure, salt, item.summary))


def _sortable(value: float | str | None) -> float | str | None:
    return None if value is None or pd.isna(value) else value


def _recipe(result: Result) -> str:
    """Its suite in a line; nothing where it is not one that this version knows."""
    suite = suite_of(result)
    if suite is None:
        return ""
    train = suite.data.train
    used, there = suite.data.count(train), train.images
    return (
        f"{suite.data.name}, {used:,}"
        + (f" of {there:,}" if used < there else "")
        + f" training images, {suite.data.classes} classes; {suite.schedule.epochs} epochs, "
        f"batch {suite.batch_size}, {suite.precision}, {suite.networks} networks"
        + ("; reduced, so it ranks nothing" if used < there else "")
    )


def _fold(run: Result) -> Fold:
    made, cost = run.environment, run.cost
    facts = {"reason": run.reason, "command": made.command}
    if cost:
        facts["cost"] = _pairs(cost.model_dump(exclude_none=True))
    facts |= {
        "options": _pairs(run.options),
        "environment": _pairs(made.model_dump(exclude={"command"}, exclude_none=True)),
        "notes": _pairs(run.notes),
        "fingerprint": run.fingerprint,
    }
    top1 = run.last["student"].top1 if run.status == "finished" and run.last else None
    line = run.status if top1 is None else f"{top1:.2f} %"
    return Fold(run.identity.seed, run.status, line, {k: v for k, v in facts.items() if v})


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {_value(value)}" for name, value in values.items())


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
