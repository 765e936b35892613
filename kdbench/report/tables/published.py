"""Published numbers of other authors, each with its protocol. They are shown but never ranked.

There is one TOML file per source, results/published/<source>.toml. It omits what the source does
not state.
"""

import math
import statistics
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import pandas as pd
from pydantic import Field, ValidationError, model_validator

from kdbench.errors import printable
from kdbench.report.tables.columns import MISSING, mean_and_deviation
from kdbench.results.files import DamagedFile, read_small_file
from kdbench.results.schema import Percent
from kdbench.suite.sections import Pair, Positive, Section
from kdbench.validation import describe_problems

TITLE = "Published by others (their protocols; not ranked)"
NOT_STATED = "not stated"

WORDS = ("method", "source")
"""Columns of text, which are left-aligned."""

PUBLISHED_OPTIONAL_COLUMNS = ("batch", "network", "networks", "runs", "weight decay", "epochs")
"""Columns that are dropped on narrow terminals, least important first."""

OUR_BEST = "ours, best on test %"
"""Column for sources that report the best epoch on the test set."""

MIN_EPOCHS = {False: 100, True: 90}
"""Least number of epochs of a suite with published numbers, by whether images are encoded."""

EPOCHS_TOLERANCE = 0.05
"""Relative difference in the number of epochs up to which numbers are subtracted."""


class Entry(Section):
    """One published number: the accuracies of its runs, their mean, or a range."""

    architecture: str
    method: str
    """Name of the method; kdbench's name if kdbench has it."""
    role: str | None = None
    """Role of the network whose accuracy it is."""
    top1: Annotated[tuple[Percent, ...], Field(strict=False, min_length=1)] | None = None
    mean: Percent | None = None
    sd: Percent | None = None
    range: Pair | None = None

    @model_validator(mode="after")
    def _one_number(self) -> Self:
        if sum(form is not None for form in (self.top1, self.mean, self.range)) != 1:
            raise ValueError("give one of top1, mean and range")
        if self.sd is not None and self.mean is None:
            raise ValueError("sd goes with mean")
        return self

    @property
    def center(self) -> float | None:
        """Mean accuracy in percent; None for a range."""
        return self.mean if self.top1 is None else statistics.fmean(self.top1)

    @property
    def text(self) -> str:
        """Number as tables show it."""
        if self.range is not None:
            return f"{self.range[0]:.2f} to {self.range[1]:.2f}"
        sd = self.sd if self.top1 is None or len(self.top1) < 2 else statistics.stdev(self.top1)
        return f"{self.center:.2f}" if sd is None else mean_and_deviation(self.center or 0, sd)


class Table(Section):
    """Published numbers that share one protocol."""

    dataset: str
    """Name of the dataset, as in suites."""
    protocol: str
    """Description of the protocol."""
    epochs: Positive | None = None
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    networks: Positive | None = None
    batch_size: Positive | None = None
    epoch: Literal["best on test", "last"] | None = None
    """Epoch that the numbers are from."""
    runs: Positive | None = None
    entries: Annotated[tuple[Entry, ...], Field(strict=False, min_length=1)]


class Source(Section):
    """A paper or another source of published numbers."""

    name: str
    """Short citation for tables."""
    authors: str | None = None
    title: str | None = None
    venue: str | None = None
    year: Positive | None = None
    url: str | None = None
    tables: Annotated[tuple[Table, ...], Field(strict=False, min_length=1)]


def read_published(results: Path) -> Iterator[Source | DamagedFile]:
    """Yield all sources of a results folder, or the reason why a file is not valid."""
    for file in sorted(results.glob("published/*.toml")):
        try:
            content = tomllib.loads(read_small_file(file).decode())
            yield Source.model_validate(content)
        except ValidationError as error:
            yield DamagedFile(file, "; ".join(describe_problems(error, Source)))
        except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or nested too deeply
            yield DamagedFile(file, f"it is not valid TOML: {error}")
        except OSError as error:
            yield DamagedFile(file, error.strerror or str(error))


def published_cells(sources: Sequence[Source], board: pd.DataFrame) -> list[dict[str, str]]:
    """Return a row for each published number on a board's dataset and architecture.

    Suites that use a part of the images or too short a schedule have none. The column `ours less
    theirs` is filled if the board has the same method with about as many epochs; it names the
    epoch that our number is from. Protocols differ nevertheless.
    """
    ours = board.drop_duplicates("base", keep=False).set_index("base")
    rows = [
        _cells(source, table, entry, _ours(table, entry, ours))
        for source, table, entry in _published_for(sources, board)
    ]
    if all(row[OUR_BEST] == MISSING for row in rows):
        rows = [{key: text for key, text in row.items() if key != OUR_BEST} for row in rows]
    return [{key: printable(text) for key, text in row.items()} for row in rows]


def published_notes(sources: Sequence[Source], board: pd.DataFrame) -> list[str]:
    """Return the sources and protocols of the numbers in `published_cells`."""
    notes = [_note(source, table) for source, table, _ in _published_for(sources, board)]
    return [printable(note) for note in dict.fromkeys(notes)]


def published_apart(
    sources: Sequence[Source], boards: Sequence[pd.DataFrame]
) -> tuple[list[dict[str, str]], list[str]]:
    """Return cells and notes of the published numbers that belong to none of the boards."""
    shown = [id(entry) for board in boards for *_, entry in _published_for(sources, board)]
    cells, notes = [], []
    for source in sources:
        for table in source.tables:
            for entry in table.entries:
                if id(entry) in shown:
                    continue
                row = {"data set": table.dataset, "architecture": entry.architecture}
                row |= _cells(source, table, entry, {})
                cells.append({key: printable(text) for key, text in row.items()})
                notes.append(printable(_note(source, table)))
    return cells, list(dict.fromkeys(notes))


def _note(source: Source, table: Table) -> str:
    dated = " ".join(str(part) for part in (source.venue, source.year) if part is not None)
    about = [part for part in (source.authors, source.title, dated, source.url) if part]
    return f"{source.name}: {table.protocol}" + (f" ({', '.join(about)})" if about else "")


def _published_for(
    sources: Sequence[Source], board: pd.DataFrame
) -> Iterator[tuple[Source, Table, Entry]]:
    """Yield the published numbers on a board's dataset and architecture, if they are comparable."""
    suite = board.iloc[0]
    if pd.isna(suite.epochs) or not suite.all_images:
        return
    if suite.epochs < MIN_EPOCHS[bool(suite.encoded)]:
        return
    for source in sources:
        for table in source.tables:
            for entry in table.entries:
                if (table.dataset, entry.architecture) == (suite.dataset, suite.architecture):
                    yield source, table, entry


def _ours(table: Table, entry: Entry, board: pd.DataFrame) -> dict[str, str]:
    """Return our number from the epoch that theirs is from, or from the last if it is unknown."""
    best = table.epoch == "best on test"
    cells = dict.fromkeys((OUR_BEST, "ours less theirs"), MISSING)
    column = "best_on_test_top1" if best else "student_top1"
    mean = board[column].get(entry.method, math.nan)
    if math.isnan(mean):
        return cells
    if best:
        cells[OUR_BEST] = mean_and_deviation(mean, board[f"{column}_sd"][entry.method])
    epochs = board.epochs[entry.method]
    if entry.center is not None and abs(epochs / (table.epochs or epochs) - 1) <= EPOCHS_TOLERANCE:
        epoch = "best on test" if best else "last epoch"
        cells["ours less theirs"] = f"{mean - entry.center:+.2f} ({epoch})"
    return cells


def _cells(source: Source, table: Table, entry: Entry, ours: Mapping[str, str]) -> dict[str, str]:
    return {
        "method": entry.method,
        "source": source.name,
        "top-1 %": entry.text,
        **ours,
        "network": entry.role or NOT_STATED,
        "epochs": _stated(table.epochs),
        "epoch shown": table.epoch or NOT_STATED,
        "weight decay": _stated(table.weight_decay),
        "networks": _stated(table.networks),
        "batch": _stated(table.batch_size),
        "runs": _stated(len(entry.top1) if entry.top1 else table.runs),
    }


def _stated(value: float | None) -> str:
    return NOT_STATED if value is None else f"{value:g}"
