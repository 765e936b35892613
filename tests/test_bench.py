"""Tests of `kdbench bench`: counts, ratios and output."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import is_one_sentence
from torch import nn

from kdbench.bench.record import Benchmark
from kdbench.bench.roofline import DeviceRates, StepWork, count_step_work, measure_rates
from kdbench.engine.measure import MemoryMeter


def test_work_is_the_bytes_and_flops_of_every_operation():
    x, w = torch.ones(8, 16), torch.ones(16, 4)

    def step():
        y = x @ w  # reads 8*16 + 16*4, writes 8*4
        y.view(4, 8).t()  # touches nothing
        torch.empty(100)  # neither
        y.add_(1.0)  # reads and writes 8*4
        return x[:1].expand(8, 16).sum(0)  # reads one row of 16, writes 16

    work = count_step_work(step)
    assert work.bytes == 4 * (8 * 16 + 16 * 4 + 8 * 4 + 2 * 8 * 4 + 8 * 16 + 16)
    assert work.flops == 2 * 8 * 16 * 4
    assert work.operations == 3


def test_the_backward_pass_is_counted():
    layer = nn.Linear(16, 4, bias=False)
    x = torch.ones(8, 16)
    forward = count_step_work(lambda: layer(x))
    both = count_step_work(lambda: layer(x).sum().backward())
    assert both.bytes > 2 * forward.bytes
    assert both.flops == 2 * forward.flops  # the input asks for no gradient
    depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    images = torch.ones(2, 8, 4, 4, requires_grad=True)
    flops = 2 * (2 * 8 * 4 * 4) * 9
    assert count_step_work(lambda: depthwise(images)).flops == flops
    assert count_step_work(lambda: depthwise(images).sum().backward()).flops == 3 * flops


def test_the_floor_is_the_longer_of_bytes_and_flops():
    work = StepWork(bytes=100, flops=1000, operations=1)
    assert work.min_seconds(DeviceRates(bytes_per_second=10, flops_per_second=1000)) == 10
    assert work.min_seconds(DeviceRates(bytes_per_second=1000, flops_per_second=10)) == 100


def test_rates_of_this_device_are_plausible():
    rates = measure_rates(torch.device("cpu"), "fp32")
    assert 1e8 < rates.bytes_per_second < 1e13
    assert 1e8 < rates.flops_per_second < 1e16


@pytest.fixture
def bench(kdbench):
    return lambda *arguments: kdbench("bench", "--suite", "digits", "--rounds", "2", *arguments)


def test_ratios_are_to_the_reference_with_as_many_networks(bench):
    methods = ("--methods", "baseline,independent,okddip", "--set", "okddip.networks=4")
    code, out, _ = bench(*methods, "--format", "json")
    assert code == 0
    measured = Benchmark.model_validate_json(out)
    baseline, independent, okddip = measured.rows
    names = [row.method for row in measured.rows]
    assert names == ["baseline", "independent", "okddip@networks=4"]
    assert baseline.ratio is None  # the control takes two networks at least
    assert independent.ratio.median == 1.0
    assert okddip.networks == 4
    low, high = okddip.ratio.quartiles
    assert 0 < low <= okddip.ratio.median <= high
    assert independent.flops == pytest.approx(3 * baseline.flops, rel=0.01)
    for row in measured.rows:
        assert row.images_per_second == pytest.approx(64e3 / row.milliseconds.median)
        assert 0 < row.data_share < 1 and row.peak_memory_bytes > 0 and row.step == "eager"
    assert not re.search(r"/(home|root|tmp|work)", json.dumps(measured.model_dump(mode="json")))


HUNGRY = """
import torch
from kdbench.methods.baseline import Baseline

class Hungry(Baseline):
    steps = 0

    def forward(self, views, labels):
        self.steps += 1
        if self.steps > {enough}:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB.")
        return super().forward(views, labels)
"""


@pytest.mark.parametrize("enough", [0, 12], ids=["at once", "once prepared"])
def test_a_method_that_runs_out_of_memory_is_reported_and_the_others_are_measured(bench, enough):
    Path("hungry.py").write_text(HUNGRY.format(enough=enough))
    code, out, err = bench("--methods", "./hungry.py,baseline", "--format", "json")
    assert code == 1 and is_one_sentence(err)
    assert "'hungry' (resnet8, eager) ran out of memory at batch size 64, peak " in err
    (row,) = Benchmark.model_validate_json(out).rows
    assert row.method == "baseline" and row.ratio is None


def test_the_table_names_its_conditions(bench):
    methods = ("--methods", "dml,baseline", "--against", "dml")
    code, out, _ = bench(*methods, "--format", "markdown")
    assert code == 0 and out.startswith("### digits, resnet8, batch 64")
    (row,) = [line for line in out.splitlines() if line.startswith("| dml")]
    assert "| eager" in row and "1.000" in row
    assert "- n/a: no dml with the same number of networks" in out
    assert f"torch {torch.__version__}" in out and "Median of 2 rounds" in out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--compile", "off,inducter"), "Did you mean 'inductor'?"),
        (("--compile", "graph"), "needs a CUDA GPU"),
        (("--rounds", "0"), "--rounds must be at least 1"),
        (("--methods", "dlm"), "Did you mean 'dml'?"),
        (("--against", "independant"), "Did you mean 'independent'?"),
    ],
)
def test_mistakes_print_one_sentence(bench, arguments, complaint):
    code, out, err = bench("--methods", "dml", *arguments)
    assert code == 2 and not out
    assert complaint in err.replace("\n", " ") and "Traceback" not in err


@pytest.mark.slow
def test_memory_does_not_grow_with_steps(make_run):
    run = make_run("ffsd")
    batches = list(run.training.epoch(0))

    def train(steps: int) -> int:
        for index in range(steps):
            run.step(*batches[index % len(batches)])
        return MemoryMeter(torch.device("cpu")).peak()  # now: nothing came after its start

    before = train(50)
    assert train(200) - before < 2 * 2**20
