"""Runs a plan on this machine: run after run in this process, or several processes at a time."""

import contextlib
from collections.abc import Generator
from functools import partial
from pathlib import Path

from kdbench.atomic import exists
from kdbench.data import Source, is_cached, locate
from kdbench.engine.compile_mode import resolve_compile_mode
from kdbench.engine.device import make_accelerator
from kdbench.engine.observer import CompositeObserver
from kdbench.engine.run_files import unwritable_folder_warning
from kdbench.engine.stop import Stop
from kdbench.errors import PlanInterruptedError, UnwritableError, UserError, pluralize
from kdbench.launch.claim import each_claimed
from kdbench.launch.death import record_unwritable
from kdbench.launch.display import Display
from kdbench.launch.execution import (
    ALONE,
    Execution,
    open_images_together,
    run_and_save,
    run_folder,
)
from kdbench.launch.jobs import run_in_processes
from kdbench.launch.plan import PlannedRun, at_a_time
from kdbench.launch.ranks import Ranks, tell
from kdbench.launch.status import NoReporter, StatusReporter
from kdbench.launch.watch import watch
from kdbench.results.files import check_writable
from kdbench.results.schema import Result
from kdbench.signals import SIGNALS, exit_code


def execute(plan: list[PlannedRun], how: Execution, ranks: Ranks = ALONE) -> list[Result]:
    """Run what is to run; each result is written when it exists. Returns the new results.

    Raises:
        UserError: data that cannot be found or read, a folder that cannot be written.
        PlanAbandonedError: a run failed, and its processes are out of step.
        PlanInterruptedError: the user stopped it, or a signal did.
    """
    if how.jobs > 1 and ranks.count > 1:
        raise UserError(
            "--jobs starts processes of its own, and a launcher started these; leave it out, or "
            "start 'kdbench run --num-processes N --jobs M' without a launcher."
        )
    todo = [run for run in plan if run.state == "to run"]
    if not todo:
        return []
    source = locate(todo[0].spec.suite.data, how.data_dir, is_cached)
    if ranks.is_main:
        _check_not_under_way(todo, how.runs)
        check_writable(how.runs)
        for folder in {how.results, *(_existing(run.file.parent) for run in todo)}:
            check_writable(folder)
    jobs = at_a_time(plan, how.jobs)
    done: list[Result] = []
    try:
        with Display(plan) as display:
            ranks.on_end = display.progress.stop
            if jobs > 1 or how.processes > ranks.count:
                results = run_in_processes(todo, jobs, source, how, display)
            else:
                results = _run_here(todo, source, how, display, ranks)
            with contextlib.closing(results):
                for result in results:
                    done.append(result)
    except KeyboardInterrupt as interrupt:
        finished = len(plan) - len(todo) + len(done)
        said = _interrupted(finished, len(plan), how.overwrite)
        raise PlanInterruptedError(said, exit_code(interrupt)) from None
    return done


def _existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above that is there."""
    return folder if exists(folder) else _existing(folder.parent)


def _check_not_under_way(todo: list[PlannedRun], runs: Path) -> None:
    """Two processes with one checkpoint would ruin it."""
    watched = watch(runs, [run_folder(runs, run.spec) for run in todo])
    submitted = [run for run in watched if run.under_way and run.status.ticket is not None]
    if submitted:
        raise UserError(
            f"{pluralize(len(submitted), 'run')} of these were sent to a cluster and are not over; "
            "follow them with `kdbench status`, or take them back with `kdbench cancel`."
        )


def _run_here(
    todo: list[PlannedRun], source: Source, how: Execution, display: Display, ranks: Ranks
) -> Generator[Result]:
    """The result of each run, when it exists."""
    accelerator = make_accelerator(how.runs, how.tensorboard, deterministic=how.deterministic)
    place = accelerator.device, accelerator.num_processes
    with display.note(source.reading()):
        images = open_images_together(source, accelerator.device, how, ranks)
    stop = Stop()
    claims = each_claimed(todo, how, ranks, display.say)
    with stop.on(*SIGNALS), contextlib.closing(claims):
        for run, made in claims:
            current = display.start(run.spec)
            if made is None:
                mode = resolve_compile_mode(
                    how.compile, run.spec.suite, run.spec.architecture, *place
                )
                try:
                    with _reporter(run, how, ranks) as reporter:
                        ranks.on_left = partial(tell, reporter)
                        watching = CompositeObserver(current, reporter)
                        made = run_and_save(
                            run.spec, images, how, accelerator, watching, mode, 1, ranks, stop
                        )
                        reporter.end(made.status, made.reason)
                    if reporter.unwritten is not None:
                        folder = run_folder(how.runs, run.spec)
                        current.on_message(unwritable_folder_warning(folder, reporter.unwritten))
                except UnwritableError as error:
                    if ranks.count > 1:
                        raise
                    made = record_unwritable(run.spec, how, error)
            current.finish(made)
            yield made


def _reporter(run: PlannedRun, how: Execution, ranks: Ranks) -> StatusReporter | NoReporter:
    if not ranks.is_main:
        return NoReporter()
    return StatusReporter(run_folder(how.runs, run.spec), run.spec)


def _interrupted(done: int, total: int, overwrite: bool) -> str:
    kept = "the runs under way are kept up to their last checkpoint"
    if overwrite:
        kept = "runs not yet replaced keep their old results"
    again = "starts those again" if overwrite else "goes on from there"
    return (
        f"Interrupted: {done} of {total} runs are done and their results kept; {kept}. "
        f"The same command {again}."
    )
