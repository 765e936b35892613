"""One run: the loop that trains every method."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from pydantic import TypeAdapter
from torch import Tensor

from kdbench.data import Evaluation, ImageSet, evaluation_batches, training_batches
from kdbench.engine.agreement import GO_ON, SAVE, Agreement
from kdbench.engine.checkpoint import Progress, load_checkpoint, snapshot
from kdbench.engine.data_stats import Intake, undecodable_notes, waiting_share
from kdbench.engine.environment import place
from kdbench.engine.evaluate import evaluate
from kdbench.engine.flops import training_flops
from kdbench.engine.measure import MemoryMeter, StepClock, count_parameters, forward_flops
from kdbench.engine.observer import Observer
from kdbench.engine.optimizers import build_optimizers, set_learning_rates
from kdbench.engine.part import PartOfEpoch
from kdbench.engine.result_builder import check_finite, empty_result, scalars
from kdbench.engine.run_files import RunFiles
from kdbench.engine.schedule import learning_rate_factor
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import Mode, TrainingStep
from kdbench.engine.stop import Stop, StoppedError
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
"""Of training between two checkpoints, at most, where an epoch takes longer."""


class Run:
    """A run that can be trained, resumed and described at any time."""

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
        suite = spec.suite
        self.training_flops = self._count_work()
        self.memory = MemoryMeter(accelerator.device)
        method = spec.build_on(accelerator.device)
        self.parameters_trained = count_parameters(method)
        self.parameters_deployed = count_parameters(method.student())
        self.flops = forward_flops(method.student(), suite.data.image_size)
        self.optimizers = build_optimizers(method, suite.optimizer, capturable="graph" in mode)
        self.method = method
        if "inductor" in mode:
            torch.compiler.reset()  # forget the networks of the runs before
        self.step = TrainingStep(
            accelerator.prepare(method), self.optimizers, suite.precision, mode, self._on_fallback
        )
        share = (accelerator.process_index, accelerator.num_processes)
        self.held_out: Evaluation | None = None
        self.notes: dict[str, Any] = {}
        if method.held_out_share:
            train, held_out = train.hold_out(method.held_out_share)
            self.held_out = evaluation_batches(held_out, suite, substitute=True)
            self.notes["training images held out"] = len(held_out)
        self.training = training_batches(train, suite, spec.seed, spec.views, *share)
        self.evaluation = evaluation_batches(test, suite, *share)
        self.notes |= self.training.notes
        # Prepared images are others than the originals: a checkpoint goes on with its own.
        self.key = spec.fingerprint() + str(self.training.notes.get("images", ""))
        others = (self.evaluation, self.held_out)
        self.intake = Intake(self.training, others, accelerator, observer.on_message)
        self.clock = StepClock(accelerator.device)
        self.progress = Progress(jobs=jobs)
        self.history: list[Epoch] = []
        self.started_as = empty_result(spec, accelerator, "failed")
        self.place = place(self.started_as.environment, mode)
        self.saved_at = time.monotonic()
        self.timed_from = time.perf_counter()
        self.agreement = Agreement(accelerator)

    def train(self) -> Result:
        """All epochs that are left, with an evaluation and a checkpoint after each.

        Raises:
            DivergedError: a loss or a weight is not finite.
            StoppedError: it was asked to stop, and did after its step.
        """
        with self.stop.heeded():
            self._resume()
            for epoch in range(self.progress.epochs_done, self.spec.suite.schedule.epochs):
                try:
                    losses = self._train_epoch(epoch)
                    metrics = self._evaluate()
                except StoppedError:
                    self._save()
                    self.files.finish()
                    self.accelerator.wait_for_everyone()  # the first to end has the others ended
                    raise
                check_finite(epoch + 1, losses, metrics, self.method)
                self._record(epoch, losses, metrics)
            self.files.finish()
        return self.result("finished")

    def result(self, status: Status, reason: str | None = None) -> Result:
        """What the run has come to so far."""
        return self.started_as.model_copy(
            update={
                "status": status,
                "reason": reason,
                "last": self.history[-1].metrics if self.history else None,
                "best_on_test": best_on_test(self.history),
                "history": self.history,
                "cost": self._cost(),
                "environment": self._environment(),
                "notes": self.notes | self._places_left() | undecodable_notes(self.progress),
            }
        )

    def _resume(self) -> None:
        refused: dict[str, list[str]] = {}
        progress = load_checkpoint(
            self.folder,
            self.key,
            self.method,
            self.optimizers,
            self.accelerator,
            lambda file, why: refused.setdefault(why, []).append(file.name),
        )
        if progress is not None:
            progress.jobs = max(progress.jobs, self.progress.jobs)
            self.progress = progress
            self.history = HISTORY.validate_json(progress.history)
            if progress.place in ("", self.place):
                self.clock.windows = progress.step_seconds.tolist()
            else:
                progress.places.append((progress.place, self._steps_done()))
                progress.peak_memory_bytes = 0  # of a device there, of this process here
        if self.accelerator.is_main_process:
            self.files.write_log(self.history)
        for epoch in self.history:
            self.observer.on_epoch(epoch, resumed=True)
        if self.progress.part is not None:
            self.observer.on_resume(self._steps_done())
        self._say_where_it_goes_on(refused)

    def _train_epoch(self, epoch: int) -> dict[str, float]:
        """One epoch, or what is left of it; the mean of each loss term over all of it.

        Nothing is read from the device before its end, but for a checkpoint that is due.
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
                agreed = self.agreement(self._wanted())
                if agreed > SAVE or (agreed == SAVE and step + 1 < steps):
                    self._leave(step + 1, sums)
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
            self._leave(steps, sums)
        return dict(zip(self.step.names, means, strict=True))

    def _account(self) -> None:
        """Of training up to now, since the epoch or the last checkpoint in it."""
        self.clock.finish()
        seconds = time.perf_counter() - self.timed_from
        self.progress.training_seconds += seconds
        self.intake.account_waiting(self.progress, seconds)

    def _begin_epoch(self, epoch: int) -> tuple[int, Tensor | None]:
        """The first step to do and the loss terms of those before, summed."""
        part = self.progress.part
        if part is None:
            self._calibrate()
            self.method.train()
            self.method.begin_epoch(epoch)
            return 0, None
        self.method.train()
        self.step.names = tuple(part.terms)
        return part.steps, part.restore(self.method, self.accelerator)

    def _leave(self, steps: int, sums: Tensor) -> None:
        """Note where the epoch is, for a checkpoint in its midst."""
        place = self.method, self.accelerator
        self.progress.part = PartOfEpoch.now(steps, self.step.names, sums, *place)

    def _evaluate(self) -> dict[str, Metrics]:
        started = time.perf_counter()
        self._average_buffers()
        with self.step.autocast():
            metrics = evaluate(self.method, self._evaluation_batches(), self._sum)
        self.progress.evaluation_seconds += time.perf_counter() - started
        return metrics

    def _evaluation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.evaluation:
            # Several have unequal numbers of batches, and stop after the next step.
            if self.stop.requested and self.agreement.alone:
                raise StoppedError(self.stop.received[0])
            yield batch

    def _calibrate(self) -> None:
        if self.held_out is not None:
            self.method.eval()
            with torch.no_grad(), self.step.autocast():
                self.method.calibrate(self.held_out)

    def _sum(self, values: Tensor) -> Tensor:
        """Over all processes."""
        total: Tensor = self.accelerator.reduce(values, "sum")
        return total

    def _average_buffers(self) -> None:
        """Running statistics differ by process: each saw its share of the batches."""
        if self.accelerator.num_processes > 1:
            for buffer in self.method.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(self.accelerator.reduce(buffer, "mean"))

    def _record(self, epoch: int, losses: dict[str, float], metrics: dict[str, Metrics]) -> None:
        """Write the epoch to the log and the checkpoint, and tell who watches."""
        suite = self.spec.suite
        last_step = (epoch + 1) * len(self.training) - 1
        factor = learning_rate_factor(last_step, len(self.training), suite.schedule)
        record = Epoch(
            epoch=epoch + 1,
            learning_rate=suite.optimizer.learning_rate * factor,
            losses=losses,
            metrics=metrics,
        )
        self.history.append(record)
        if self.accelerator.is_main_process:
            self.files.write_log(self.history)
        self.accelerator.log(dict(scalars(record)), step=epoch + 1)
        self.progress.epochs_done = epoch + 1
        self.progress.part = None
        self._save()
        self.observer.on_epoch(record, resumed=False)

    def _save(self) -> None:
        """A checkpoint of how things are now."""
        progress = self.progress
        self.intake.account_undecodable(progress)
        progress.history = HISTORY.dump_json(self.history).decode()
        progress.step_seconds = torch.tensor(self.clock.windows, dtype=torch.float64)
        progress.place = self.place
        progress.peak_memory_bytes = max(progress.peak_memory_bytes, self._peak_memory())
        if self.accelerator.is_main_process:
            content = snapshot(self.key, self.method, self.optimizers, progress)
            self.files.save_checkpoint(content, self._steps_done())
        self.accelerator.wait_for_everyone()
        self.saved_at = time.monotonic()

    def _wanted(self) -> int:
        """Of this process, after its step."""
        if self.stop.requested:
            return self.stop.received[0]
        return SAVE if time.monotonic() - self.saved_at > SAVE_SECONDS else GO_ON

    def _steps_done(self) -> int:
        part = self.progress.part
        return self.progress.epochs_done * len(self.training) + (part.steps if part else 0)

    def _say_where_it_goes_on(self, refused: dict[str, list[str]]) -> None:
        """And from which checkpoints it does not, by reason."""
        done, steps = self._steps_done(), len(self.training) * self.spec.suite.schedule.epochs
        where = f"goes on after step {done:,} of {steps:,}" if done else "begins anew"
        said = [
            f"{', '.join(files)} {'is' if len(files) == 1 else 'are'} {why}"
            for why, files in refused.items()
        ]
        if said:
            self.observer.on_message(f"{self.spec.label}: {'; '.join(said)}; it {where}.")
        elif done:
            self.observer.on_message(f"{self.spec.label} {where}.")

    def _peak_memory(self) -> int:
        """Bytes, of the process that took most."""
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

    def _places_left(self) -> dict[str, Any]:
        """For the result, whose environment, rate and memory are those of the last place."""
        total = self.spec.suite.total_steps
        before = [f"{place}: to step {n} of {total}" for place, n in self.progress.places]
        return {TRAINED_BEFORE: before} if before else {}

    def _count_work(self) -> int | None:
        """FLOPs of the run; None for a method that cannot take a few images on their own."""
        try:
            return training_flops(self.spec, self.accelerator.device)
        except Exception as error:  # what is wrong with the method itself, its first step will say
            why = self.spec.entry.blame(error).split("\n")[0]
            self.observer.on_message(f"The FLOPs of '{self.spec.entry.name}' are not known: {why}.")
            return None

    def _environment(self) -> Environment:
        """How the steps run is known only once they do."""
        return self.started_as.environment.model_copy(update={"step": self.step.mode})

    def _on_fallback(self, reason: str) -> None:
        how = "eagerly" if self.step.mode == "eager" else f"with {self.step.mode}"
        self.observer.on_message(f"'{self.spec.entry.name}' {reason}; its steps run {how}.")
