"""What a run has to compute, whatever device does it."""

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from kdbench.engine.spec import RunSpec
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
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward}
    )
    with seeded(spec.seed, "work"):
        views = torch.randn(spec.views, images, 3, size, size, device=device)
        labels = torch.randint(suite.data.classes, (images,), device=device)
        with counter:
            torch.stack(list(method(views, labels).values())).sum().backward()
    return round(counter.get_total_flops() * suite.batch_size * suite.total_steps / images)


def _convolution_backward(
    grad_out_shape: list[int],
    x_shape: list[int],
    w_shape: list[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    output_mask: list[bool],
    out_shape: object,
) -> int:
    """Each gradient takes what forward takes; torch's own formula counts grouped ones as dense."""
    forward = conv_flop_count(x_shape, w_shape, grad_out_shape, transposed)
    return int(forward) * (output_mask[0] + output_mask[1])
