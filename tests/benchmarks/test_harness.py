"""Benchmark of the overhead that the harness adds to training steps."""

import time

import pytest
from conftest import Watcher

from kdbench.data import random_images
from kdbench.engine.run import Run
from kdbench.engine.step import TrainingStep
from kdbench.launch.plan import make_specs
from kdbench.suite.load import load_suite


@pytest.mark.benchmark(group="epoch of 31 steps, one ResNet-20, batch 128, no evaluation")
def test_epoch_time_against_its_steps(benchmark, accelerator, tmp_path, monkeypatch):
    """The ratio is in the benchmark's extra information."""
    suite = load_suite("cifar100-reduced")
    (spec,) = make_specs(suite, ["baseline"], [])
    images = random_images(suite.data, 31 * suite.batch_size)
    run = Run(spec, images, images, tmp_path, accelerator, Watcher())
    step, took = TrainingStep.__call__, []

    def timed(*arguments):
        started = time.perf_counter()
        values = step(*arguments)
        took.append(time.perf_counter() - started)
        return values

    monkeypatch.setattr(TrainingStep, "__call__", timed)
    benchmark.pedantic(run._train_epoch, args=(0,), rounds=1)
    assert len(took) == 31
    benchmark.extra_info["epoch / its steps"] = benchmark.stats.stats.total / sum(took)
