"""What things take, with pytest-benchmark: `pytest tests/benchmarks`.

Nothing here fails for being slow: figures are read beside others of the same run. The comparison
of methods, in turn within one process, is `kdbench bench`.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import METHODS
from torch import Tensor

from kdbench.bench.subject import Subject
from kdbench.data import EvaluationBatches, Images, TrainingBatches, random_images
from kdbench.engine.evaluate import evaluate
from kdbench.launch.plan import make_specs
from kdbench.store import read, save
from kdbench.suite import Suite, load_suite

RESULTS = Path(__file__).parents[2] / "results" / "cifar100-reduced"


@pytest.fixture(scope="module")
def cifar() -> Suite:
    return load_suite("cifar100")


@pytest.fixture(scope="module")
def images(cifar) -> Images:
    return random_images(cifar.data, 8 * cifar.batch_size)


@pytest.mark.benchmark(group="step, ResNet-8, batch 128")
@pytest.mark.parametrize("method", METHODS)
def test_step(benchmark, cifar, images, method):
    (spec,) = make_specs(cifar, [method], ["resnet8"])
    subject = Subject(spec, "eager", images)
    benchmark.pedantic(subject.train, args=(1,), rounds=3)
    work = subject.work
    benchmark.extra_info |= {
        "networks": spec.networks,
        "data share": subject.load(5) / benchmark.stats.stats.median,
        "GB": work.bytes / 1e9,
        "GFLOP": work.flops / 1e9,
    }


@pytest.mark.benchmark(group="batches of 128 CIFAR-sized images")
@pytest.mark.parametrize("views", [1, 3])
def test_data_pipeline(benchmark, cifar, images, views):
    batches = TrainingBatches(images, cifar, seed=0, views=views)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from batches.epoch(0)

    benchmark(next, endless())


@pytest.mark.benchmark(group="evaluation, ResNet-20, 1,024 images")
def test_evaluation(benchmark, cifar, images):
    (spec,) = make_specs(cifar, ["baseline"], [])
    method = spec.build_on(torch.device("cpu"))
    benchmark.pedantic(evaluate, args=(method, EvaluationBatches(images, cifar)), rounds=3)


@pytest.mark.benchmark(group="start-up")
def test_help(benchmark):
    benchmark.pedantic(_kdbench, args=("--help",), rounds=5, warmup_rounds=1)


@pytest.mark.benchmark(group="report")
def test_report_over_1000_results(benchmark, tmp_path):
    made = [read(file) for file in sorted(RESULTS.glob("*/*/seed0.json"))]
    for seed in range(1000 // len(made)):
        for result in made:
            identity = result.identity.model_copy(update={"seed": seed})
            save(tmp_path, result.model_copy(update={"identity": identity}))
    command = ("report", "--results-dir", str(tmp_path))
    benchmark.pedantic(_kdbench, args=command, rounds=3, warmup_rounds=1)


def _kdbench(*arguments: str) -> None:
    command = [sys.executable, "-m", "kdbench", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
