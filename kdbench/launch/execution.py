"""One run of a plan, executed and recorded, whatever goes wrong in it."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import distributed

from kdbench.data import ImageSet, LoaderError, Source, batch_share, open_images
from kdbench.engine.checkpoint import remove_checkpoints
from kdbench.engine.compile_mode import Compile
from kdbench.engine.device import COLLECTIVE_TIMEOUT
from kdbench.engine.measure import is_out_of_memory
from kdbench.engine.observer import Observer
from kdbench.engine.result_builder import DivergedError, empty_result
from kdbench.engine.run import Run
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import Mode
from kdbench.engine.stop import Stop, StoppedError
from kdbench.errors import PlanAbandonedError, UserError
from kdbench.launch.place import Place
from kdbench.launch.ranks import Ranks
from kdbench.launch.shares import check_gpus, cores
from kdbench.results.files import write_result
from kdbench.results.predictions import Predictions, write_predictions
from kdbench.results.schema import Result, Status
from kdbench.suite.suite import Suite

ALONE = Ranks(Place())


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
    deterministic: bool = False
    """The same numbers each time on a GPU too; slower there."""
    jobs: int = 1
    """Runs at a time; more than one are processes of their own."""
    processes: int = 1
    """That train each run together."""
    workers: int | None = None
    """Processes that decode images for each process that trains; None takes what cores there are.
    It changes no number."""
    since: float = field(default_factory=time.time)
    """When the command was given, in seconds of the epoch: results that are newer need no run."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: no run at a time, no process, or less than no worker.
        """
        if self.jobs < 1:
            raise UserError(f"--jobs must be at least 1, not {self.jobs}.")
        if self.processes < 1:
            raise UserError(f"--num-processes must be at least 1, not {self.processes}.")
        if self.workers is not None and self.workers < 0:
            raise UserError(f"--workers must be at least 0, not {self.workers}.")

    def decoding_processes(self, local_processes: int) -> int:
        """For each of the processes of a run on this machine; one core is left to train."""
        if self.workers is not None:
            return self.workers
        return max(1, cores() // (local_processes * self.jobs) - 1)


def check_processes(suite: Suite, processes: int, ranks: Ranks) -> None:
    """Refuse a number of processes that cannot train a suite together, before anything heavy.

    Raises:
        UserError: they cannot share a batch or the test images, or have too few GPUs.
    """
    batch_share(suite, processes)
    if suite.data.count(suite.data.test) < processes:
        raise UserError(
            f"Suite '{suite.name}' has fewer test images than {processes} processes; start fewer."
        )
    if ranks.count == 1:  # a launcher's processes counted their GPUs when they met
        check_gpus(processes)


def open_images_together(
    source: Source, device: torch.device, how: Execution, ranks: Ranks = ALONE
) -> tuple[ImageSet, ImageSet]:
    """The training and the test images, for all processes of a plan, which must find the same.

    Raises:
        UserError: they cannot be read, are not the data set the suite names, or differ between
            processes.
    """
    workers = how.decoding_processes(ranks.place.local_processes)
    with ranks.one_before_others("images"):
        images = open_images(source, device, workers)
    if ranks.count > 1:
        names = (f"{part} images of '{source.data.name}'" for part in ("training", "test"))
        seen = {
            name: part.digest() + str(getattr(part, "notes", ""))
            for name, part in zip(names, images, strict=True)
        }
        ranks.require_alike(seen, "--data-dir or KDBENCH_DATA must lead all to the same data")
    return images


def run_and_save(
    spec: RunSpec,
    images: tuple[ImageSet, ImageSet],
    how: Execution,
    accelerator: Accelerator,
    observer: Observer,
    mode: Mode,
    jobs: int = 1,
    ranks: Ranks = ALONE,
    stop: Stop | None = None,
) -> Result:
    """One run, from its checkpoint where it has one, to its file among the results.

    `jobs` runs share the device, this one included. The main process of `ranks` writes.

    Raises:
        UnwritableError: the disk does not take its result, or to begin anew.
        PlanAbandonedError: the run failed, and its processes are out of step.
        StoppedError: it was asked to stop, and has no result yet.
    """
    folder = run_folder(how.runs, spec)
    if how.overwrite and ranks.is_main:
        remove_checkpoints(folder)
    if how.tensorboard:
        accelerator.init_trackers(str(folder.relative_to(how.runs)))

    def record(result: Result, predictions: Predictions | None) -> None:
        if ranks.is_main:
            if predictions is not None:
                write_predictions(how.results, result.identity, predictions)
            write_result(how.results, result)

    return run_one(spec, *images, folder, accelerator, observer, mode, jobs, ranks, stop, record)


def run_one(
    spec: RunSpec,
    train: ImageSet,
    test: ImageSet,
    folder: Path,
    accelerator: Accelerator,
    observer: Observer,
    mode: Mode = "eager",
    jobs: int = 1,
    ranks: Ranks = ALONE,
    stop: Stop | None = None,
    record: Callable[[Result, Predictions | None], None] = lambda result, predictions: None,
) -> Result:
    """One run; whatever goes wrong in it is recorded as its result, so that the others go on.

    Raises:
        UserError: the disk does not take its result.
        PlanAbandonedError: the run failed, and its processes are out of step.
        StoppedError: it was asked to stop.
    """
    run: Run | None = None

    def unfinished(status: Status, reason: str) -> Result:
        if run is None:
            return empty_result(spec, accelerator, status, reason)
        return run.result(status, reason)

    def close_files() -> None:
        if run is not None:
            run.files.close()

    ranks.on_failure = lambda reason: record(unfinished("failed", reason), None)
    try:
        run = Run(spec, train, test, folder, accelerator, observer, mode, jobs, stop)
        result = run.train()
    except UserError:
        close_files()
        raise
    except Exception as error:  # a method may raise anything; it must not take the plan with it
        lost = is_loss_of_a_process(error)
        if lost and stop is not None and stop.requested:
            # A launcher that sees one process die asks the others to end.
            close_files()
            raise StoppedError(stop.received[0]) from error
        status: Status = "diverged" if isinstance(error, DivergedError) else "failed"
        moment = _moment(error, run, ranks)
        reason = ranks.settle(spec.label, _reason(error, spec, run), moment, lost)
        close_files()  # once they agreed: who waits for a disk is not lost
        result = unfinished(status, reason)
    finally:
        ranks.on_failure = None  # it holds the run, and with it all networks
        for tracker in accelerator.trackers:
            tracker.finish()
        accelerator.trackers.clear()  # or the next run would log to this one's too
        accelerator.free_memory()
    record(result, run.predictions if run is not None and result.status == "finished" else None)
    if not ranks.in_step:
        raise PlanAbandonedError(spec.label, result.reason or "", lost=ranks.lost)
    return result


def _reason(error: Exception, spec: RunSpec, run: Run | None) -> str:
    """One line for the result."""
    if isinstance(error, DivergedError | LoaderError):
        return str(error)
    if is_loss_of_a_process(error):
        minutes = COLLECTIVE_TIMEOUT.total_seconds() / 60
        return f"another process is gone, or stuck for {minutes:.0f} minutes"
    reason = spec.entry.locate_error(error)
    if is_out_of_memory(error):
        peak = f", peak {run.memory.peak() / 2**20:,.0f} MiB" if run else ""
        reason = f"out of memory at batch size {spec.suite.batch_size}{peak}: {reason}"
    return without_paths(reason.strip().split("\n")[0])


def _moment(error: Exception, run: Run | None, ranks: Ranks) -> str:
    """Equal in processes that are in step after an error."""
    steps = run.step.steps if run else 0
    # Amid exchanges: memory may run out anywhere in a backward pass.
    amid = is_out_of_memory(error) or is_loss_of_a_process(error)
    place = f" in process {ranks.place.rank}" if amid else ""
    return f"{type(error).__name__} at step {steps}{place}"


def is_loss_of_a_process(error: BaseException) -> bool:
    """Of an exchange with a process that is gone or stuck; gloo's errors have no kind of theirs."""
    return isinstance(error, distributed.DistError) or "/gloo/" in str(error)


def run_folder(runs: Path, spec: RunSpec) -> Path:
    """Where a run keeps its checkpoint, log and status."""
    return runs / spec.suite.name / spec.architecture / spec.method_name / f"seed{spec.seed}"


def without_paths(text: str) -> str:
    """A message without the folders of this machine: results are published."""
    return re.sub(r"(?<![\w.])/(?:[^\s/:'\",]+/)+", "", text)
