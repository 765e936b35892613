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
from network_by_network import NetworkByNetwork
from torch import Tensor

from kdbench.bench.subject import Subject
from kdbench.data import EvaluationBatches, Images, TrainingBatches, random_images
from kdbench.engine.evaluate import evaluate
from kdbench.engine.measure import synchronized_time
from kdbench.engine.step import Mode
from kdbench.launch.plan import make_specs
from kdbench.results.files import read_result, write_result
from kdbench.suite.load import load_suite
from kdbench.suite.suite import Suite

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS: list[Mode] = ["eager", "graph", "inductor+graph"] if DEVICE.type == "cuda" else ["eager"]
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


@pytest.mark.benchmark(group="FFSD step, ResNet-20, batch 128")
@pytest.mark.parametrize("way", ["network by network", *WAYS])
def test_ffsd_step_against_the_published_code(benchmark, cifar, images, way):
    (spec,) = make_specs(cifar, ["ffsd"], ["resnet20"])
    images = images.to(DEVICE)
    if way == "network by network":
        batches = list(TrainingBatches(images, cifar, 0, 1).epoch(0))
        step = NetworkByNetwork(spec.build_on(DEVICE), cifar.optimizer)

        def train(steps: int) -> float:
            started = synchronized_time(DEVICE)
            for views, labels in batches[:steps]:
                step(views, labels)
            return synchronized_time(DEVICE) - started

        train(3)
    else:
        train = Subject(spec, way, images).train
    steps = len(WAYS)  # one on a CPU
    benchmark.pedantic(train, args=(steps,), rounds=3 if steps == 1 else 50)
    benchmark.extra_info["milliseconds a step"] = 1000 * benchmark.stats.stats.median / steps


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
    made = [read_result(file) for file in sorted(RESULTS.glob("*/*/seed0.json"))]
    for seed in range(1000 // len(made)):
        for result in made:
            identity = result.identity.model_copy(update={"seed": seed})
            write_result(tmp_path, result.model_copy(update={"identity": identity}))
    command = ("report", "--results-dir", str(tmp_path))
    benchmark.pedantic(_kdbench, args=command, rounds=3, warmup_rounds=1)


def _kdbench(*arguments: str) -> None:
    command = [sys.executable, "-m", "kdbench", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
