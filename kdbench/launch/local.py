"""Runs a plan on this machine: run after run in this process, or several processes at a time."""

import contextlib
from collections.abc import Generator

from accelerate import Accelerator

from kdbench.data import Source, is_cached, locate, open_images
from kdbench.engine.device import make_accelerator
from kdbench.engine.mode import Compile, step_mode
from kdbench.engine.step import Mode
from kdbench.errors import PlanInterruptedError
from kdbench.launch.display import Display
from kdbench.launch.execution import Execution, run_and_save
from kdbench.launch.jobs import run_in_processes
from kdbench.launch.plan import PlannedRun, at_a_time
from kdbench.store import Result, check_writable


def execute(plan: list[PlannedRun], how: Execution) -> list[Result]:
    """Run what is to run; each result is written when it exists. Returns the new results.

    Raises:
        UserError: data that cannot be found or read, a folder that cannot be written.
        PlanInterruptedError: the user stopped it.
    """
    todo = [run for run in plan if run.state == "to run"]
    if not todo:
        return []
    source = locate(todo[0].spec.suite.data, how.data_dir, is_cached)
    check_writable(how.results)
    check_writable(how.runs)
    jobs = at_a_time(plan, how.jobs)
    done: list[Result] = []
    try:
        with Display(plan) as display:
            if jobs > 1:
                results = run_in_processes(todo, jobs, source, how, display)
            else:
                results = _run_here(todo, source, how, display)
            with contextlib.closing(results):
                for result in results:
                    done.append(result)
    except KeyboardInterrupt:
        finished = len(plan) - len(todo) + len(done)
        raise PlanInterruptedError(_interrupted(finished, len(plan), how.overwrite)) from None
    return done


def _run_here(
    todo: list[PlannedRun], source: Source, how: Execution, display: Display
) -> Generator[Result]:
    """The result of each run, when it exists."""
    accelerator = make_accelerator(how.runs, how.tensorboard)
    modes = _modes(todo, how.compile, accelerator)
    with display.note(source.reading()):
        workers = how.decoding_processes(accelerator.num_processes)
        images = open_images(source, accelerator.device, workers)
    for run in todo:
        current = display.start(run.spec)
        mode = modes[run.spec.architecture]
        result = run_and_save(run.spec, images, how, accelerator, current, mode)
        current.finish(result)
        yield result


def _modes(todo: list[PlannedRun], compile: Compile, accelerator: Accelerator) -> dict[str, Mode]:
    """How steps run, by architecture."""
    suite = todo[0].spec.suite
    place = accelerator.device, accelerator.num_processes
    names = {run.spec.architecture for run in todo}
    return {name: step_mode(compile, suite, name, *place) for name in names}


def _interrupted(done: int, total: int, overwrite: bool) -> str:
    kept = "the runs under way are kept up to their last whole epoch"
    if overwrite:
        kept = "runs not yet replaced keep their old results"
    again = "starts those again" if overwrite else "goes on from there"
    return (
        f"Interrupted: {done} of {total} runs are done and their results kept; {kept}. "
        f"The same command {again}."
    )
