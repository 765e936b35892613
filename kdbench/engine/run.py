"""One run: the loop that trains every method."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from pydantic import TypeAdapter
from torch import Tensor

from kdbench.data import (
    Evaluation,
    ImageSet,
    data_digest,
    evaluation_batches,
    training_batches,
)
from kdbench.engine.agreement import GO_ON, SAVE, Agreement
from kdbench.engine.checkpoint import Progress, checkpoint_key, load_checkpoint, snapshot
from kdbench.engine.data_stats import DataStats, undecodable_notes, waiting_share
from kdbench.engine.environment import describe_hardware
from kdbench.engine.evaluate import evaluate
from kdbench.engine.flops import training_flops
from kdbench.engine.measure import MemoryMeter, StepClock, count_parameters, forward_flops
from kdbench.engine.observer import Observer
from kdbench.engine.optimizers import build_optimizers, set_learning_rates
from kdbench.engine.part import PartOfEpoch
from kdbench.engine.result_builder import check_finite, empty_result, epoch_scalars
from kdbench.engine.run_files import RunFiles
from kdbench.engine.schedule import learning_rate_factor
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import Mode, TrainingStep
from kdbench.engine.stop import Stop, StoppedError
from kdbench.results.predictions import Predictions
from kdbench.results.schema import (
    TRAINED_BEFORE,
    Cost,
    Environment,
    Epoch,
    Metrics,
    Result,
    Status,
    best_on_test,
)
from kdbench.seeds import seeded

HISTORY = TypeAdapter(list[Epoch])

SAVE_SECONDS = 300.0
"""Longest time between two checkpoints, in seconds, if an epoch takes longer than this."""


class Run:
    """A run that can be trained and resumed, and whose result can be read at any time.

    Args:
        spec: what to run.
        train: training images.
        test: test images.
        folder: folder of the run's checkpoints and log.
        accelerator: device and processes.
        observer: notified of the run's progress.
        mode: how training steps run.
        jobs: number of runs that share the device.
        stop: request to stop the run.
    """

    def __init__(
        self,
        spec: RunSpec,
        train: ImageSet,
        test: ImageSet,
        folder: Path,
        accelerator: Accelerator,
        observer: Observer,
        mode: Mode = "eager",
        jobs: int = 1,
        stop: Stop | None = None,
    ):
        self.spec = spec
        self.folder = folder
        self.files = RunFiles(folder, observer.on_message)
        self.accelerator = accelerator
        self.observer = observer
        self.stop = stop or Stop()
        self.training_flops = self._count_training_flops()
        self.memory = MemoryMeter(accelerator.device)
        self._build_method(mode)
        self._open_data(train, test)
        self.data = data_digest(train, test)
        # Prepared images differ from the originals, so each kind has its own checkpoints.
        images = str(self.training.notes.get("images", ""))
        self.key = checkpoint_key(spec.fingerprint(), images, self.data)
        others = (self.evaluation, self.held_out)
        self.data_stats = DataStats(self.training, others, accelerator, observer.on_message)
        self.clock = StepClock(accelerator.device)
        self.progress = Progress(jobs=jobs)
        self.history: list[Epoch] = []
        self.predictions: Predictions | None = None
        self.empty_result = empty_result(spec, accelerator, "failed")
        self.hardware = describe_hardware(self.empty_result.environment, mode)
        self.saved_at = time.monotonic()
        self.timed_from = time.perf_counter()
        self.agreement = Agreement(accelerator)

    def _build_method(self, mode: Mode) -> None:
        """Build the method, its optimizers and its training step."""
        suite, device = self.spec.suite, self.accelerator.device
        method = self.method = self.spec.build_on(device)
        self.parameters_trained = count_parameters(method)
        self.parameters_deployed = count_parameters(method.student())
        self.flops = forward_flops(method.student(), suite.data.image_size)
        self.optimizers = build_optimizers(method, suite.optimizer, capturable="graph" in mode)
        if "inductor" in mode:
            torch.compiler.reset()  # forget the networks of earlier runs
        module = self.accelerator.prepare(method)
        self.step = TrainingStep(module, self.optimizers, suite.precision, mode, self._on_fallback)

    def _open_data(self, train: ImageSet, test: ImageSet) -> None:
        """Create the batches of training, evaluation and held-out images."""
        suite = self.spec.suite
        share = (self.accelerator.process_index, self.accelerator.num_processes)
        self.held_out: Evaluation | None = None
        self.notes: dict[str, Any] = {}
        if self.method.held_out_share:
            train, held_out = train.hold_out(self.method.held_out_share)
            self.held_out = evaluation_batches(held_out, suite, substitute=True)
            self.notes["training images held out"] = len(held_out)
        self.training = training_batches(train, suite, self.spec.seed, self.spec.views, *share)
        self.evaluation = evaluation_batches(test, suite, *share)
        self.notes |= self.training.notes

    def train(self) -> Result:
        """Train all remaining epochs, with a checkpoint after each and an evaluation if it is due.

        Raises:
            DivergedError: A loss or a weight is not finite.
            StoppedError: The run stopped on request, after a complete step.
        """
        with self.stop.deferred():
            self._resume()
            for epoch in range(self.progress.epochs_done, self.spec.suite.schedule.epochs):
                try:
                    losses = self._train_epoch(epoch)
                    due = self.spec.suite.is_evaluated(epoch + 1)
                    last = epoch + 1 == self.spec.suite.schedule.epochs
                    metrics = self._evaluate(keep=last) if due else {}
                except StoppedError:
                    self._save()
                    self.files.finish()
                    # Launchers kill the other processes as soon as the first one exits.
                    self.accelerator.wait_for_everyone()
                    raise
                check_finite(epoch + 1, losses, metrics, self.method)
                self._record(epoch, losses, metrics)
            if self.predictions is None:  # the run was killed before its result was written
                self._evaluate(keep=True)
            self.files.finish()
        return self.result("finished")

    def result(self, status: Status, reason: str | None = None) -> Result:
        """Return the result of the run up to now."""
        return self.empty_result.model_copy(
            update={
                "status": status,
                "reason": reason,
                "last": self.history[-1].metrics if self.history else None,
                "best_on_test": best_on_test(self.history),
                "history": self.history,
                "cost": self._cost(),
                "environment": self._environment(),
                "data": self.data,
                "notes": self.notes | self._hardware_notes() | undecodable_notes(self.progress),
            }
        )

    def _resume(self) -> None:
        rejected: dict[str, list[str]] = {}
        progress = load_checkpoint(
            self.folder,
            self.key,
            self.method,
            self.optimizers,
            self.accelerator,
            lambda file, why: rejected.setdefault(why, []).append(file.name),
        )
        if progress is not None:
            progress.jobs = max(progress.jobs, self.progress.jobs)
            self.progress = progress
            self.history = HISTORY.validate_json(progress.history)
            if progress.place in ("", self.hardware):
                self.clock.windows = progress.step_seconds.tolist()
            else:
                progress.places.append((progress.place, self._steps_done()))
                progress.peak_memory_bytes = 0  # measured on the earlier hardware
        if self.accelerator.is_main_process:
            self.files.write_log(self.history)
        for epoch in self.history:
            self.observer.on_epoch(epoch, resumed=True)
        evaluated = self.history[-1].epoch * len(self.training) if self.history else 0
        if self._steps_done() > evaluated:
            self.observer.on_resume(self._steps_done())
        self._report_resume(rejected)

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """Train an epoch, or the rest of it, and return the mean of each loss term over the epoch.

        Nothing is read from the device before the end of the epoch, except to save a checkpoint.
        """
        self.timed_from = time.perf_counter()
        steps = len(self.training)
        schedule = self.spec.suite.schedule
        with seeded(self.spec.seed, "noise", epoch, self.accelerator.process_index):
            start, sums = self._begin_epoch(epoch)
            self.clock.start()
            for step, (views, labels) in enumerate(self.training.epoch(epoch, start), start):
                factor = learning_rate_factor(epoch * steps + step, steps, schedule)
                set_learning_rates(self.optimizers, factor)
                values = self.step(views, labels).float()
                sums = values.clone() if sums is None else sums.add_(values)
                self.clock.step()
                self.observer.on_step()
                agreed = self.agreement(self._requested_action())
                if agreed > SAVE or (agreed == SAVE and step + 1 < steps):
                    self._note_position(step + 1, sums)
                    self._account()
                    if agreed > SAVE:
                        raise StoppedError(agreed)
                    self._save()
                    self.timed_from = time.perf_counter()
                    self.clock.start()
            assert sums is not None
            means = (self._sum(sums) / (steps * self.accelerator.num_processes)).tolist()
        self._account()
        if self.agreement.alone:
            self._note_position(steps, sums)
        return dict(zip(self.step.names, means, strict=True))

    def _account(self) -> None:
        """Add the training time since the start of the epoch, or since its last checkpoint."""
        self.clock.finish()
        seconds = time.perf_counter() - self.timed_from
        self.progress.training_seconds += seconds
        self.data_stats.record_waiting(self.progress, seconds)

    def _begin_epoch(self, epoch: int) -> tuple[int, Tensor | None]:
        """Return the first step to run, and the summed loss terms of the steps before it."""
        part = self.progress.part
        if part is None:
            self._calibrate()
            self.method.train()
            self.method.begin_epoch(epoch)
            return 0, None
        self.method.train()
        self.step.names = tuple(part.terms)
        return part.steps, part.restore(self.method, self.accelerator)

    def _note_position(self, steps: int, sums: Tensor) -> None:
        """Store the position within the epoch in the progress, for a checkpoint."""
        self.progress.part = PartOfEpoch.now(
            steps, self.step.names, sums, self.method, self.accelerator
        )

    def _evaluate(self, keep: bool) -> dict[str, Metrics]:
        """Return the metrics by role, and keep the predictions if they are those of the run."""
        started = time.perf_counter()
        self._average_buffers()
        guesses: dict[str, list[Tensor]] = {}
        with self.step.autocast():
            collect = guesses if keep else None
            metrics = evaluate(self.method, self._evaluation_batches(), self._sum, collect)
        if keep:
            self.predictions = {name: self._in_order(parts) for name, parts in guesses.items()}
        self.progress.evaluation_seconds += time.perf_counter() - started
        return metrics

    def _evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.evaluation:
            # Several processes have unequal numbers of batches; they stop after the next step.
            if self.stop.requested and self.agreement.alone:
                raise StoppedError(self.stop.received[0])
            yield batch

    def _in_order(self, parts: list[Tensor]) -> np.ndarray:
        """Return the values of all test images in order; each process has every n-th image."""
        own, processes = torch.cat(parts), self.accelerator.num_processes
        if processes > 1:
            images = int(self._sum(torch.tensor(len(own), device=own.device)))
            padded = own.new_zeros(math.ceil(images / processes))
            padded[: len(own)] = own
            own = self.accelerator.gather(padded).view(processes, -1).T.flatten()[:images]
        array: np.ndarray = own.cpu().numpy()
        return array

    def _calibrate(self) -> None:
        if self.held_out is not None:
            self.method.eval()
            with torch.no_grad(), self.step.autocast():
                self.method.calibrate(self.held_out)

    def _sum(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def _average_buffers(self) -> None:
        """Average the running statistics, which differ because each process saw other images."""
        if self.accelerator.num_processes > 1:
            for buffer in self.method.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    def _record(self, epoch: int, losses: dict[str, float], metrics: dict[str, Metrics]) -> None:
        """Save a checkpoint and notify the observer; evaluated epochs are added to the history."""
        suite = self.spec.suite
        last_step = (epoch + 1) * len(self.training) - 1
        factor = learning_rate_factor(last_step, len(self.training), suite.schedule)
        record = Epoch(
            epoch=epoch + 1,
            learning_rate=suite.optimizer.learning_rate * factor,
            losses=losses,
            metrics=metrics,
        )
        if metrics:
            self.history.append(record)
            if self.accelerator.is_main_process:
                self.files.write_log(self.history)
        self.accelerator.log(dict(epoch_scalars(record)), step=epoch + 1)
        self.progress.epochs_done = epoch + 1
        self.progress.part = None
        self._save()
        self.observer.on_epoch(record, resumed=False)

    def _save(self) -> None:
        """Save a checkpoint of the current state."""
        progress = self.progress
        self.data_stats.record_undecodable(progress)
        progress.history = HISTORY.dump_json(self.history).decode()
        progress.step_seconds = torch.tensor(self.clock.windows, dtype=torch.float64)
        progress.place = self.hardware
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, self._peak_memory())
        if self.accelerator.is_main_process:
            content = snapshot(self.key, self.method, self.optimizers, progress)
            self.files.save_checkpoint(content, self._steps_done())
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _requested_action(self) -> int:
        """Return what this process requests after a step: continue, save, or stop."""
        if self.stop.requested:
            return self.stop.received[0]
        return SAVE if time.monotonic() - self.saved_at > SAVE_SECONDS else GO_ON

    def _steps_done(self) -> int:
        part = self.progress.part
        return self.progress.epochs_done * len(self.training) + (part.steps if part else 0)

    def _report_resume(self, rejected: dict[str, list[str]]) -> None:
        """Report where the run resumes, and which checkpoints were rejected and why."""
        done, steps = self._steps_done(), len(self.training) * self.spec.suite.schedule.epochs
        action = (
            f"resumes after step {done:,} of {steps:,}" if done else "starts from the beginning"
        )
        reasons = [
            f"{', '.join(files)} {'is' if len(files) == 1 else 'are'} {why}"
            for why, files in rejected.items()
        ]
        if reasons:
            self.observer.on_message(f"{self.spec.label}: {'; '.join(reasons)}; the run {action}.")
        elif done:
            self.observer.on_message(f"{self.spec.label} {action}.")

    def _peak_memory(self) -> int:
        """Return the peak memory in bytes of the process that used most."""
        own = torch.tensor([self.memory.peak()], device=self.accelerator.device)
        return int(self.accelerator.gather(own).max())

    def _cost(self) -> Cost:
        step = self.clock.median()
        return Cost(
            images_per_second=None if step is None else self.spec.suite.batch_size / step,
            step_milliseconds=None if step is None else 1000 * step,
            training_seconds=self.progress.training_seconds,
            evaluation_seconds=self.progress.evaluation_seconds,
            peak_memory_bytes=max(self.progress.peak_memory_bytes, self.memory.peak()),
            jobs=self.progress.jobs,
            waiting_share=waiting_share(self.progress),
            peak_memory_kind=self.memory.kind,
            parameters_trained=self.parameters_trained,
            parameters_deployed=self.parameters_deployed,
            student_forward_flops=self.flops,
            training_flops=self.training_flops,
        )

    def _hardware_notes(self) -> dict[str, Any]:
        """Return the note on earlier hardware; rate and memory are those of the last one."""
        total = self.spec.suite.total_steps
        before = [f"{hardware}: to step {n} of {total}" for hardware, n in self.progress.places]
        return {TRAINED_BEFORE: before} if before else {}

    def _count_training_flops(self) -> int | None:
        """Return the FLOPs of the run, or None if the method fails on a small batch."""
        try:
            return training_flops(self.spec, self.accelerator.device)
        except Exception as error:  # if the method itself is at fault, its first step raises again
            why = self.spec.entry.locate_error(error).split("\n")[0]
            self.observer.on_message(
                f"The FLOPs of '{self.spec.entry.name}' could not be counted: {why}."
            )
            return None

    def _environment(self) -> Environment:
        """Return the environment with the mode that steps really ran in."""
        return self.empty_result.environment.model_copy(update={"step": self.step.mode})

    def _on_fallback(self, reason: str) -> None:
        mode = "eagerly" if self.step.mode == "eager" else f"with {self.step.mode}"
        self.observer.on_message(f"'{self.spec.entry.name}' {reason}; its steps run {mode}.")
