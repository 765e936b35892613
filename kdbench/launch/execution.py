"""One run of a plan, executed and recorded, whatever goes wrong in it."""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from kdbench.data import Images, Source, load_images
from kdbench.engine.checkpoint import remove_checkpoint
from kdbench.engine.mode import Compile
from kdbench.engine.observer import Observer
from kdbench.engine.run import DivergedError, Run, empty_result
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import Mode
from kdbench.engine.stop import Stop
from kdbench.errors import UserError
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

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: no run at a time.
        """
        if self.jobs < 1:
            raise UserError(f"--jobs must be at least 1, not {self.jobs}.")


def read_images(source: Source, device: torch.device) -> tuple[Images, Images]:
    """The training and the test images.

    Raises:
        UserError: they cannot be read, or are not the data set the suite names.
    """
    train, test = (load_images(source, split) for split in (source.data.train, source.data.test))
    return train.to(device), test.to(device)


def run_and_save(
    spec: RunSpec,
    images: tuple[Images, Images],
    how: Execution,
    accelerator: Accelerator,
    observer: Observer,
    mode: Mode,
    jobs: int = 1,
    stop: Stop | None = None,
) -> Result:
    """One run, from its checkpoint where it has one, to its file among the results.

    `jobs` runs share the device, this one included.

    Raises:
        UserError: a folder that cannot be written.
        StoppedError: it was asked to stop, and has no result yet.
    """
    folder = run_folder(how.runs, spec)
    if how.overwrite:
        remove_checkpoint(folder)
    if how.tensorboard:
        accelerator.init_trackers(str(folder.relative_to(how.runs)))
    result = run_one(spec, *images, folder, accelerator, observer, mode, jobs, stop)
    save(how.results, result)
    return result


def run_one(
    spec: RunSpec,
    train: Images,
    test: Images,
    folder: Path,
    accelerator: Accelerator,
    observer: Observer,
    mode: Mode = "eager",
    jobs: int = 1,
    stop: Stop | None = None,
) -> Result:
    """One run; whatever goes wrong in it is recorded as its result, so that the others go on.

    Raises:
        UserError: checkpoints cannot be written; the other runs could not write theirs either.
        StoppedError: it was asked to stop.
    """
    run: Run | None = None
    status: Status = "failed"
    try:
        run = Run(spec, train, test, folder, accelerator, observer, mode, jobs, stop)
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
