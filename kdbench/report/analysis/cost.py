"""Accuracy against training cost, and comparison with a control at equal cost."""

import hashlib
import json
import math
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import pandas as pd

from kdbench.errors import pluralize, printable
from kdbench.report.analysis.inference import LEVEL, Comparison, compare_pairs
from kdbench.report.analysis.protocol import data_versions, read_suite
from kdbench.report.analysis.summary import EXECUTION_KEYS
from kdbench.report.tables.columns import interval_text, number_text, p_text
from kdbench.report.tables.render import TextTable
from kdbench.results.schema import Result
from kdbench.suite.suite import Suite

GROUP = ["suite", "key", "architecture"]
"""Columns that must be equal for two rows to be compared."""

ROW = [*GROUP, "method", "epochs"]

CONTROL = ["control_top1", "control_epochs", "control_versions", "difference"]
"""Columns of the equal-cost frame that belong to the control."""

Group = tuple[Hashable, ...]
"""Values of GROUP."""

ByGroup = dict[Group, TextTable]

SHAPE = 1000
"""Number of epochs to which schedules are scaled to compare their shapes."""

OPTIONAL_COLUMNS = ("PFLOP", "its epochs", "seeds", "p", f"{LEVEL:.0%} interval")
"""Columns that are dropped on narrow terminals, least important first."""

TOLERANCE = 0.05
"""Relative difference in training FLOPs up to which two runs cost the same."""


def cost_frame(results: Iterable[Result]) -> pd.DataFrame:
    """Return a frame with a row per suite, architecture, method and number of epochs.

    Only finished runs count. Results whose suite this version cannot read are left out.

    `suite` is the name without the number of epochs. `key` is a hash of everything else that must
    be equal: protocol, precision, images, data and harness version. `student_top1` is a mean in
    percent. `training_flops` is NaN if no run has it. `training_seconds` is NaN if runs shared a
    device, moved, or were executed in several ways; `way` is the way of execution. Two versions of
    a method are two rows, whose names contain the hash; `base` is the name without it.
    """
    return _frame(_runs(results))


def select_tables(tables: ByGroup, results: Iterable[Result]) -> ByGroup:
    """Return the tables of the groups that these results belong to, sorted by group."""
    groups = _runs(results)[GROUP].drop_duplicates().sort_values(GROUP)
    return {g: tables[g] for g in groups.itertuples(index=False, name=None) if g in tables}


def equal_cost(results: Iterable[Result], against: str = "baseline") -> pd.DataFrame:
    """Return a frame that compares each method with the control of nearest cost within TOLERANCE.

    The control is the method `against` with another number of epochs.

    Columns are those of ROW, `student_top1` and `training_flops` of the method, and of the control
    `control_top1` and `control_epochs` (NaN without a control) and `control_versions` (seeds may
    come from several versions). `difference` is the `Comparison` of the method with its control, or
    None without a control or a common seed; the methods of a group are one family of comparisons.
    """
    runs = _runs(results)
    runs["method"] = runs.method.where(runs.base != against, against)
    frame = _frame(runs)
    accuracy: dict[Any, dict[Any, float]] = {
        key: group.set_index("seed").student_top1.to_dict() for key, group in runs.groupby(ROW)
    }
    rows: list[dict[str, Any]] = []
    for _, group in frame[frame.method != against].groupby(GROUP):
        family = [row | {"difference": None} for row in _records(group)]
        controls = [_control(frame, row, against) for row in family]
        pairs = [(row, c) for row, c in zip(family, controls, strict=True) if c is not None]
        found = compare_pairs(accuracy, [(_key(row), _key(control)) for row, control in pairs])
        for (row, control), comparison in zip(pairs, found, strict=True):
            row |= {"control_top1": control["student_top1"], "difference": comparison}
            row |= {f"control_{name}": control[name] for name in ("epochs", "versions")}
        rows += family
    columns = [*ROW, "student_top1", "training_flops", *CONTROL]
    return pd.DataFrame(rows, columns=columns).astype({"difference": object})


def equal_cost_tables(found: pd.DataFrame, against: str = "baseline") -> ByGroup:
    """Return the tables of the `equal_cost` frame, by group.

    Groups without a control of another number of epochs have no table. Methods without a control
    are named in a note.
    """
    tables = {}
    recipes = found.groupby(["suite", "architecture"])["key"].nunique()
    for key, rows in found.groupby(GROUP, sort=True):
        # A control with the same number of epochs is in the leaderboard already.
        if (rows.control_epochs.notna() & (rows.control_epochs != rows.epochs)).any():
            suite, recipe, architecture = map(str, key)
            if recipes[suite, architecture] > 1:
                suite = f"{suite} ({recipe[:8]})"
            title = f"{suite}, {architecture}: {against} trained for equal FLOPs"
            has_control = rows.control_epochs.notna()
            notes = _uncontrolled(rows[~has_control], against)
            without = ", ".join(rows.method[rows.training_flops.isna()].unique())
            if without:
                notes.append(printable(f"The FLOPs of {without} are not known."))
            if (rows.control_versions > 1).any():
                notes.append(f"The seeds of {against} come from several versions of it.")
            cells = _cells(rows[has_control], against)
            tables[key] = TextTable(title, cells, ("method",), OPTIONAL_COLUMNS, notes=notes)
    return tables


def _uncontrolled(rows: pd.DataFrame, against: str) -> list[str]:
    known = rows[rows.training_flops.notna()]
    if known.empty:
        return []
    named = [
        f"{pluralize(epochs, 'epoch')} of {', '.join(known.method[known.epochs == epochs])}"
        for epochs in sorted(set(known.epochs))
    ]
    tolerance = f"{TOLERANCE:.0%}"
    runs = "; ".join(named)
    return [printable(f"No {against} was trained for equal FLOPs (within {tolerance}) as {runs}.")]


def _runs(results: Iterable[Result]) -> pd.DataFrame:
    """Return a frame with a row per finished run."""
    finished = [result for result in results if result.status == "finished" and result.last]
    rows = [
        _run(result, suite, data)
        for result, data in zip(finished, data_versions(finished), strict=True)
        if (suite := read_suite(result))
    ]
    columns = [
        *ROW,
        "base",
        "hash",
        "seed",
        "student_top1",
        *EXECUTION_KEYS,
        "alone",
        "flops",
        "seconds",
    ]
    runs = pd.DataFrame(rows, columns=columns)
    # Two versions of a method are two rows.
    ambiguous = runs.groupby([*GROUP, "method"]).hash.transform("nunique") > 1
    runs["method"] = runs.method.where(~ambiguous, runs.method + " (" + runs.hash.str[:8] + ")")
    return runs


def _run(result: Result, suite: Suite, data: str) -> dict[str, object]:
    assert result.last is not None
    identity, cost = result.identity, result.cost
    alike = [suite.digest(schedule=False), result.environment.precision]
    alike += [str(result.notes.get("images", "")), data, str(result.harness)]
    alike.append(_shape(suite))
    name, _, changes = identity.suite.partition("@")
    kept = [change for change in changes.split(",") if change and not change.startswith("epochs=")]
    return {
        "suite": f"{name}@{','.join(kept)}" if kept else name,
        "key": hashlib.sha256(json.dumps(alike).encode()).hexdigest()[:16],
        "architecture": identity.architecture,
        "method": identity.method,
        "base": identity.method,
        "epochs": suite.schedule.epochs,
        "hash": printable(identity.method_hash),
        "seed": identity.seed,
        "student_top1": result.last["student"].top1,
        **result.environment.model_dump(include=set(EXECUTION_KEYS)),
        "alone": result.is_alone,
        "flops": cost.training_flops if cost else None,
        "seconds": cost.training_seconds if cost else None,
    }


def _shape(suite: Suite) -> str:
    """Return the shape of the schedule, rounded because scaling is not exact."""
    whole = suite.schedule.scaled(SHAPE).model_dump(mode="json")
    starts = [round(epoch, 6) for epoch in (whole["warmup_epochs"], *whole["milestones"])]
    return f"{starts}, {whole['gamma']}"


def _frame(runs: pd.DataFrame) -> pd.DataFrame:
    groups = runs.groupby(ROW, sort=True)
    rows = [dict(zip(ROW, key, strict=True)) | _row(group) for key, group in groups]
    columns = [*ROW, "base", "versions", "n", "student_top1", "student_top1_sd"]
    columns += ["training_flops", "training_seconds", "way"]
    return pd.DataFrame(rows, columns=columns)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ROW)


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]


def _row(runs: pd.DataFrame) -> dict[str, object]:
    alone = runs[runs.alone]
    comparable = len(alone[EXECUTION_KEYS].drop_duplicates()) == 1
    return {
        "base": runs.base.iloc[0],
        "versions": runs.hash.nunique(),
        "n": len(runs),
        "student_top1": runs.student_top1.mean(),
        "student_top1_sd": runs.student_top1.std(ddof=1),
        "training_flops": float(runs.flops.astype(float).max()),
        "training_seconds": float(alone.seconds.mean()) if comparable else math.nan,
        "way": ", ".join(map(str, alone[EXECUTION_KEYS].iloc[0])) if comparable else None,
    }


def _control(frame: pd.DataFrame, row: Mapping[str, Any], against: str) -> dict[str, Any] | None:
    group = (frame[GROUP] == [row[name] for name in GROUP]).all(axis=1)
    controls = frame[group & (frame.method == against)]
    distance = (controls.training_flops / row["training_flops"] - 1).abs()
    near = distance[distance <= TOLERANCE]
    return None if near.empty else _records(controls.loc[[near.idxmin()]])[0]


def _cells(rows: pd.DataFrame, against: str) -> list[dict[str, str]]:
    return [
        {
            "method": row["method"],
            "epochs": str(row["epochs"]),
            "student top-1 %": number_text(row["student_top1"], ".2f"),
            "PFLOP": _pflop(row["training_flops"]),
            f"{against} %": number_text(row["control_top1"], ".2f"),
            "its epochs": number_text(row["control_epochs"], ".0f"),
        }
        | _difference(row["difference"])
        for row in _records(rows)
    ]


def _pflop(flops: float) -> str:
    return number_text(flops / 1e15, ".2g" if flops < 1e14 else ",.3f")


def _difference(found: Comparison | None) -> dict[str, str]:
    return {
        "difference": number_text(found.difference if found else None, "+.2f"),
        f"{LEVEL:.0%} interval": interval_text(found.interval if found else None),
        "p": p_text(found.p if found else None),
        "seeds": str(found.n if found else 0),
    }
