"""Results as a data frame, and the leaderboard with one row per method."""

import math
from collections.abc import Iterable, Iterator

import pandas as pd

from kdbench.errors import printable
from kdbench.report.analysis.protocol import data_versions, description, read_suite
from kdbench.report.analysis.verdicts import compare_rows
from kdbench.results.schema import TRAINED_BEFORE, Result
from kdbench.roles import is_peer

BOARD_KEYS = ["suite", "suite_hash", "architecture"]
"""Columns that are equal for all rows of one table."""

IDENTITY_KEYS = ["method", "method_hash", "seed"]
"""Columns that identify a run within a table."""

EXECUTION_KEYS = ["device", "step", "processes", "threads"]
"""Columns on how a run was executed, on which rates, times and memory depend."""

RUN_KEYS = [*EXECUTION_KEYS, "precision", "jobs"]
"""Columns of the environment of a run that can explain differences."""

COMPARABILITY_KEYS = ["precision", "images", "data", "harness"]
"""Columns that must be equal for two rows to be compared."""

PROTOCOL_KEYS = ["description", "dataset", "classes", "encoded", "all_images", "epochs"]
"""Columns that describe the suite; missing if this version cannot read it."""

ACCURACIES = {
    "student_top1": "last epoch, per cent",
    "student_top5": "last epoch, per cent",
    "student_loss": "mean cross-entropy (negative log-likelihood), last epoch",
    "student_ece": "expected calibration error, last epoch, per cent",
    "student_brier": "Brier score, last epoch",
    "peers_top1": "mean of the networks that are not deployed, last epoch, per cent",
    "mean_top1": "of the networks, last epoch, per cent",
    "ensemble_top1": "last epoch, per cent",
    "ensemble_ece": "expected calibration error, last epoch, per cent",
    "ensemble_gain": "top-1 of the ensemble minus the mean of the networks, percentage points",
    "disagreement": "images that two networks classify differently, mean over pairs, per cent",
    "best_on_test_top1": "the student's best epoch on the test set: optimistic, per cent",
}

RUN_COLUMNS = ACCURACIES | {
    "images_per_second": "median over windows of training steps",
    "peak_memory_bytes": "device memory, or resident memory of the process on a CPU",
    "training_seconds": "without evaluation",
    "hours": "of training, on each GPU and summed, or on a CPU",
    "waiting_share": "of the training, for data; missing where all images lie in memory",
    "training_flops": "of all training steps; missing in results of earlier versions",
    "parameters_trained": "",
    "parameters_deployed": "",
}


def runs_frame(results: Iterable[Result]) -> pd.DataFrame:
    """Return a frame with a row per run; numbers are missing if the run did not finish."""
    results = list(results)
    versions = data_versions(results)
    rows = [
        _run(result) | {"data": f"data {version[:8]}" if version else ""}
        for result, version in zip(results, versions, strict=True)
    ]
    columns = [
        *BOARD_KEYS,
        *PROTOCOL_KEYS,
        *IDENTITY_KEYS,
        "status",
        *RUN_KEYS,
        "images",
        "data",
        "harness",
        "moved",
        "alone",
    ]
    columns += ["memory_kind", *RUN_COLUMNS]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype(dict.fromkeys(RUN_COLUMNS, float))


def leaderboard(runs: pd.DataFrame, against: str = "baseline") -> pd.DataFrame:
    """Return a frame with a row per suite, architecture and method, ordered by mean accuracy.

    `method` is the name of a row. `base` is the method, of which there may be several versions.

    Accuracies are means over seeds with the sample standard deviation (`*_sd`, missing for one
    seed). `student_top1_by_seed` holds the values of each seed. Means that are equal to two
    decimals share a `rank` (1, 2, 2, 4). Rows without a finished run have none.

    `difference` is the difference of the student from that of `against`, with `pairs` common seeds.
    `difference_low` and `difference_high` are its interval and `p` its p value, which hold for all
    comparisons of the board together. `sign_flip_p` is that of the sign-flip test, missing if so
    few seeds cannot decide. `verdict` is one of `verdicts.VERDICTS`. `seeds_needed` is the number
    of seeds that would show such a difference. `among_best` is true if the student does not differ
    significantly from the best one, and missing if no difference from it is significant.

    `cost` is in training FLOPs relative to `against`. Rates, times and memory come from runs that
    had one device to themselves. If a method was executed in several ways, they come from the way
    that most methods of the board share. Otherwise `unmeasured` gives the reason.
    """
    boards = [_board(board, against) for _, board in runs.groupby(BOARD_KEYS, sort=True)]
    return pd.concat(boards, ignore_index=True) if boards else pd.DataFrame()


def each_board(table: pd.DataFrame) -> Iterator[tuple[str, dict[str, str], pd.DataFrame]]:
    """Yield title, key and rows of each board of a leaderboard.

    Several recipes with the same suite name are separate boards, whose titles contain the hash.
    """
    recipes = table.groupby("suite").suite_hash.nunique()
    for values, rows in table.groupby(BOARD_KEYS, sort=True):
        key = dict(zip(BOARD_KEYS, map(str, values), strict=True))
        name = key["suite"]
        if recipes[name] > 1:
            name = f"{name} ({key['suite_hash'][:8]})"
        yield f"{name}, {key['architecture']}", key, rows


def row_names(board: pd.DataFrame) -> "pd.Series[str]":
    """Return the name of the leaderboard row of each run of a board.

    Two versions of a method are two rows, whose names contain the hash. If a board has several
    precisions, kinds of images, data or harness versions, the name of each row contains its own.
    """
    finished = board[board.status == "finished"]
    versions = finished.groupby("method").method_hash.nunique()
    ambiguous = board.method.map(versions).fillna(0) > 1
    names = board.method.where(~ambiguous, board.method + " (" + board.method_hash.str[:8] + ")")
    for kind in COMPARABILITY_KEYS:
        # Runs that did not finish may not know their kind of images, so they do not count here.
        if finished[kind].nunique() > 1:
            names = names + (" (" + board[kind] + ")").where(board[kind] != "", "")
    return names


def _run(result: Result) -> dict[str, object]:
    row: dict[str, object] = result.identity.model_dump(include={*BOARD_KEYS, *IDENTITY_KEYS})
    row["status"] = result.status
    row |= _protocol(result) | result.environment.model_dump(include=set(RUN_KEYS))
    row |= {"harness": f"harness {result.harness}", "moved": TRAINED_BEFORE in result.notes}
    row |= {"images": _images(result), "alone": result.is_alone}
    if result.status == "finished" and result.last is not None and result.cost is not None:
        row |= _accuracies(result)
        cost = result.cost.model_dump()
        row |= {name: cost[name] for name in RUN_COLUMNS if name in cost}
        row |= {"memory_kind": cost["peak_memory_kind"], "jobs": cost["jobs"]}
        devices = result.environment.processes if row["memory_kind"] == "device" else 1
        row["hours"] = result.cost.training_seconds * devices / 3600
    return {k: printable(item) if isinstance(item, str) else item for k, item in row.items()}


def _images(result: Result) -> str:
    """Return the kind of images; empty if the run failed before it opened them."""
    return str(result.notes.get("images", "originals" if result.status == "finished" else ""))


def _accuracies(result: Result) -> dict[str, object]:
    last = result.last or {}
    row: dict[str, object] = {
        f"{role}_top1": last[role].top1 for role in ("student", "mean", "ensemble") if role in last
    }
    row["student_top5"] = last["student"].top5
    for name in ("loss", "ece", "brier"):
        row[f"student_{name}"] = getattr(last["student"], name)
    if "ensemble" in last and "mean" in last:
        row["ensemble_ece"] = last["ensemble"].ece
        row["ensemble_gain"] = last["ensemble"].top1 - last["mean"].top1
        row["disagreement"] = last["mean"].disagreement
    peers = [metrics.top1 for role, metrics in last.items() if is_peer(role)]
    if peers:
        row["peers_top1"] = sum(peers) / len(peers)
    if result.best_on_test is not None and "student" in result.best_on_test.metrics:
        row["best_on_test_top1"] = result.best_on_test.metrics["student"].top1
    return row


def _protocol(result: Result) -> dict[str, object]:
    suite = read_suite(result)
    if suite is None:
        return {}
    data = suite.data
    return {
        "description": description(result),
        "dataset": data.name,
        "classes": data.classes,
        "encoded": data.encoded,
        "all_images": all(data.count(part) == part.images for part in (data.train, data.test)),
        "epochs": suite.schedule.epochs,
    }


def _board(board: pd.DataFrame, against: str) -> pd.DataFrame:
    key = board[BOARD_KEYS].iloc[0].to_dict()
    protocol = board[PROTOCOL_KEYS].iloc[0].to_dict()
    usual = _most_common_execution(board)
    rows = [
        {
            **key,
            "method": name,
            **_method(runs, against, usual),
            **protocol,
            "base": runs.method.iloc[0],
        }
        for name, runs in board.groupby(row_names(board), sort=True)
    ]
    frame = pd.DataFrame(rows)
    frame = frame.join(pd.DataFrame(compare_rows(frame, list(frame.pop("students")))))
    flops = frame.training_flops[frame.reference].dropna().unique()
    frame["cost"] = frame.training_flops / (flops[0] if len(flops) == 1 else math.nan)
    shown = frame.student_top1.map(lambda mean: round(mean, 2))
    frame["rank"] = shown.rank(method="min", ascending=False)
    return frame.sort_values("student_top1", ascending=False, na_position="last", kind="stable")


def _most_common_execution(board: pd.DataFrame) -> list[object]:
    """Return the way of execution that most methods, and then most runs, of a board share."""
    alone = board[(board.status == "finished") & board.alone]
    counts = (
        alone.groupby(EXECUTION_KEYS)
        .method.agg(["nunique", "size"])
        .sort_values(["nunique", "size"])
    )
    return list(counts.index[-1]) if len(counts) else []


def _method(runs: pd.DataFrame, against: str, usual: list[object]) -> dict[str, object]:
    finished = runs[runs.status == "finished"]
    alone = finished[finished.alone]
    # Rates of different devices, or of compiled and eager steps, must not be averaged.
    several = len(alone[EXECUTION_KEYS].drop_duplicates()) > 1
    comparable = alone[(alone[EXECUTION_KEYS] == usual).all(axis=1)] if several else alone
    accuracies = finished[list(ACCURACIES)]
    return {
        "n": len(finished),
        "diverged": int((runs.status == "diverged").sum()),
        "failed": int((runs.status == "failed").sum()),
        "student_top1_by_seed": dict(zip(finished.seed, finished.student_top1, strict=True)),
        "students": dict(zip(finished.seed, _student_metrics(finished), strict=True)),
        **accuracies.mean(),
        **accuracies.std(ddof=1).add_suffix("_sd"),
        "unmeasured": _unmeasured_reason(finished) if alone.empty else "",
        **comparable[EXECUTION_KEYS].max(),
        "images_per_second": comparable.images_per_second.median(),
        "peak_memory_bytes": comparable.peak_memory_bytes.max(),
        "memory_kind": comparable.memory_kind.max(),
        "training_seconds": comparable.training_seconds.mean(),
        "hours": comparable.hours.mean(),
        "waiting_share": comparable.waiting_share.mean(),
        "training_flops": finished.training_flops.max(),
        "parameters_trained": finished.parameters_trained.max(),
        "parameters_deployed": finished.parameters_deployed.max(),
        "reference": bool((runs.method == against).all()),
        "kind": ", ".join(
            kind for name in COMPARABILITY_KEYS for kind in sorted(set(finished[name]))
        ),
    }


def _student_metrics(runs: pd.DataFrame) -> list[tuple[float, ...]]:
    columns = ["student_top1", "student_top5", "student_loss"]
    return [tuple(row) for row in runs[columns].itertuples(index=False)]


def _unmeasured_reason(finished: pd.DataFrame) -> str:
    """Return in one word why a row has no rate, time and memory."""
    if finished.empty:
        return ""
    return "moved" if finished.moved.any() else "shared"
