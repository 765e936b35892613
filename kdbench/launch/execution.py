"""One run of a plan, executed and recorded, whatever goes wrong in it."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from kdbench.data import ImageSet, LoaderError
from kdbench.engine.checkpoint import remove_checkpoint
from kdbench.engine.mode import Compile
from kdbench.engine.run import DivergedError, Observer, Run, empty_result
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import Mode
from kdbench.errors import UserError
from kdbench.launch.shares import cores
from kdbench.store import Result, Status, save


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
    jobs: int = 1
    """Runs at a time; more than one are processes of their own."""
    workers: int | None = None
    """Processes that decode images for each process that trains; None takes what cores there are.
    It changes no number."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: no run at a time, or less than no worker.
        """
        if self.jobs < 1:
            raise UserError(f"--jobs must be at least 1, not {self.jobs}.")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers must be at least 0, not {self.workers}.")

    def decoding_processes(self, processes: int) -> int:
        """For each of the processes of a run on this machine; one core is left to train."""
        if self.workers is not None:
            return self.workers
        return max(1, cores() // (processes * self.jobs) - 1)


def run_and_save(
    spec: RunSpec,
    images: tuple[ImageSet, ImageSet],
    how: Execution,
    accelerator: Accelerator,
    observer: Observer,
    mode: Mode,
    jobs: int = 1,
) -> Result:
    """One run, from its checkpoint where it has one, to its file among the results.

    `jobs` runs share the device, this one included.

    Raises:
        UserError: a folder that cannot be written.
    """
    folder = run_folder(how.runs, spec)
    if how.overwrite:
        remove_checkpoint(folder)
    if how.tensorboard:
        accelerator.init_trackers(str(folder.relative_to(how.runs)))
    result = run_one(spec, *images, folder, accelerator, observer, mode, jobs)
    save(how.results, result)
    return result


def run_one(
    spec: RunSpec,
    train: ImageSet,
    test: ImageSet,
    folder: Path,
    accelerator: Accelerator,
    observer: Observer,
    mode: Mode = "eager",
    jobs: int = 1,
) -> Result:
    """One run; whatever goes wrong in it is recorded as its result, so that the others go on.

    Raises:
        UserError: checkpoints cannot be written; the other runs could not write theirs either.
    """
    run: Run | None = None
    status: Status = "failed"
    try:
        run = Run(spec, train, test, folder, accelerator, observer, mode, jobs)
        return run.train()
    except UserError:
        raise
    except DivergedError as error:
        status = "diverged"
        reason = str(error)
    except LoaderError as error:
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


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device or of the host; torch's allocator on the CPU has no error of its own."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def run_folder(runs: Path, spec: RunSpec) -> Path:
    """Where a run keeps its checkpoint, log and status."""
    return runs / spec.suite.name / spec.architecture / spec.method_name / f"seed{spec.seed}"


def without_paths(text: str) -> str:
    """A message without the folders of this machine: results are published."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\",]+/)+", "", text)
