"""FLOPs of a training run, independent of the device."""

import torch
from torch import Tensor

from kdbench.engine.measure import count_flops
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import check_terms
from kdbench.method import Method
from kdbench.seeds import seeded

COUNTED_IMAGES = 16
"""Batch size at which FLOPs are counted.

FLOPs are linear in the batch size, except for loss terms that compare pairs of images.
"""


def training_flops(spec: RunSpec, device: torch.device) -> int:
    """Return the FLOPs of all training steps of a run, counting 2 per multiply-add.

    One forward and backward pass of all networks on all views is counted on a separate instance
    of the method and scaled to the whole schedule.
    """
    suite = spec.suite
    images = min(COUNTED_IMAGES, suite.batch_size)
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
