"""Tests of training steps in all modes: equal numbers, and fallbacks."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import METHODS, Watcher, is_one_sentence
from launched import result_of
from made_results import metrics, one_epoch
from torch import Tensor

from kdbench.discovery import find_methods
from kdbench.engine import step as step_module
from kdbench.engine.compile_mode import resolve_compile_mode
from kdbench.engine.optimizers import build_optimizers, set_learning_rates
from kdbench.engine.run import Run
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import REPLAY_TOLERANCE, TrainingState, TrainingStep
from kdbench.launch import estimate
from kdbench.launch.execution import run_one
from kdbench.launch.plan import PlannedRun
from kdbench.results.files import write_result
from kdbench.suite.load import load_suite

STEPS = 50
CONDITIONAL = """
from kdbench.methods.baseline import Baseline

class Conditional(Baseline):
    def forward(self, views, labels):
        terms = super().forward(views, labels)
        return terms if terms["ce/student"] > 0 else {}
"""
HUNGRY = """
import torch
from kdbench.methods.baseline import Baseline

class Hungry(Baseline):
    def forward(self, views, labels):
        {}
"""
RAISES = "raise torch.OutOfMemoryError('Tried to allocate 20.00 GiB.')"
ASKS = "return {'ce': views.new_ones(2**60).sum()}"  # more than any machine has


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_gives_the_losses_of_an_eager_one(make_run, method):
    """Along 50 steps of training, each from the state that the eager steps came to.

    Left to themselves two fp32 trainings part whatever computes them: rounding differences grow
    tenfold every few steps, also between one thread and two.
    """
    torch.compiler.reset()
    eager, other = make_run(method, folder="eager"), make_run(method, folder="compiled")
    messages: list[str] = []
    compiled = TrainingStep(other.method, other.optimizers, "fp32", "inductor", messages.append)
    steps = 0
    for epoch in range(STEPS):
        for run in (eager, other):
            run.method.train().begin_epoch(epoch)
        for views, labels in eager.training.epoch(epoch):
            hand_over(eager, other)
            before = TrainingState(eager.method, eager.optimizers)
            expected, values = eager.step(views, labels), compiled(views, labels)
            # A small term is a difference of large numbers: it is held to the sum of all.
            small = 1e-6 * expected.sum().item()
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=small)
            steps += 1
        if steps >= STEPS:
            break
    assert steps >= STEPS and messages == [] and compiled.mode == "inductor"
    updated = TrainingState(eager.method, eager.optimizers)
    assert (
        TrainingState(other.method, other.optimizers).difference(updated, before) < REPLAY_TOLERANCE
    )


def hand_over(source: Run, target: Run) -> None:
    """Copy the state of one run to another of the same method."""
    target.method.load_state_dict(source.method.state_dict())
    for mine, theirs in zip(target.optimizers, source.optimizers, strict=True):
        mine.load_state_dict(deepcopy(theirs.state_dict()))  # it would share the tensors


@pytest.mark.parametrize(
    ("suite", "on_cpu", "on_gpu"),
    [
        ("digits", "eager", "graph"),
        ("cifar100-reduced", "eager", "graph"),
        ("cifar100", "inductor", "inductor+graph"),
        ("imagenet", "inductor", "inductor+graph"),
    ],
)
def test_auto_compiles_only_runs_long_enough_to_benefit(monkeypatch, suite, on_cpu, on_gpu):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    loaded, (cpu, gpu) = load_suite(suite), map(torch.device, ("cpu", "cuda"))
    way = partial(resolve_compile_mode, "auto", loaded, loaded.default_architecture)
    assert (way(cpu), way(gpu)) == (on_cpu, on_gpu)
    # The exchange between processes cannot be part of a graph.
    assert way(gpu, 2) == ("inductor" if "inductor" in on_gpu else "eager")


def test_a_method_that_does_not_compile_runs_eagerly_with_one_warning(run_tiny):
    Path("conditional.py").write_text(CONDITIONAL)
    command = ("--methods", "./conditional.py", "--seeds", "2", "--epochs", "1")
    code, _, err = run_tiny(*command, "--compile", "inductor")
    assert code == 0
    assert is_one_sentence(err) and err.startswith("kdbench: 'conditional' cannot be compiled: ")
    assert err.endswith("; its steps run eagerly.\n")
    assert run_tiny(*command, "--compile", "off", "--results-dir", "eager")[0] == 0
    fallen, eager = (
        result_of("conditional", suite="tiny@epochs=1", results=folder)
        for folder in ("results", "eager")
    )
    assert fallen["environment"]["step"] == "eager"
    assert fallen["history"] == eager["history"]


@pytest.mark.parametrize(
    ("statement", "mode", "said"),
    [
        (RAISES, "off", "OutOfMemoryError: Tried to allocate 20.00 GiB"),
        (RAISES, "inductor", "OutOfMemoryError: Tried to allocate 20.00 GiB"),
        (ASKS, "off", "can't allocate memory"),
    ],
)
def test_running_out_of_memory_is_recorded_with_batch_size_and_peak(
    run_tiny, statement, mode, said
):
    Path("hungry.py").write_text(HUNGRY.format(statement))
    code, _, err = run_tiny("--methods", "./hungry.py,baseline", "--compile", mode)
    assert code == 1 and "Traceback" not in err
    head, _, rest = result_of("hungry")["reason"].partition(" MiB: ")
    assert head.startswith("out of memory at batch size 40, peak ")
    assert int(head.rpartition(" ")[2].replace(",", "")) > 10
    assert rest.startswith("hungry.py, line 7: ") and said in rest
    assert result_of("baseline")["status"] == "finished"  # the next goes on


def test_out_of_memory_only_when_compiled_falls_back_to_eager(make_run, monkeypatch):
    def hungry(*_: object) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")

    compile_ = partial(torch.compile, backend=lambda graph, inputs: hungry)
    monkeypatch.setattr(torch, "compile", compile_)
    eager, other = make_run("dml", folder="eager"), make_run("dml", folder="compiled")
    messages: list[str] = []
    step = TrainingStep(other.method, other.optimizers, "fp32", "inductor", messages.append)
    for views, labels in eager.training.epoch(0):
        assert torch.equal(step(views, labels), eager.step(views, labels))
    assert messages == ["cannot be compiled: Tried to allocate 20.00 GiB."]
    assert step.mode == "eager"


def test_every_kind_of_out_of_memory_error_is_recorded(make_run, monkeypatch):
    run = make_run("baseline")
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 GB")):

        def fail(*_, error=error):
            raise error

        monkeypatch.setattr(TrainingStep, "__call__", fail)
        images = run.training.images
        result = run_one(run.spec, images, images, run.folder, run.accelerator, Watcher())
        assert result.status == "failed"
        assert result.reason is not None and "out of memory at batch size 40" in result.reason


class Recorder:
    """Fake of a CUDA graph: recording trains nothing, a replay fills the same tensor."""

    def __init__(self, run: Run):
        self.run = run

    def __call__(
        self, step: Callable[[], Tensor], *_: object
    ) -> tuple[Callable[[], object], Tensor]:
        before = TrainingState(self.run.method, self.run.optimizers)
        output = step().clone()
        before.restore()
        return lambda: self.replay(step, output), output

    def replay(self, step: Callable[[], Tensor], output: Tensor) -> None:
        output.copy_(step())


class Frozen(Recorder):
    """Fake of a CUDA graph whose replay trains nothing."""

    def replay(self, step: Callable[[], Tensor], output: Tensor) -> None: ...


class Refused(Recorder):
    def __call__(
        self, step: Callable[[], Tensor], *_: object
    ) -> tuple[Callable[[], object], Tensor]:
        step()  # a half-recorded step may have trained
        raise RuntimeError("\nCUDA error: operation not permitted when stream is capturing\nmore")


class Hungry(Recorder):
    def __call__(
        self, step: Callable[[], Tensor], *_: object
    ) -> tuple[Callable[[], object], Tensor]:
        raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize(
    ("recorder", "complaint"),
    [
        (Recorder, None),
        (Frozen, "cannot be recorded: its replay differs by"),
        (Refused, "cannot be recorded: CUDA error: operation not permitted when stream is"),
        (Hungry, "cannot be recorded: Tried to allocate 20.00 GiB."),
    ],
)
def test_a_recorded_step_trains_as_the_step_itself_or_is_not_kept(
    make_run, monkeypatch, recorder: type[Recorder], complaint: str | None
):
    eager, other = make_run("independent", folder="eager"), make_run("independent", folder="graph")
    monkeypatch.setattr(step_module, "capture_cuda_graph", recorder(other))
    messages: list[str] = []
    recorded = TrainingStep(other.method, other.optimizers, "fp32", "graph", messages.append)
    for epoch in range(3):
        for views, labels in eager.training.epoch(epoch):
            for run in (eager, other):
                set_learning_rates(run.optimizers, 1 / (1 + epoch))
            assert torch.equal(recorded(views, labels), eager.step(views, labels))
    for mine, theirs in zip(
        other.method.state_dict().values(), eager.method.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    if complaint is None:
        assert messages == [] and recorded.mode == "graph"
    else:
        assert recorded.mode == "eager"
        (message,) = messages
        assert message.startswith(complaint) and "\n" not in message


def test_networks_of_a_recorded_step_are_compiled_together(make_run, monkeypatch):
    torch.compiler.reset()
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    eager, other = make_run("ffsd", folder="eager"), make_run("ffsd", folder="graph")
    monkeypatch.setattr(step_module, "capture_cuda_graph", Recorder(other))
    messages: list[str] = []
    both = TrainingStep(other.method, other.optimizers, "fp32", "inductor+graph", messages.append)
    for views, labels in eager.training.epoch(0):
        torch.testing.assert_close(both(views, labels), eager.step(views, labels))
    stems = [str(graph.code).count("stem") > 0 for graph in compiled]
    assert stems.count(True) == 1 and len(stems) > 1
    assert messages == [] and both.mode == "inductor+graph"
    assert not any("forward" in vars(part) for part in other.method.modules())


def test_the_state_of_a_step_is_all_that_it_changes(make_run):
    run = make_run("ffsd")
    views, labels = next(iter(run.training.epoch(0)))
    run.method.train().begin_epoch(0)
    before = TrainingState(run.method, run.optimizers)  # optimizers have made no state yet
    first = run.step(views, labels)
    before.restore()
    assert not any(optimizer.state for optimizer in run.optimizers)
    again = run.step(views, labels)
    assert torch.equal(first, again)
    after = TrainingState(run.method, run.optimizers)
    run.step(views, labels)
    third = TrainingState(run.method, run.optimizers)
    after.restore()
    assert TrainingState(run.method, run.optimizers).difference(third, after) == 1.0


def test_rates_of_a_recorded_step_are_tensors_that_it_reads(suite):
    (entry,) = find_methods(["dml"])
    method = RunSpec(suite, "resnet8", entry, entry.options({}), 0).build()
    (sgd,) = build_optimizers(method, suite.optimizer, capturable=True)
    rate = sgd.param_groups[0]["lr"]
    set_learning_rates([sgd], 0.1)
    assert isinstance(rate, Tensor) and sgd.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.1 * suite.optimizer.learning_rate)


def test_an_estimate_uses_rates_of_runs_executed_alike(
    make_run, accelerator, tmp_path, monkeypatch
):
    run = make_run("baseline")
    monkeypatch.setattr(estimate, "_time_step", lambda *_: 100.0)
    result = run.result("failed").model_copy(update={"status": "finished"})
    cost = result.cost.model_copy(update={"step_milliseconds": 1000.0})
    compiled = result.environment.model_copy(update={"step": "inductor"})
    changes = {"cost": cost, "environment": compiled} | one_epoch({"student": metrics(50.0)})
    write_result(tmp_path, result.model_copy(update=changes))
    fp32 = PlannedRun(run.spec, tmp_path / "other.json", "to run")
    bf16 = replace(fp32, spec=replace(run.spec, suite=run.spec.suite.with_precision("bf16")))

    def seconds(mode: str, done: int = 0) -> list[float]:
        plan, modes = [fp32, bf16], [mode, mode]
        done_of = [done, 0]
        return estimate.estimate_seconds(plan, done_of, tmp_path, accelerator.device, modes)

    assert seconds("inductor") == [12.0, 1200.0]
    assert seconds("inductor", done=9) == [3.0, 1200.0]
    assert seconds("eager") == [1200.0, 1200.0]
