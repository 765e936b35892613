"""The columns of a leaderboard: the text of each cell, and the value it is sorted by."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from kdbench.errors import UserError, unknown_name_error
from kdbench.report.analysis.inference import MAX_SEEDS
from kdbench.report.analysis.summary import EXECUTION_KEYS

MISSING = "n/a"
"""Text of a cell whose value is not known."""

BETTER, WORSE, UNDECIDED = "▲", "▼", "≈"
"""Symbols of verdicts."""

ALWAYS = ("method", "top1", "n", "vs", "rate", "memory", "hours")
"""Default columns that are shown even if no value is known."""

DEFAULT = (
    *("rank", "method", "top1", "top5", "n", "vs", "verdict", "peers", "ensemble", "rate"),
    *("cost", "memory", "hours", "waiting", "params"),
)

PAPER = ("method", "top1", "top5", "n", "vs", "peers", "ensemble", "cost")
"""Default columns of LaTeX tables, which fit a printed page."""

OPTIONAL_COLUMNS = (
    *("waiting", "params", "hours", "memory", "peers", "rate", "cost", "ensemble", "top5"),
    "verdict",
)
"""Columns that are dropped on narrow terminals, least important first."""


@dataclass(frozen=True)
class Column:
    """One column of a leaderboard, in any format."""

    name: str
    """Name in --columns."""
    heading: str
    text: Callable[[pd.Series], str]
    """Function that returns the cell of a row; MISSING if it is not known."""
    value: Callable[[pd.Series], float | str | None]
    """Function that returns the value a row is sorted by; None if it is not known."""
    words: bool = False
    """True if the column holds text, which is left-aligned."""
    better: Literal["high", "low"] | None = None
    """Direction in which values are better."""


def columns(
    board: pd.DataFrame,
    names: Sequence[str] | None,
    against: str,
    default: Sequence[str] = DEFAULT,
) -> list[Column]:
    """Return the named columns of a leaderboard, or the usual ones.

    Args:
        board: the leaderboard.
        names: names of columns, or "all"; None means the usual ones.
        against: method that differences refer to.
        default: the usual columns. Columns without any known value are left out, and so are top-5
            with at most 100 classes and decoded images, and ranks if no difference is significant.

    Raises:
        UserError: A name is unknown, or there is none.
    """
    every = {column.name: column for column in _all_columns(board, against)}
    if not board.verdict.isin(["better", "worse"]).any():
        default = [name for name in default if name != "rank"]  # nothing is decided
    if names is None:
        hard = board.encoded.eq(True).any() or bool((board.classes.dropna() > 100).any())
        usual = [every[name] for name in default if hard or name != "top5"]
        return [column for column in usual if column.name in ALWAYS or _has_values(column, board)]
    if not names:
        raise UserError(f"--columns is empty; choose from: {', '.join([*every, 'all'])}.")
    chosen: dict[str, Column] = {}
    for name in names:
        if name != "all" and name not in every:
            raise unknown_name_error("column", name, [*every, "all"])
        chosen |= every if name == "all" else {name: every[name]}
    return list(chosen.values())


def _has_values(column: Column, board: pd.DataFrame) -> bool:
    return any(column.text(row) != MISSING for _, row in board.iterrows())


def _all_columns(board: pd.DataFrame, against: str) -> list[Column]:
    return [
        *_result_columns(board, against),
        *_cost_columns(board, against),
        Column(
            "best",
            "best on test % (optimistic)",
            _spread("best_on_test_top1"),
            _number("best_on_test_top1"),
            better="high",
        ),
        Column("values", "student top-1 % by seed", _by_seed, lambda row: None, words=True),
    ]


def _result_columns(board: pd.DataFrame, against: str) -> list[Column]:
    ranks = board.groupby(["suite", "suite_hash", "architecture"])["rank"].value_counts()
    tied = {key for key, count in ranks.items() if count > 1}

    def rank(row: pd.Series) -> str:
        if math.isnan(row["rank"]):
            return MISSING
        shared = (row.suite, row.suite_hash, row.architecture, row["rank"]) in tied
        return f"{row['rank']:.0f}{'=' if shared else ''}"

    return [
        Column("rank", "rank", rank, _number("rank"), better="low"),
        Column("method", "method", lambda row: row.method, lambda row: row.method, words=True),
        _accuracy("top1", "student top-1 %", "student_top1"),
        _accuracy("top5", "student top-5 %", "student_top5"),
        Column("n", "n", _count, lambda row: float(row.n)),
        Column("vs", f"vs {against}", _difference, _number("difference"), better="high"),
        Column("verdict", "verdict", _verdict, _number("p"), words=True, better="low"),
        Column("p", "p", lambda row: p_text(row.p), _number("p"), better="low"),
        Column(
            "flips",
            "p (sign flips)",
            lambda row: p_text(row.sign_flip_p),
            _number("sign_flip_p"),
            better="low",
        ),
        _accuracy("peers", "peers %", "peers_top1"),
        _accuracy("mean", "mean of networks %", "mean_top1"),
        _accuracy("ensemble", "ensemble %", "ensemble_top1"),
        _accuracy("gain", "ensemble - mean", "ensemble_gain"),
        Column(
            "disagreement",
            "disagreement of networks %",
            _spread("disagreement"),
            _number("disagreement"),
        ),
        _error("nll", "student NLL", "student_loss", digits=3),
        _error("ece", "student ECE %", "student_ece"),
        _error("brier", "student Brier", "student_brier", digits=3),
        _error("ensemble-ece", "ensemble ECE %", "ensemble_ece"),
    ]


def _rate_column(board: pd.DataFrame) -> Column:
    """Return the column of throughput, with what differs between the rows' executions."""
    differing = [name for name in EXECUTION_KEYS if board[name].nunique() > 1]

    def rate(row: pd.Series) -> str:
        if row.unmeasured:
            return str(row.unmeasured)
        text = _formatted("images_per_second", ",.0f")(row)
        ways = [
            row[name] if isinstance(row[name], str) else f"{name} {row[name]:.0f}"
            for name in differing
        ]
        return f"{text} ({', '.join(ways)})" if ways and text != MISSING else text

    return Column("rate", "images/s", rate, _number("images_per_second"), better="high")


def _memory(row: pd.Series) -> float | None:
    peak = _number("peak_memory_bytes")(row)
    return None if peak is None else peak / 2**20


def _cost_columns(board: pd.DataFrame, against: str) -> list[Column]:
    kinds = sorted(board.memory_kind.dropna().unique())
    hours = " or ".join("GPU-hours" if kind == "device" else "hours" for kind in kinds) or "hours"
    return [
        _rate_column(board),
        Column(
            "cost",
            f"cost (x {against})",
            _formatted("cost", ".2f"),
            _number("cost"),
            better="low",
        ),
        Column(
            "memory",
            f"peak MiB ({', '.join(kinds) or MISSING})",
            lambda row: number_text(_memory(row), ",.0f"),
            _memory,
            better="low",
        ),
        Column("hours", hours, _hours, _number("hours"), better="low"),
        Column("training", "training", _duration, _number("training_seconds"), better="low"),
        Column(
            "waiting",
            "waiting for data",
            _formatted("waiting_share", ".0%"),
            _number("waiting_share"),
            better="low",
        ),
        Column(
            "params",
            "params trained / deployed",
            _parameters,
            _number("parameters_trained"),
            better="low",
        ),
    ]


def _accuracy(name: str, heading: str, key: str) -> Column:
    return Column(name, heading, _spread(key), _number(key), better="high")


def _error(name: str, heading: str, key: str, digits: int = 2) -> Column:
    return Column(name, heading, _spread(key, digits), _number(key), better="low")


def _number(key: str) -> Callable[[pd.Series], float | None]:
    return lambda row: None if pd.isna(row[key]) else float(row[key])


def _formatted(key: str, spec: str) -> Callable[[pd.Series], str]:
    return lambda row: number_text(row[key], spec)


def number_text(number: float | None, spec: str) -> str:
    """Return a formatted number; MISSING if it is None or NaN."""
    return MISSING if number is None or math.isnan(number) else format(number, spec)


def p_text(p: float | None) -> str:
    """Return a p value with three decimals, or `< 0.001`."""
    return "< 0.001" if p is not None and p < 0.0005 else number_text(p, ".3f")


def interval_text(interval: tuple[float, float] | None) -> str:
    """Return an interval in percentage points, such as `-0.21 to +2.96`."""
    return MISSING if interval is None else "{:+.2f} to {:+.2f}".format(*interval)


def mean_and_deviation(mean: float, sd: float | None, digits: int = 2) -> str:
    """Return mean and sample standard deviation, such as `72.70 ± 0.16`; n/a for one value."""
    return f"{mean:.{digits}f} ± {number_text(sd, f'.{digits}f')}"


def _spread(key: str, digits: int = 2) -> Callable[[pd.Series], str]:
    def text(row: pd.Series) -> str:
        known = not pd.isna(row[key])
        return mean_and_deviation(row[key], row[f"{key}_sd"], digits) if known else MISSING

    return text


def _difference(row: pd.Series) -> str:
    """Return the difference with its interval, and the number of pairs if a seed has none."""
    if math.isnan(row.difference):
        return MISSING
    text = f"{row.difference:+.2f}"
    if not math.isnan(row.difference_low):
        text += f" [{row.difference_low:+.2f}, {row.difference_high:+.2f}]"
    return f"{text} ({row.pairs:.0f} of {row.n})" if row.pairs < row.n else text


def _verdict(row: pd.Series) -> str:
    """Return a symbol or word, with the number of seeds needed if there are not enough."""
    if row.verdict != "undecided":
        return {"better": BETTER, "worse": WORSE, "": MISSING}.get(row.verdict, row.verdict)
    if row.seeds_needed > row.pairs:
        return f"{UNDECIDED} {row.seeds_needed:.0f}"
    beyond = math.isnan(row.seeds_needed) and row.difference != 0
    return f"{UNDECIDED} > {MAX_SEEDS:,}" if beyond else UNDECIDED


def _count(row: pd.Series) -> str:
    lost = [f"{row[kind]} {kind}" for kind in ("diverged", "failed") if row[kind]]
    return f"{row.n} ({', '.join(lost)})" if lost else str(row.n)


def _by_seed(row: pd.Series) -> str:
    values = [f"{seed}: {top1:.2f}" for seed, top1 in sorted(row.student_top1_by_seed.items())]
    return ", ".join(values) or MISSING


def _hours(row: pd.Series) -> str:
    return number_text(row.hours, ",.1f" if row.hours >= 10 else ".2g")


def _duration(row: pd.Series) -> str:
    if math.isnan(row.training_seconds):
        return MISSING
    minutes, seconds = divmod(round(row.training_seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _parameters(row: pd.Series) -> str:
    if math.isnan(row.parameters_trained):
        return MISSING
    return f"{row.parameters_trained / 1e6:.2f} M / {row.parameters_deployed / 1e6:.2f} M"
