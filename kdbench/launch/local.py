"""Runs a plan on this machine: run after run in this process, or several processes at a time."""

import contextlib
from collections.abc import Generator

from kdbench.data import Source, is_cached, locate
from kdbench.engine.device import make_accelerator
from kdbench.engine.mode import step_modes
from kdbench.errors import PlanInterruptedError, UserError
from kdbench.launch.display import Display
from kdbench.launch.execution import ALONE, Execution, open_images_together, run_and_save
from kdbench.launch.jobs import run_in_processes
from kdbench.launch.plan import PlannedRun, at_a_time
from kdbench.launch.ranks import Ranks
from kdbench.store import Result, check_writable


def execute(plan: list[PlannedRun], how: Execution, ranks: Ranks = ALONE) -> list[Result]:
    """Run what is to run; each result is written when it exists. Returns the new results.

    Raises:
        UserError: data that cannot be found or read, a folder that cannot be written.
        PlanAbandonedError: a run failed, and its processes are out of step.
        PlanInterruptedError: the user stopped it.
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
        check_writable(how.results)
        check_writable(how.runs)
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
    except KeyboardInterrupt:
        finished = len(plan) - len(todo) + len(done)
        raise PlanInterruptedError(_interrupted(finished, len(plan), how.overwrite)) from None
    return done


def _run_here(
    todo: list[PlannedRun], source: Source, how: Execution, display: Display, ranks: Ranks
) -> Generator[Result]:
    """The result of each run, when it exists."""
    accelerator = make_accelerator(how.runs, how.tensorboard)
    suite, names = todo[0].spec.suite, [run.spec.architecture for run in todo]
    place = accelerator.device, accelerator.num_processes
    modes = step_modes(how.compile, suite, names, *place)
    with display.note(source.reading()):
        images = open_images_together(source, accelerator.device, how, ranks)
    for run in todo:
        current = display.start(run.spec)
        mode = modes[run.spec.architecture]
        result = run_and_save(run.spec, images, how, accelerator, current, mode, ranks=ranks)
        current.finish(result)
        yield result


def _interrupted(done: int, total: int, overwrite: bool) -> str:
    kept = "the runs under way are kept up to their last whole epoch"
    if overwrite:
        kept = "runs not yet replaced keep their old results"
    again = "starts those again" if overwrite else "goes on from there"
    return (
        f"Interrupted: {done} of {total} runs are done and their results kept; {kept}. "
        f"The same command {again}."
    )
