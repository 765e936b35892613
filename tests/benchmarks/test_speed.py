"""What things take, with pytest-benchmark: `pytest tests/benchmarks`.

Nothing here fails for being slow: figures are read beside others of the same run. The comparison
of methods, in turn within one process, is `kdbench bench`.
"""

import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import Watcher
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from kdbench.bench.subject import Subject
from kdbench.data import EvaluationBatches, TrainingBatches, random_images
from kdbench.engine.evaluate import evaluate
from kdbench.engine.measure import synchronized_time
from kdbench.engine.run import Run
from kdbench.engine.step import Mode, TrainingStep
from kdbench.launch.plan import make_specs
from kdbench.method import Method
from kdbench.results.files import read_result, write_result
from kdbench.suite.load import load_suite

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WAYS: list[Mode] = ["eager", "graph", "inductor+graph"] if DEVICE.type == "cuda" else ["eager"]
CIFAR = load_suite("cifar100")
IMAGES = random_images(CIFAR.data, 8 * CIFAR.batch_size)
RESULTS = Path(__file__).parents[2] / "results" / "cifar100-reduced"


class NetworkByNetwork:
    """The step of published code: a backward pass and an optimizer, as torch makes it by default,
    for each network, and every loss is read when it exists.
    """

    def __init__(self, method: Method):
        self.method = method.to(memory_format=torch.contiguous_format).train()
        self.optimizers = [self._optimizer(network) for network in method.children()]

    def __call__(self, views: Tensor, labels: Tensor) -> None:
        losses: dict[str, list[Tensor]] = defaultdict(list)
        for name, term in self.method(views.contiguous(), labels).items():
            term.item()
            losses[name.partition("/")[2]].append(term)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        *others, last = losses.values()
        for network in others:
            torch.stack(network).sum().backward(retain_graph=True)
        torch.stack(last).sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()

    def _optimizer(self, network: torch.nn.Module) -> Optimizer:
        recipe = CIFAR.optimizer.model_dump()
        learning_rate = recipe.pop("learning_rate")
        if any(isinstance(module, torch.nn.ConvTranspose2d) for module in network.modules()):
            return Adam(network.parameters(), lr=1e-3, weight_decay=recipe["weight_decay"])
        return SGD(network.parameters(), lr=learning_rate, **recipe)


@pytest.mark.benchmark(group="FFSD step, ResNet-20, batch 128")
@pytest.mark.parametrize("way", ["network by network", *WAYS])
def test_ffsd_step_against_the_published_code(benchmark, way):
    (spec,) = make_specs(CIFAR, ["ffsd"], ["resnet20"])
    images = IMAGES.to(DEVICE)
    if way == "network by network":
        batches = list(TrainingBatches(images, CIFAR, 0, 1).epoch(0))
        step = NetworkByNetwork(spec.build_on(DEVICE))

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
def test_data_pipeline(benchmark, views):
    batches = TrainingBatches(IMAGES, CIFAR, seed=0, views=views)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from batches.epoch(0)

    benchmark(next, endless())


@pytest.mark.benchmark(group="evaluation, ResNet-20, 1,024 images")
def test_evaluation(benchmark):
    (spec,) = make_specs(CIFAR, ["baseline"], [])
    method = spec.build_on(torch.device("cpu"))
    benchmark.pedantic(evaluate, args=(method, EvaluationBatches(IMAGES, CIFAR)), rounds=3)


@pytest.mark.benchmark(group="epoch of 31 steps, one ResNet-20, batch 128, no evaluation")
def test_epoch_time_against_its_steps(benchmark, accelerator, tmp_path, monkeypatch):
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
