"""Tests that need a GPU; skipped without one."""

import gc
import json
from pathlib import Path

import pytest
import torch
from conftest import METHODS, Completing, Watcher
from launched import result_of, write_method
from test_step import compare_steps

from kdbench.bench.subject import Subject
from kdbench.data import Images, random_images
from kdbench.engine.device import make_accelerator
from kdbench.engine.run import Run
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import Mode
from kdbench.launch.plan import make_specs
from kdbench.suite.load import load_suite

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

GRAPHS: tuple[Mode, ...] = ("graph", "inductor+graph")


@pytest.fixture
def make_run(suite, images, tmp_path, monkeypatch):
    """Return a function that builds a run on the GPU, in exact fp32 instead of TF32."""
    accelerator = make_accelerator()
    cuda_images = [part.to(torch.device("cuda")) for part in images]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.set_float32_matmul_precision("highest")

    def build(method: str, folder: str, mode: Mode, watcher: Watcher | None = None) -> Run:
        (spec,) = make_specs(suite, [method], ["resnet8"])
        where = tmp_path / folder, accelerator, watcher or Watcher()
        return Completing(spec, *cuda_images, *where, mode)

    yield build
    torch.set_float32_matmul_precision("high")


def spec_and_images(method: str, architecture: str) -> tuple[RunSpec, Images]:
    """Return a run on CIFAR-100, and random images for it on the GPU."""
    suite = load_suite("cifar100")
    (spec,) = make_specs(suite, [method], [architecture])
    return spec, random_images(suite.data, 8 * suite.batch_size).to(torch.device("cuda"))


@pytest.mark.parametrize("mode", GRAPHS)
@pytest.mark.parametrize("method", METHODS)
def test_a_recorded_step_gives_the_losses_of_an_eager_one(make_run, method, mode):
    torch.compiler.reset()
    eager, other = make_run(method, "eager", "eager"), make_run(method, "graph", mode)
    compare_steps(eager, other)
    assert other.observer.messages == [] and other.step.mode == mode


@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_synchronise(method):
    spec, images = spec_and_images(method, "resnet8")
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
    result = result_of(method, suite="tiny" if precision == "fp32" else "tiny@precision=bf16")
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


def test_a_stopped_run_resumes_with_a_graph(make_run):
    whole = make_run("ffsd", "whole", "graph").train()
    with pytest.raises(KeyboardInterrupt):
        make_run("ffsd", "stopped", "graph", Watcher(stop_after=6)).train()
    resumed = make_run("ffsd", "stopped", "graph")
    histories = whole.history, resumed.train().history
    (said,) = resumed.observer.messages  # nothing of a fall-back
    assert "resumes after step 4 of 12" in said and resumed.step.mode == "graph"
    losses = [torch.tensor(list(history[-1].losses.values())) for history in histories]
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.01)


def test_several_runs_share_a_gpu(run_tiny):
    code, _, err = run_tiny("--methods", "baseline,ffsd", "--seeds", "2", "--jobs", "2")
    assert (code, err) == (0, "")
    files = [json.loads(file.read_text()) for file in Path("results").rglob("seed*.json")]
    assert len(files) == 4 and all(result["cost"]["jobs"] == 2 for result in files)


def test_running_out_of_memory_on_the_gpu_is_recorded(run_tiny):
    hungry = write_method("hungry", "views.new_empty(2**42)")
    code, _, err = run_tiny("--methods", f"{hungry},baseline", "--compile", "graph")
    assert code == 1 and "Traceback" not in err
    assert "out of memory at batch size 40" in result_of("hungry")["reason"]
    assert result_of("baseline")["status"] == "finished"


def test_out_of_memory_while_recording_falls_back():
    spec, images = spec_and_images("ffsd", "resnet20")
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
