"""Runs a plan in this process, run after run."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from kdbench.data import Images, is_cached, load_images, locate
from kdbench.engine.checkpoint import remove_checkpoint
from kdbench.engine.device import make_accelerator
from kdbench.engine.mode import Compile, step_mode
from kdbench.engine.run import DivergedError, Run, empty_result
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import Mode
from kdbench.errors import PlanInterruptedError, UserError
from kdbench.launch.display import Display
from kdbench.launch.plan import PlannedRun
from kdbench.store import Result, Status, check_writable, save


@dataclass(frozen=True)
class Execution:
    """Where and how a plan runs."""

    results: Path
    runs: Path
    """For checkpoints and logs."""
    data_dir: Path | None = None
    compile: Compile = "auto"
    overwrite: bool = False
    """Start anew also where there is a checkpoint."""
    tensorboard: bool = False


def execute(plan: list[PlannedRun], how: Execution) -> list[Result]:
    """Run what is to run; each result is written when it exists. Returns the new results.

    Raises:
        UserError: data that cannot be found or read, a folder that cannot be written.
        PlanInterruptedError: the user stopped it.
    """
    todo = [run for run in plan if run.state == "to run"]
    if not todo:
        return []
    suite = todo[0].spec.suite
    source = locate(suite.data, how.data_dir, is_cached)
    check_writable(how.results)
    check_writable(how.runs)
    accelerator = make_accelerator(how.runs, how.tensorboard)
    modes = _modes(todo, how.compile, accelerator)
    done: list[Result] = []
    with Display(plan) as display:
        try:
            with display.note(f"Reading the images of {suite.data.name}"):
                train = load_images(source, suite.data.train).to(accelerator.device)
                test = load_images(source, suite.data.test).to(accelerator.device)
            for run in todo:
                folder = run_folder(how.runs, run.spec)
                if how.overwrite:
                    remove_checkpoint(folder)
                if how.tensorboard:
                    accelerator.init_trackers(str(folder.relative_to(how.runs)))
                display.start(run.spec)
                mode = modes[run.spec.architecture]
                result = run_one(run.spec, train, test, folder, accelerator, display, mode)
                save(how.results, result)
                done.append(result)
                display.finish(result)
        except KeyboardInterrupt:
            raise PlanInterruptedError(
                _interrupted(len(plan) - len(todo) + len(done), len(plan), how.overwrite)
            ) from None
    return done


def run_one(
    spec: RunSpec,
    train: Images,
    test: Images,
    folder: Path,
    accelerator: Accelerator,
    display: Display,
    mode: Mode = "eager",
) -> Result:
    """One run; whatever goes wrong in it is recorded as its result, so that the others go on.

    Raises:
        UserError: checkpoints cannot be written; the other runs could not write theirs either.
    """
    run: Run | None = None
    status: Status = "failed"
    try:
        run = Run(spec, train, test, folder, accelerator, display, mode)
        return run.train()
    except UserError:
        raise
    except DivergedError as error:
        status = "diverged"
        reason = str(error)
    except Exception as error:  # a method may raise anything; it must not take the plan with it
        reason = spec.entry.blame(error)
        if is_out_of_memory(error):
            peak = f", peak {run.memory.peak() / 2**20:,.0f} MiB" if run else ""
            reason = f"out of memory at batch size {spec.suite.batch_size}{peak}: {reason}"
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.free_memory()
    reason = without_paths(reason.strip().split("\n")[0])
    if run is None:
        return empty_result(spec, accelerator, status, reason)
    return run.result(status, reason)


def _modes(todo: list[PlannedRun], compile: Compile, accelerator: Accelerator) -> dict[str, Mode]:
    """How steps run, by architecture."""
    suite = todo[0].spec.suite
    place = accelerator.device, accelerator.num_processes
    names = {run.spec.architecture for run in todo}
    return {name: step_mode(compile, suite, name, *place) for name in names}


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device or of the host; torch's allocator on the CPU has no error of its own."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def run_folder(runs: Path, spec: RunSpec) -> Path:
    """Where a run keeps its checkpoint and log."""
    return runs / spec.suite.name / spec.architecture / spec.method_name / f"seed{spec.seed}"


def without_paths(text: str) -> str:
    """A message without the folders of this machine: results are published."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\",]+/)+", "", text)


def _interrupted(done: int, total: int, overwrite: bool) -> str:
    kept = "the current run is kept up to its last whole epoch"
    if overwrite:
        kept = "runs not yet replaced keep their old results"
    again = "starts those again" if overwrite else "goes on from there"
    return (
        f"Interrupted: {done} of {total} runs are done and their results kept; {kept}. "
        f"The same command {again}."
    )
