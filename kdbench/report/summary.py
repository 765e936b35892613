"""Results as a pandas frame, and one row per method with means over seeds."""

from collections.abc import Iterable

import pandas as pd

from kdbench.store import Result

BOARD = ["suite", "suite_hash", "architecture"]
"""What rows must share to stand in one table."""

IDENTITY = ["method", "method_hash", "seed"]
"""What tells the runs of a table apart."""

MADE = ["device", "precision", "step", "jobs", "processes"]
"""How a run was made: what explains a difference in its rates, and in precision its numbers."""

RUN_COLUMNS = {
    "student_top1": "last epoch, per cent",
    "student_top5": "last epoch, per cent",
    "mean_top1": "of the networks, last epoch, per cent",
    "ensemble_top1": "last epoch, per cent",
    "images_per_second": "median over windows of training steps",
    "peak_memory_bytes": "device memory, or resident memory of the process on a CPU",
    "training_seconds": "without evaluation",
    "waiting_share": "of the training, for data; missing where all images lie in memory",
    "parameters_trained": "",
    "parameters_deployed": "",
}


def runs_frame(results: Iterable[Result]) -> pd.DataFrame:
    """A row per run; numbers are missing where the run did not finish."""
    rows = [_run(result) for result in results]
    columns = [*BOARD, *IDENTITY, "status", *MADE, "images", "memory_kind", *RUN_COLUMNS]
    return pd.DataFrame(rows, columns=columns)


def leaderboard(runs: pd.DataFrame, against: str = "baseline") -> pd.DataFrame:
    """A row per suite, architecture and method, ordered by the student's mean accuracy.

    Accuracies are means over seeds with the sample standard deviation (`*_sd`, missing for one
    seed). `difference` is the mean over the seeds that both have: runs of one seed are paired.
    """
    boards = [_board(board, against) for _, board in runs.groupby(BOARD, sort=True)]
    return pd.concat(boards, ignore_index=True) if boards else pd.DataFrame()


def _run(result: Result) -> dict[str, object]:
    row: dict[str, object] = result.identity.model_dump(include={*BOARD, *IDENTITY})
    row["status"] = result.status
    row |= result.environment.model_dump(include=set(MADE))
    row["images"] = str(result.notes.get("images", ""))
    if result.status != "finished" or result.last is None or result.cost is None:
        return row
    row["student_top1"] = result.last["student"].top1
    row["student_top5"] = result.last["student"].top5
    for role in ("mean", "ensemble"):
        if role in result.last:
            row[f"{role}_top1"] = result.last[role].top1
    cost = result.cost.model_dump()
    row |= {name: cost[name] for name in RUN_COLUMNS if name in cost}
    row |= {"memory_kind": cost["peak_memory_kind"], "jobs": cost["jobs"]}
    return row


def _board(board: pd.DataFrame, against: str) -> pd.DataFrame:
    key = board[BOARD].iloc[0].to_dict()
    reference = board[board.method == against].set_index("seed").student_top1
    reference = reference[~reference.index.duplicated(keep=False)]
    # Two versions of a method are two rows, told apart by their hash; so are two precisions,
    # and images that were prepared beside the originals.
    names = board.method
    for column, label in (
        ("method_hash", board.method_hash.str[:8]),
        ("precision", board.precision),
        ("images", board.images),
    ):
        clashes = board.groupby("method")[column].transform("nunique") > 1
        names = names.where(~clashes, names + " (" + label + ")")
    rows = [
        {**key, "method": name, **_method(runs, reference)}
        for name, runs in board.groupby(names, sort=True)
    ]
    frame = pd.DataFrame(rows)
    return frame.sort_values("student_top1", ascending=False, na_position="last", kind="stable")


def _method(runs: pd.DataFrame, reference: pd.Series) -> dict[str, object]:
    finished = runs[runs.status == "finished"]
    paired = finished.set_index("seed").student_top1 - reference
    alone = finished[finished.jobs == 1]
    # Rates of different devices, or of compiled and eager steps, have no common mean.
    ways = alone[["device", "step", "processes"]].drop_duplicates()
    comparable = alone if len(ways) == 1 else alone[:0]
    return {
        "n": len(finished),
        "diverged": int((runs.status == "diverged").sum()),
        "failed": int((runs.status == "failed").sum()),
        "student_top1": finished.student_top1.mean(),
        "student_top1_sd": finished.student_top1.std(ddof=1),
        "student_top5": finished.student_top5.mean(),
        "difference": paired.mean(),
        "mean_top1": finished.mean_top1.mean(),
        "ensemble_top1": finished.ensemble_top1.mean(),
        "ensemble_top1_sd": finished.ensemble_top1.std(ddof=1),
        "shared": bool(len(finished)) and alone.empty,
        "step": comparable.step.max(),
        "images_per_second": comparable.images_per_second.median(),
        "peak_memory_bytes": comparable.peak_memory_bytes.max(),
        "memory_kind": comparable.memory_kind.max(),
        "training_seconds": comparable.training_seconds.mean(),
        "waiting_share": comparable.waiting_share.astype(float).mean(),
        "parameters_trained": finished.parameters_trained.max(),
        "parameters_deployed": finished.parameters_deployed.max(),
    }
