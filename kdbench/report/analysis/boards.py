"""Boards: the rows of one table, and the runs behind them as data frames for figures."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd

from kdbench.report.analysis.summary import (
    BOARD_KEYS,
    each_board,
    leaderboard,
    row_names,
    runs_frame,
)
from kdbench.results.schema import Metrics, Result
from kdbench.roles import is_peer

Runs = Mapping[str, Sequence[Result]]
"""Runs by the name of their row in the leaderboard."""


@dataclass(frozen=True)
class Board:
    """The leaderboard of one suite and architecture."""

    title: str
    rows: pd.DataFrame
    """Rows of the leaderboard."""
    runs: Runs
    """Runs of each row, in the order of the rows."""

    @property
    def results(self) -> list[Result]:
        """All runs of the board."""
        return [result for results in self.runs.values() for result in results]


def boards(results: Sequence[Result], against: str) -> list[Board]:
    """Return the boards, ordered by suite and architecture.

    Several recipes with the same suite name are separate boards.
    """
    runs = runs_frame(results)
    table = leaderboard(runs, against)
    found = []
    for title, key, rows in each_board(table):
        names = row_names(runs[(runs[BOARD_KEYS] == list(key.values())).all(axis=1)])
        by_name = {row: [results[i] for i in names.index[names == row]] for row in rows.method}
        found.append(Board(title, rows, by_name))
    return found


def curves(runs: Runs) -> pd.DataFrame:
    """Return the student's top-1 after each epoch, including runs that did not finish."""
    rows = [
        (method, result.identity.seed, result.status == "finished", epoch.epoch, student.top1)
        for method, results in runs.items()
        for result in results
        for epoch in result.history
        if (student := epoch.metrics.get("student"))
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "finished", "epoch", "top1"])


def roles(runs: Runs) -> pd.DataFrame:
    """Return the top-1 of each role in the last epoch of finished runs.

    Role `peers` is the mean of all peers.
    """
    rows = [
        (method, result.identity.seed, role, top1)
        for method, results in runs.items()
        for result in results
        if result.status == "finished" and result.last
        for role, top1 in _by_role(result.last).items()
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "role", "top1"])


def _by_role(last: Mapping[str, Metrics]) -> dict[str, float]:
    peers = [m.top1 for role, m in last.items() if is_peer(role)]
    others = {
        role: metrics.top1 for role, metrics in last.items() if role != "mean" and not is_peer(role)
    }
    return others | ({"peers": fmean(peers)} if peers else {})


def losses(runs: Runs) -> pd.DataFrame:
    """Return the loss terms of each epoch: sums over roles by kind, means over finished runs."""
    rows = []
    for method, results in runs.items():
        finished = [result for result in results if result.status == "finished"]
        sums: dict[tuple[int, str], float] = defaultdict(float)
        for result in finished:
            for epoch in result.history:
                for term, loss in epoch.losses.items():
                    sums[epoch.epoch, term.split("/")[0]] += loss
        rows += [(method, *key, total / len(finished)) for key, total in sums.items()]
    return pd.DataFrame(rows, columns=["method", "epoch", "kind", "loss"])
