"""Tests that need a GPU; skipped without one."""

import gc
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import METHODS, Completing, Watcher
from launched import result_of

from kdbench.bench.subject import Subject
from kdbench.data import Images, random_images
from kdbench.discovery import find_methods
from kdbench.engine.device import make_accelerator
from kdbench.engine.run import Run
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import REPLAY_TOLERANCE, Mode, TrainingState, state_tensors
from kdbench.launch.plan import make_specs
from kdbench.suite.load import load_suite

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

STEPS = 50
GRAPHS: tuple[Mode, ...] = ("graph", "inductor+graph")

MakeRun = Callable[..., Run]


@pytest.fixture
def cuda_images(images: tuple[Images, Images]) -> tuple[Images, Images]:
    train, test = images
    return train.to(torch.device("cuda")), test.to(torch.device("cuda"))


@pytest.fixture
def make_run(suite, cuda_images, tmp_path, monkeypatch) -> MakeRun:
    """Return a function that builds a run on the GPU, in exact fp32 instead of TF32."""
    accelerator = make_accelerator()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")

    def build(method: str, folder: str, mode: Mode, watcher: Watcher | None = None) -> Run:
        (entry,) = find_methods([method])
        spec = RunSpec(suite, "resnet8", entry, entry.options({}), 0)
        watcher = watcher or Watcher()
        return Completing(spec, *cuda_images, tmp_path / folder, accelerator, watcher, mode)

    yield build
    torch.set_float32_matmul_precision("high")


@pytest.mark.parametrize("mode", GRAPHS)
@pytest.mark.parametrize("method", METHODS)
def test_a_recorded_step_gives_the_losses_of_an_eager_one(make_run, method, mode):
    """Compare 50 steps, each from the state of the eager steps."""
    torch.compiler.reset()
    watcher = Watcher()
    eager, other = make_run(method, "eager", "eager"), make_run(method, "graph", mode, watcher)
    steps = 0
    for epoch in range(STEPS):
        for run in (eager, other):
            run.method.train().begin_epoch(epoch)
        for views, labels in eager.training.epoch(epoch):
            if steps > 0:  # they begin alike
                hand_over_in_place(eager, other)
            before = TrainingState(eager.method, eager.optimizers)
            expected, values = eager.step(views, labels), other.step(views, labels).clone()
            small = 1e-6 * expected.sum().item()  # a small term is a difference of large numbers
            torch.testing.assert_close(values, expected, rtol=1e-5, atol=small)
            steps += 1
        if steps >= STEPS:
            break
    assert steps >= STEPS and watcher.messages == [] and other.step.mode == mode
    updated = TrainingState(eager.method, eager.optimizers)
    assert (
        TrainingState(other.method, other.optimizers).difference(updated, before) < REPLAY_TOLERANCE
    )


@torch.no_grad()
def hand_over_in_place(source: Run, target: Run) -> None:
    """Copy the state of one run to another in place, because its graph holds the tensors."""
    mine = state_tensors(target.method, target.optimizers)
    theirs = state_tensors(source.method, source.optimizers)
    for tensor, other in zip(mine, theirs, strict=True):
        tensor.copy_(other)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_synchronise(method):
    suite = load_suite("cifar100")
    (spec,) = make_specs(suite, [method], ["resnet8"])
    images = random_images(suite.data, 8 * suite.batch_size).to(torch.device("cuda"))
    for mode in ("eager", *GRAPHS):
        torch.compiler.reset()
        subject = Subject(spec, mode, images)
        assert subject.step.mode == mode
        try:
            torch.cuda.set_sync_debug_mode("error")
            for batch in subject.batches.epoch(0):
                subject.step(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_records_gpu_measurements(run_tiny, method, precision):
    asked = ("--methods", method, "--compile", "graph", "--precision", precision)
    code, _, err = run_tiny(*asked)
    assert (code, err) == (0, "")
    suite = "tiny" if precision == "fp32" else "tiny@precision=bf16"
    result = result_of(method, suite=suite)
    assert result["environment"]["step"] == "graph"
    assert result["environment"]["precision"] == ("tf32" if precision == "fp32" else "bf16")
    assert result["environment"]["device"] == torch.cuda.get_device_name()
    assert result["cost"]["peak_memory_kind"] == "device"
    assert result["cost"]["peak_memory_bytes"] > 2**20


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["off", "graph"])
def test_a_deterministic_run_gives_the_same_numbers_twice(run_tiny, method, mode):
    asked = ("--methods", method, "--compile", mode, "--deterministic")
    try:
        for folder in ("once", "twice"):
            folders = ("--results-dir", folder, "--runs-dir", f"runs-{folder}")
            code, _, err = run_tiny(*asked, *folders)
            assert (code, err) == (0, "")
    finally:
        torch.use_deterministic_algorithms(False)
    once, twice = (result_of(method, results=folder) for folder in ("once", "twice"))
    assert once["environment"]["deterministic"] and once["history"] == twice["history"]
    assert once["environment"]["command"].endswith(" --deterministic")


def test_a_stopped_run_resumes_with_a_graph(make_run, tmp_path):
    whole = make_run("ffsd", "whole", "graph").train()
    with pytest.raises(KeyboardInterrupt):
        make_run("ffsd", "stopped", "graph", Watcher(stop_after=6)).train()
    watcher = Watcher()
    resumed = make_run("ffsd", "stopped", "graph", watcher).train()
    assert watcher.messages == []
    losses = [list(result.history[-1].losses.values()) for result in (whole, resumed)]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=0.05, atol=0.01)


def test_several_runs_share_a_gpu(run_tiny):
    code, _, err = run_tiny("--methods", "baseline,ffsd", "--seeds", "2", "--jobs", "2")
    assert (code, err) == (0, "")
    files = [json.loads(file.read_text()) for file in Path("results").rglob("seed*.json")]
    assert len(files) == 4 and all(result["cost"]["jobs"] == 2 for result in files)


def test_running_out_of_memory_on_the_gpu_is_recorded(run_tiny):
    Path("hungry.py").write_text(
        "import torch\n"
        "from kdbench.methods.baseline import Baseline\n\n\n"
        "class Hungry(Baseline):\n"
        "    def forward(self, views, labels):\n"
        "        torch.empty(2**42, device=views.device)\n"
        "        return super().forward(views, labels)\n"
    )
    code, _, err = run_tiny("--methods", "./hungry.py,baseline", "--compile", "graph")
    assert code == 1 and "Traceback" not in err
    assert "out of memory at batch size 40" in result_of("hungry")["reason"]
    assert result_of("baseline")["status"] == "finished"


def test_out_of_memory_while_recording_falls_back():
    suite = load_suite("cifar100")
    (spec,) = make_specs(suite, ["ffsd"], ["resnet20"])
    images = random_images(suite.data, 8 * suite.batch_size).to(torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    Subject(spec, "eager", images)
    gc.collect()
    torch.cuda.empty_cache()
    needed, there = torch.cuda.max_memory_reserved(), torch.cuda.mem_get_info()[1]
    said: list[str] = []
    try:
        # A graph keeps activations of its own, several times this.
        torch.cuda.set_per_process_memory_fraction((needed + 2**27) / there)
        subject = Subject(spec, "graph", images, said.append)
        losses = [subject.step(*batch).sum() for batch in subject.batches.epoch(0)]
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert subject.step.mode == "eager" and torch.stack(losses).isfinite().all()
    (reason,) = said
    assert reason.startswith("cannot be recorded: CUDA out of memory")
