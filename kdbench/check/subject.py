"""A method under test, and tiny training runs of it on random images."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kdbench.data import random_images
from kdbench.discovery import MethodEntry
from kdbench.engine.device import make_accelerator
from kdbench.engine.observer import NullObserver
from kdbench.engine.run import Run
from kdbench.engine.spec import RunSpec
from kdbench.method import Method, MethodOptions
from kdbench.roles import is_network
from kdbench.seeds import generator
from kdbench.suite.load import load_suite
from kdbench.suite.suite import Suite

BATCH_SIZE = 12
EPOCHS = 2


def tiny_suite() -> Suite:
    """Return a suite of random 8x8 images of ten classes, with two epochs of two steps."""
    digits = load_suite("digits")
    splits = {
        "train": digits.data.train.model_copy(update={"images": 2 * BATCH_SIZE}),
        "test": digits.data.test.model_copy(update={"images": BATCH_SIZE + 5}),
    }
    changes = {
        "name": "check",
        "data": digits.data.model_copy(update=splits),
        "batch_size": BATCH_SIZE,
        "evaluation_batch_size": BATCH_SIZE,
    }
    return digits.model_copy(update={"schedule": digits.schedule.scaled(EPOCHS), **changes})


@dataclass(frozen=True)
class Subject:
    """A method under test, with its options."""

    entry: MethodEntry
    options: MethodOptions
    architecture: str = "resnet8"

    @cached_property
    def suite(self) -> Suite:
        return tiny_suite()

    @cached_property
    def spec(self) -> RunSpec:
        return RunSpec(self.suite, self.architecture, self.entry, self.options, seed=0)

    def build(self) -> Method:
        """Return a fresh method in float64 and train mode, at the start of its first epoch."""
        method = self.spec.build().double().train()
        method.begin_epoch(0)
        return method

    def make_batch(self) -> tuple[Tensor, Tensor]:
        """Return views (V, B, 3, H, W) in float64 and labels (B,)."""
        size = self.suite.data.image_size
        shape = (self.spec.views, BATCH_SIZE, 3, size, size)
        views = torch.randn(shape, generator=generator(0, "check"), dtype=torch.float64)
        return views, torch.arange(BATCH_SIZE) % self.suite.data.classes

    @contextmanager
    def open_run(self, accelerator: Accelerator | None = None) -> Iterator[Run]:
        """Open a training run of the method in a temporary folder."""
        data = self.suite.data
        train, test = (random_images(data, split.images) for split in (data.train, data.test))
        with tempfile.TemporaryDirectory() as folder:
            device = accelerator or make_accelerator(cpu=True)
            run = Run(self.spec, train, test, Path(folder), device, NullObserver())
            try:
                yield run
            finally:
                run.files.finish()  # waits for the checkpoint before the folder is removed


def find_own_parameters(method: Method, images: Tensor) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters, by role, that only the logits of that network depend on."""
    named = {n: p for n, p in method.named_parameters() if p.requires_grad}
    reached: dict[str, set[str]] = {}
    for role, logits in method.predict(images).items():
        if is_network(role):
            gradients = torch.autograd.grad(
                logits.sum(), list(named.values()), retain_graph=True, allow_unused=True
            )
            reached[role] = {n for n, g in zip(named, gradients, strict=True) if g is not None}
    return {
        role: {
            n: named[n]
            for n in names - set().union(*(other for r, other in reached.items() if r != role))
        }
        for role, names in reached.items()
    }
