"""One run in several processes: its numbers, and what is refused before it starts."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from unittest import mock

import pytest
import torch
import two_ranks
from conftest import METHODS, finish, is_one_sentence
from launched import DRAWING
from torch.nn.parallel import DistributedDataParallel

from kdbench.engine.device import make_accelerator
from kdbench.engine.part import PartOfEpoch, Share
from kdbench.engine.step import TrainingStep
from kdbench.errors import UserError
from kdbench.launch.place import Place
from kdbench.launch.shares import Shares, check_gpus, threads_are_the_users
from kdbench.launch.torchrun import torchrun

SHARED = [method for method in METHODS if method != "mcl"]
"""Methods whose loss of a batch is the mean of those of its parts; MCL contrasts within a part."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return the runs of all methods in one process and in two."""
    folder = tmp_path_factory.mktemp("made")
    accelerator = make_accelerator(cpu=True)
    (folder / "drawing.py").write_text(DRAWING)
    path = os.pathsep.join(path for path in sys.path if path)
    with mock.patch.dict(os.environ, KDBENCH_CACHE=str(folder / "cache"), PYTHONPATH=path):
        one = {"as it is": {m: two_ranks.train(m, folder / "one", accelerator) for m in METHODS}}
        with two_ranks.normalised_per_sample():
            exact = folder / "one exact"
            one["exact"] = {m: two_ranks.train(m, exact, accelerator) for m in METHODS}
            for method in METHODS:
                two_ranks.leave(method, folder / "one, left", accelerator)
        code, _, said = finish(torchrun(2, "two_ranks", str(folder)), seconds=600)
        assert (code, said) == (0, [])
        with two_ranks.normalised_per_sample():
            left = folder / "two, left"
            one["resumed"] = {m: two_ranks.train(m, left, accelerator) for m in METHODS}
    two = json.loads((folder / "made.json").read_text())
    assert two["processes"] == 2
    return one, two


def totals(run: dict) -> list[float]:
    return [sum(epoch["losses"].values()) for epoch in run["epochs"]]


def evaluated(run: dict) -> list[float]:
    return [role["loss"] for epoch in run["epochs"] for role in epoch["metrics"].values()]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_3_5_two_processes_train_as_one_does(made, method):
    one, two = (each["as it is"][method] for each in made)
    assert len(one["factors"]) == 8 and len(set(one["factors"])) > 2
    assert two["factors"] == one["factors"]
    rates = [[epoch["learning_rate"] for epoch in each["epochs"]] for each in (one, two)]
    assert rates[0] == rates[1]
    assert len(one["seen"]) == 99 and sorted(two["seen"]) == sorted(one["seen"])
    assert two["labels"] == one["labels"] and len(one["labels"]) == 99
    right = [epoch["metrics"]["student"]["top1"] * 99 / 100 for epoch in two["epochs"]]
    assert right == pytest.approx([round(count) for count in right])
    assert totals(two) == pytest.approx(totals(one), rel=0.1)
    assert evaluated(two) == pytest.approx(evaluated(one), rel=0.02)
    if method in SHARED:
        one, two = (each["exact"][method] for each in made)
        for mine, theirs in zip(two["epochs"], one["epochs"], strict=True):
            assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
        assert evaluated(two) == pytest.approx(evaluated(one), rel=1e-6)
    for way in ("as it is", "exact"):  # parameters, buffers and optimizers
        first, second = made[1][way][method]["states"]
        assert first == second, way


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_8_a_run_resumes_with_another_number_of_processes(made, method):
    whole = made[0]["exact"][method]
    losses, evaluation = (1e-6, 1e-6) if method in SHARED else (0.1, 0.02)
    for resumed in (each["resumed"][method] for each in made):
        assert resumed["steps"] == 2  # of eight
        assert totals(resumed) == pytest.approx(totals(whole), rel=losses)
        assert evaluated(resumed) == pytest.approx(evaluated(whole), rel=evaluation)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "drawing"])
@pytest.mark.parametrize("way", ["asked to stop", "killed"])
def test_8_two_processes_resume_within_an_epoch_with_equal_numbers(made, method, way):
    whole, resumed = made[1]["as it is"][method], made[1][way][method]
    if way == "killed":
        assert resumed["steps"] == 2  # a checkpoint after the sixth of eight
    else:  # one was asked, and both ended after the step that followed
        assert (resumed["steps"], resumed["signal"]) == (1, [signal.SIGTERM] * 2)
    assert resumed["epochs"] == whole["epochs"]
    assert resumed["states"] == whole["states"]


def test_8_resuming_with_fewer_processes_averages_their_states(make_run):
    run = make_run("baseline")

    def share(number: float) -> Share:
        buffers = {
            name: torch.full_like(buffer, number if buffer.is_floating_point() else 7)
            for name, buffer in run.method.named_buffers()
        }
        return Share([number], (), buffers)

    before = torch.get_rng_state()
    part = PartOfEpoch(2, ["ce/student"], [share(1.0), share(3.0)])
    assert part.restore(run.method, run.accelerator).tolist() == [2.0]
    assert torch.equal(torch.get_rng_state(), before)
    kinds = {
        (name.rpartition(".")[2], *buffer.unique().tolist())
        for name, buffer in run.method.named_buffers()
    }
    assert kinds == {("running_mean", 2), ("running_var", 2), ("num_batches_tracked", 7)}


def test_an_indivisible_batch_is_refused_first(run_tiny):
    for more in ([], ["--dry-run"], ["--data-dir", "nowhere", "--jobs", "2"]):
        code, out, err = run_tiny("--num-processes", "3", *more)
        assert (code, out) == (2, "")
        assert is_one_sentence(err) and "40 of suite 'tiny' does not divide by 3 processes" in err
    code, _, err = run_tiny("--num-processes", "0")
    assert code == 2 and is_one_sentence(err)
    code, out, err = run_tiny("--num-processes", "2", "--methods", "baseline", "--dry-run")
    assert (code, err) == (0, "")
    assert out.endswith("2 processes train each run together, on 20 images of a batch each.\n")


def no_compiler(graph, inputs):
    raise RuntimeError


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_a_step_is_compiled_under_ddp(make_run, tmp_path, monkeypatch, fails):
    # Inductor takes a minute; what Dynamo refuses, it refuses for every backend.
    backend = no_compiler if fails else "eager"
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    said: list[str] = []
    try:
        losses = []
        for mode in ("eager", "inductor"):
            run = make_run("ffsd")
            run.method.begin_epoch(0)
            wrapped = DistributedDataParallel(run.method)
            step = TrainingStep(wrapped, run.optimizers, "fp32", mode, said.append)
            losses.append([step(*batch) for batch in run.training.epoch(0)])
    finally:
        torch.distributed.destroy_process_group()
    assert step.mode == ("eager" if fails else "inductor")
    assert len(said) == fails
    for mine, theirs in zip(*losses, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5)


def test_a_number_of_processes_that_contradicts_the_launcher_prints_one_sentence(run_tiny):
    said = []
    for rank in ("0", "1"):
        place = {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": "2"}
        with mock.patch.dict(os.environ, place):
            code, out, err = run_tiny("--num-processes", "3")
        assert (code, out) == (2, "")
        said.append(err)
    assert is_one_sentence(said[0]) and "3 processes, and the launcher started 2" in said[0]
    assert said[1] == ""


def test_an_incomplete_launcher_environment_is_refused(run_tiny, monkeypatch):
    assert Place.of_this_process() == Place()
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run_tiny()
    assert code == 2 and is_one_sentence(err) and "unset WORLD_SIZE" in err


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    check_gpus(4)
    with pytest.raises(UserError, match="5 processes need a GPU each, and this machine has 4"):
        check_gpus(5)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_gpus(5)


def test_gpus_go_to_jobs_in_groups_and_threads_to_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("kdbench.launch.shares.cores", lambda: 16)
    shares = Shares.among(3, processes=2)
    environments = [shares.environment(slot) for slot in range(3)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["0,1", "2,3", "0,1"]
    assert {each["OMP_NUM_THREADS"] for each in environments} == {"2"}
    assert shares.on_a_device == 2


@pytest.mark.slow
def test_the_single_thread_that_torchrun_sets_is_overridden(monkeypatch):
    assert threads_are_the_users()
    # A process whose own parent was started without the variable, and set it for its children.
    code = "from kdbench.launch.shares import threads_are_the_users as t; print(t())"
    parent = f"export OMP_NUM_THREADS=1 TORCHELASTIC_RUN_ID=x; {sys.executable} -c '{code}'; true"
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert subprocess.check_output(["bash", "-c", parent]) == b"False\n"
    assert not threads_are_the_users()
