"""What methods cost, and what they buy with it."""

from collections.abc import Iterable

import pandas as pd

from kdbench.report.summary import leaderboard, runs_frame
from kdbench.store import Result


def cost_frame(results: Iterable[Result]) -> pd.DataFrame:
    """A row per suite, architecture, method and number of epochs."""
    results = list(results)
    board = leaderboard(runs_frame(results))
    flops: dict[tuple[str, str, str], float] = {}
    epochs: dict[str, int] = {}
    for result in results:
        key = (result.identity.suite_hash, result.identity.architecture, result.identity.method)
        if result.cost and result.cost.training_flops:
            flops[key] = float(result.cost.training_flops)
        epochs[result.identity.suite_hash] = result.protocol["schedule"]["epochs"]
    keys = list(zip(board.suite_hash, board.architecture, board.method, strict=True))
    return board.assign(
        key=board.suite_hash,
        epochs=board.suite_hash.map(epochs),
        training_flops=[flops.get(key, float("nan")) for key in keys],
        pareto=False,
    )[
        ["suite", "key", "architecture", "method", "epochs", "n", "student_top1"]
        + ["student_top1_sd", "training_flops", "training_seconds", "pareto"]
    ]
