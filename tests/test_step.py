"""Tests of training steps in all modes: equal numbers, and fallbacks."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import METHODS, is_one_sentence
from launched import result_of, write_method
from made_results import made
from torch import Tensor

from kdbench.engine import step as step_module
from kdbench.engine.compile_mode import resolve_compile_mode
from kdbench.engine.environment import device_name
from kdbench.engine.optimizers import build_optimizers, set_learning_rates
from kdbench.engine.run import Run
from kdbench.engine.step import REPLAY_TOLERANCE, Mode, TrainingState, TrainingStep, state_tensors
from kdbench.launch import estimate
from kdbench.launch.plan import PlannedRun, make_specs
from kdbench.results.files import write_result
from kdbench.suite.load import load_suite

STEPS = 50
OUT_OF_MEMORY = "Tried to allocate 20.00 GiB."
RAISES = f"import torch\n        raise torch.OutOfMemoryError('{OUT_OF_MEMORY}')"
ASKS = "return {'ce': views.new_ones(2**60).sum()}"  # more than any machine has


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_step_gives_the_losses_of_an_eager_one(make_run, method):
    torch.compiler.reset()
    eager, other = make_run(method, folder="eager"), make_run(method, folder="compiled")
    messages: list[str] = []
    other.step = TrainingStep(other.method, other.optimizers, "fp32", "inductor", messages.append)
    compare_steps(eager, other)
    assert messages == [] and other.step.mode == "inductor"


def compare_steps(eager: Run, other: Run) -> None:
    """Compare 50 training steps, each from the state that the eager steps came to.

    Left to themselves two fp32 trainings part whatever computes them: rounding differences grow
    tenfold every few steps, also between one thread and two.
    """
    steps = 0
    for epoch in range(STEPS):
        for run in (eager, other):
            run.method.train().begin_epoch(epoch)
        for views, labels in eager.training.epoch(epoch):
            if steps > 0:  # they begin alike
                hand_over(eager, other)
            before = TrainingState(eager.method, eager.optimizers)
            expected, values = eager.step(views, labels), other.step(views, labels).clone()
            # A small term is a difference of large numbers: it is held to the sum of all.
            small = 1e-6 * expected.sum().item()
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=small)
            steps += 1
        if steps >= STEPS:
            break
    assert steps >= STEPS
    updated = TrainingState(eager.method, eager.optimizers)
    state = TrainingState(other.method, other.optimizers)
    assert state.difference(updated, before) < REPLAY_TOLERANCE


@torch.no_grad()
def hand_over(source: Run, target: Run) -> None:
    """Copy the state of one run to another in place, because a graph holds the tensors."""
    mine = state_tensors(target.method, target.optimizers)
    theirs = state_tensors(source.method, source.optimizers)
    for tensor, other in zip(mine, theirs, strict=True):
        tensor.copy_(other)


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
    method = write_method("conditional", "if views.isnan().any(): return {}")
    command = ("--methods", method, "--seeds", "2", "--epochs", "1")
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
        ("raise MemoryError", "off", "MemoryError"),
    ],
    ids=["eager", "compiled", "asks", "of Python"],
)
def test_running_out_of_memory_is_recorded_with_batch_size_and_peak(
    run_tiny, statement, mode, said
):
    method = write_method("hungry", statement)
    code, _, err = run_tiny("--methods", f"{method},baseline", "--compile", mode)
    assert code == 1 and "Traceback" not in err
    head, _, rest = result_of("hungry")["reason"].partition(" MiB: ")
    assert head.startswith("out of memory at batch size 40, peak ")
    assert int(head.rpartition(" ")[2].replace(",", "")) > 10
    before = Path(method).read_text().partition(statement)[0] + statement
    line = before.count("\n") + 1
    assert rest.startswith(f"hungry.py, line {line}: ") and said in rest
    assert result_of("baseline")["status"] == "finished"  # the next goes on


def fake_graph(run: Run, replays: bool = True, error: Exception | None = None) -> Callable:
    """Fake `capture_cuda_graph`: recording trains nothing, a replay fills the same tensor."""

    def capture(step: Callable[[], Tensor], *_: object) -> tuple[Callable[[], object], Tensor]:
        before = TrainingState(run.method, run.optimizers)
        output = step().clone()
        if error is not None:  # a half-recorded step may have trained
            raise error
        before.restore()
        return lambda: replays and output.copy_(step()), output

    return capture


@pytest.fixture
def train_beside_eager(make_run, monkeypatch):
    """Return a function that trains by eager steps and by others, and compares all numbers."""

    def train(
        method: str, mode: Mode, epochs: int = 1, **graph: Any
    ) -> tuple[Run, Mode, list[str]]:
        eager, other = make_run(method, folder="eager"), make_run(method, folder="other")
        monkeypatch.setattr(step_module, "capture_cuda_graph", fake_graph(other, **graph))
        messages: list[str] = []
        step = TrainingStep(other.method, other.optimizers, "fp32", mode, messages.append)
        for epoch in range(epochs):
            for views, labels in eager.training.epoch(epoch):
                for run in (eager, other):
                    set_learning_rates(run.optimizers, 1 / (1 + epoch))
                assert torch.equal(step(views, labels), eager.step(views, labels))
        states = other.method.state_dict(), eager.method.state_dict()
        torch.testing.assert_close(*states, rtol=0, atol=0)
        return other, step.mode, messages

    return train


def test_out_of_memory_only_when_compiled_falls_back_to_eager(train_beside_eager, monkeypatch):
    def hungry(*_: object) -> None:
        raise torch.OutOfMemoryError(OUT_OF_MEMORY)

    compile_ = partial(torch.compile, backend=lambda graph, inputs: hungry)
    monkeypatch.setattr(torch, "compile", compile_)
    _, mode, messages = train_beside_eager("dml", "inductor")
    assert (mode, messages) == ("eager", [f"cannot be compiled: {OUT_OF_MEMORY}"])


REFUSED = "CUDA error: operation not permitted when stream is capturing"


@pytest.mark.parametrize(
    ("graph", "complaint"),
    [
        ({}, None),
        ({"replays": False}, "its replay differs by"),
        ({"error": RuntimeError(f"\n{REFUSED}\nmore")}, REFUSED),
        ({"error": torch.OutOfMemoryError(OUT_OF_MEMORY)}, OUT_OF_MEMORY),
    ],
    ids=["recorded", "frozen", "refused", "hungry"],
)
def test_a_recorded_step_trains_as_the_step_itself_or_is_not_kept(
    train_beside_eager, graph, complaint
):
    _, mode, messages = train_beside_eager("independent", "graph", epochs=3, **graph)
    if complaint is None:
        assert (mode, messages) == ("graph", [])
    else:
        assert mode == "eager"
        (message,) = messages
        assert message.startswith(f"cannot be recorded: {complaint}") and "\n" not in message


def test_networks_of_a_recorded_step_are_compiled_together(train_beside_eager, monkeypatch):
    torch.compiler.reset()
    compiled: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        compiled.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    run, mode, messages = train_beside_eager("ffsd", "inductor+graph")
    stems = [str(graph.code).count("stem") > 0 for graph in compiled]
    assert stems.count(True) == 1 and len(stems) > 1
    assert (mode, messages) == ("inductor+graph", [])
    assert not any("forward" in vars(part) for part in run.method.modules())


def test_the_state_of_a_step_is_all_that_it_changes(make_run):
    run = make_run("ffsd")
    state = partial(TrainingState, run.method, run.optimizers)
    views, labels = next(run.training.epoch(0))
    run.method.train().begin_epoch(0)
    before = state()  # optimizers have made no state yet
    first = run.step(views, labels)
    before.restore()
    assert not any(optimizer.state for optimizer in run.optimizers)
    assert torch.equal(first, run.step(views, labels))
    after = state()
    run.step(views, labels)
    third = state()
    after.restore()
    assert state().difference(third, after) == 1.0


def test_rates_of_a_recorded_step_are_tensors_that_it_reads(make_run, suite):
    optimizers = build_optimizers(make_run("baseline").method, suite.optimizer, capturable=True)
    (group,) = optimizers[0].param_groups
    rate = group["lr"]
    set_learning_rates(optimizers, 0.1)
    assert isinstance(rate, Tensor) and group["lr"] is rate
    assert rate.item() == pytest.approx(0.1 * suite.optimizer.learning_rate)


def test_an_estimate_uses_rates_of_runs_executed_alike(suite, tmp_path, monkeypatch):
    (spec,) = make_specs(suite, ["baseline"], ["resnet20"])
    monkeypatch.setattr(estimate, "_time_step", lambda *_: 100.0)
    device = torch.device("cpu")
    cost = {"step_milliseconds": 1000.0}
    environment = {"step": "inductor", "device": device_name(device)}
    write_result(tmp_path, made("baseline", suite=suite, cost=cost, environment=environment))
    fp32 = PlannedRun(spec, tmp_path / "other.json", "to run")
    bf16 = replace(fp32, spec=replace(spec, suite=suite.with_precision("bf16")))

    def seconds(mode: str, done: int = 0) -> list[float]:
        return estimate.estimate_seconds([fp32, bf16], [done, 0], tmp_path, device, [mode] * 2)

    assert seconds("inductor") == [12.0, 1200.0]
    assert seconds("inductor", done=9) == [3.0, 1200.0]
    assert seconds("eager") == [1200.0, 1200.0]
