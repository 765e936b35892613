"""What a run has to compute, whatever device does it."""

import torch
from torch import Tensor

from kdbench.engine.measure import count_flops
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import check_terms
from kdbench.method import Method
from kdbench.seeds import seeded

COUNTED = 16
"""Images that are counted: the work is linear in their number, but for terms that pair them."""


def training_flops(spec: RunSpec, device: torch.device) -> int:
    """FLOPs of all training steps of a run, 2 per multiply-add.

    Forward and backward of all networks on all views are counted once, on a method of their own.
    """
    suite = spec.suite
    images = min(COUNTED, suite.batch_size)
    size = suite.data.image_size
    method = spec.build_on(device).train()
    method.begin_epoch(0)
    with seeded(spec.seed, "work"):
        views = torch.randn(spec.views, images, 3, size, size, device=device)
        labels = torch.randint(suite.data.classes, (images,), device=device)
        flops = count_flops(lambda: _backward(method, views, labels))
    return round(flops * suite.batch_size * suite.total_steps / images)


def _backward(method: Method, views: Tensor, labels: Tensor) -> None:
    terms = method(views, labels)
    check_terms(terms)
    torch.stack(list(terms.values())).sum().backward()
