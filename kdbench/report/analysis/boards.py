"""Boards: what may stand in one table, and the runs behind it as plain frames for figures."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import pandas as pd

from kdbench.report.analysis.summary import BOARD, each_board, leaderboard, row_names, runs_frame
from kdbench.results.schema import Metrics, Result
from kdbench.roles import is_peer

Runs = Mapping[str, Sequence[Result]]
"""By the name of their row in the leaderboard."""


@dataclass(frozen=True)
class Board:
    """One suite and architecture."""

    title: str
    rows: pd.DataFrame
    """Of the leaderboard."""
    runs: Runs
    """In the order of the rows."""

    @property
    def results(self) -> list[Result]:
        return [result for results in self.runs.values() for result in results]


def boards(results: Sequence[Result], against: str) -> list[Board]:
    """Ordered by suite and architecture; recipes of one name are told apart by their hash."""
    runs = runs_frame(results)
    table = leaderboard(runs, against)
    made = []
    for title, key, rows in each_board(table):
        names = row_names(runs[(runs[BOARD] == list(key.values())).all(axis=1)])
        by_name = {row: [results[i] for i in names.index[names == row]] for row in rows.method}
        made.append(Board(title, rows, by_name))
    return made


def curves(runs: Runs) -> pd.DataFrame:
    """The student's top-1 after each epoch, unfinished runs included."""
    rows = [
        (method, result.identity.seed, result.status == "finished", epoch.epoch, student.top1)
        for method, results in runs.items()
        for result in results
        for epoch in result.history
        if (student := epoch.metrics.get("student"))
    ]
    return pd.DataFrame(rows, columns=["method", "seed", "finished", "epoch", "top1"])


def roles(runs: Runs) -> pd.DataFrame:
    """Top-1 of each role in the last epoch of finished runs; `peers` is the peers' mean."""
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
    """Loss terms after each epoch: a kind's sum over roles, mean over finished runs."""
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
