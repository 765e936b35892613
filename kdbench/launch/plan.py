"""What a command asks for, and what of it exists already."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch

import kdbench
from kdbench.atomic import exists
from kdbench.backbones import ARCHITECTURES
from kdbench.discovery import BrokenMethodError, MethodEntry, find_methods
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError, unknown_name_error
from kdbench.launch.match_cost import matched
from kdbench.launch.ranks import Ranks
from kdbench.method_names import method_names
from kdbench.results.files import DamagedFile, read_result, result_path
from kdbench.results.schema import Result
from kdbench.suite.suite import Suite

Overwrite = Literal["nothing", "stale", "all"]
"""Which results a plan replaces: stale ones were made by another version, or are damaged."""


@dataclass(frozen=True)
class PlannedRun:
    """A run and where its result goes."""

    spec: RunSpec
    file: Path
    state: Literal["to run", "finished", "diverged", "in the way"]
    """In the way: its place has what another version made, or what is no result."""
    reason: str = ""
    """Why it diverged, or what is in the way."""


def make_plan(
    suite: Suite,
    methods: list[str],
    architectures: list[str],
    seeds: int | None,
    settings: list[str],
    results: Path,
    overwrite: Overwrite = "nothing",
    on_broken: Callable[[BrokenMethodError], None] | None = None,
    match_cost: str | None = None,
    data_digest: Callable[[], str | None] = lambda: None,
) -> list[PlannedRun]:
    """All runs of methods x architectures x seeds.

    With `on_broken`, a method file that cannot be used is told and left out of the plan. With
    `match_cost`, each method has as many epochs as cost what the method of this name costs.
    `data_digest` returns the hash of the data that the suite finds now, or None if it finds none.

    Raises:
        UserError: an unknown name, or a method that does not fit the suite.
    """
    count = suite.seeds if seeds is None else seeds
    if count < 1:
        raise UserError(f"--seeds must be at least 1, not {count}.")
    specs = make_specs(suite, methods, architectures, count, settings, on_broken)
    if match_cost is not None:
        specs = matched(specs, match_cost)
    data_digest = cache(data_digest)
    return [_planned(spec, results, overwrite, data_digest) for spec in specs]


def check_nothing_in_the_way(plan: list[PlannedRun]) -> None:
    """Results are replaced only where that was asked for.

    Raises:
        UserError: with the first that would have to be, and how many.
    """
    blocked = [run for run in plan if run.state == "in the way"]
    if blocked:
        more = f" {len(blocked)} files are in the way of this plan;" if blocked[1:] else ""
        raise UserError(
            f"{blocked[0].reason};{more} --overwrite-stale replaces what is damaged or of another "
            "version and nothing else, another --results-dir keeps it."
        )


def agree(plan: list[PlannedRun], ranks: Ranks) -> list[PlannedRun]:
    """The plan of all processes; the main one's results decide what is to run.

    Raises:
        UserError: processes plan different runs.
    """
    seen = {
        "versions of kdbench and torch": f"{kdbench.__version__}, {torch.__version__}",
        "runs in the plan": ", ".join(run.spec.label for run in plan),
    }
    for spec in (run.spec for run in plan):
        seen[f"suite '{spec.suite.name}'"] = spec.suite.digest()
        seen[f"method '{spec.method_name}'"] = spec.entry.digest
    ranks.require_alike(seen, "give all machines the same command and the same files")
    own = [{"state": run.state, "reason": run.reason} for run in plan]
    of_main = json.loads(ranks.exchange("states", json.dumps(own))[0])
    return [replace(run, **told) for run, told in zip(plan, of_main, strict=True)]


def make_specs(
    suite: Suite,
    methods: list[str],
    architectures: list[str],
    seeds: int = 1,
    settings: Sequence[str] = (),
    on_broken: Callable[[BrokenMethodError], None] | None = None,
) -> list[RunSpec]:
    """All combinations of architectures, seeds and methods, each checked against the suite.

    Raises:
        UserError: an unknown name, or a method that does not fit the suite.
    """
    if not methods:
        raise UserError("--methods names no method; 'all' takes every one.")
    entries = find_methods(methods, on_broken)
    options = _options_by_method(settings, entries)
    names = _offered(suite, architectures or [suite.default_architecture])
    specs = [
        RunSpec(suite, architecture, entry, entry.options(options.get(entry.name, {})), seed)
        for architecture in names
        for seed in range(seeds)
        for entry in entries
    ]
    for spec in specs:
        spec.check()
    return specs


def at_a_time(plan: list[PlannedRun], jobs: int) -> int:
    """How many runs of a plan go at a time where `jobs` may.

    It depends on the whole plan, not on what is left of it: a run's share of the threads decides
    the last bits of its numbers, which must not depend on when the plan was stopped.
    """
    return min(jobs, len(plan))


def _offered(suite: Suite, names: Iterable[str]) -> list[str]:
    for name in (part for named in names for part in named.split("+")):
        if name not in ARCHITECTURES:
            raise unknown_name_error("architecture", name, ARCHITECTURES)
        if name not in suite.architectures:
            raise UserError(
                f"Suite '{suite.name}' does not offer the architecture '{name}'. "
                f"Choose from: {', '.join(suite.architectures)}."
            )
    return list(dict.fromkeys(names))


def _options_by_method(
    settings: Iterable[str], entries: list[MethodEntry]
) -> dict[str, dict[str, str]]:
    """`method.key=value` settings, by method."""
    names = [entry.name for entry in entries]
    found: dict[str, dict[str, str]] = {}
    for setting in settings:
        path, equals, value = setting.partition("=")
        method, dot, key = path.partition(".")
        if not (equals and dot and key):
            raise UserError(f"--set '{setting}' is not of the form METHOD.OPTION=VALUE.")
        if method not in names and method in method_names():
            raise UserError(f"--set '{setting}' is of a method that --methods does not name.")
        if method not in names:
            raise unknown_name_error("method in --set", method, names)
        found.setdefault(method, {})[key] = value
    return found


def _planned(
    spec: RunSpec, results: Path, overwrite: Overwrite, data_digest: Callable[[], str | None]
) -> PlannedRun:
    file = result_path(results, spec.identity())
    to_run = PlannedRun(spec, file, "to run")
    existing = read_result(file) if exists(file) else None
    if existing is None or overwrite == "all":
        return to_run
    if isinstance(existing, DamagedFile):
        problem = f"'{file}' is no valid result ({existing.reason})"
    elif existing.status == "failed":
        return to_run  # the reason may be outside the run; what diverged would diverge again
    elif existing.fingerprint != spec.fingerprint():
        problem = f"'{file}' was made by {_difference(spec, existing)}"
    elif existing.data is not None and data_digest() not in (None, existing.data):
        problem = f"'{file}' was made with other images or labels"
    else:
        return PlannedRun(spec, file, existing.status, existing.reason or "")
    return to_run if overwrite == "stale" else PlannedRun(spec, file, "in the way", problem)


def _difference(spec: RunSpec, existing: Result) -> str:
    ours, theirs = spec.identity(), existing.identity
    if ours.suite_hash != theirs.suite_hash:
        return f"another version of suite '{ours.suite}'"
    if ours.method_hash != theirs.method_hash:
        return f"another version of method '{ours.method}'"
    return "another version of kdbench or other options"
