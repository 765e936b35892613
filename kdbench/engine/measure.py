"""Measurement of a run's cost: step times, peak memory, parameters, FLOPs."""

import contextlib
import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

WINDOW = 10
"""Steps per timed window: long enough to time, short enough for a median over windows."""


def synchronized_time(device: torch.device) -> float:
    """Wait for the device to finish its work, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class StepClock:
    """Times windows of steps without synchronization: by events on a GPU, by a clock on a CPU."""

    def __init__(self, device: torch.device, window: int = WINDOW):
        self.cuda = device.type == "cuda"
        self.window = window
        self.windows: list[float] = []
        """Seconds per step, one value per window."""
        self._marks: list[float | torch.cuda.Event] = []
        self._steps = 0
        self._warm = False

    def start(self) -> None:
        """Start timing; call before the first step of an epoch and after a checkpoint within it."""
        self._marks = [self._mark()]
        self._steps = 0

    def step(self) -> None:
        """Count a step; call after each step."""
        self._steps += 1
        if self._steps % self.window == 0:
            self._marks.append(self._mark())

    def finish(self) -> None:
        """Stop timing; call after the last step, once its results were read from the device."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        seconds = [self._between(start, end) / self.window for start, end in pairs]
        # The first window of a process includes warm-up: allocator, algorithm choice, caches.
        self.windows += seconds if self._warm else seconds[1:]
        self._warm = self._warm or bool(seconds)

    def median(self) -> float | None:
        """Return the median seconds per step; None before the second window."""
        return statistics.median(self.windows) if self.windows else None

    def _mark(self) -> "float | torch.cuda.Event":
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
        if isinstance(start, float) and isinstance(end, float):
            return end - start
        assert isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event)
        return start.elapsed_time(end) / 1000


class MemoryMeter:
    """Measures peak memory since its creation: allocated on the GPU, or resident on the CPU."""

    def __init__(self, device: torch.device):
        self.device = device
        self.kind: Literal["device", "process"] = "process"
        gc.collect()  # frees the networks of the previous run
        if device.type == "cuda":
            self.kind = "device"
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_peak_resident()

    def peak(self) -> int:
        """Return the peak in bytes."""
        if self.kind == "device":
            return torch.cuda.max_memory_allocated(self.device)
        return _peak_resident()


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the device or the host ran out of memory."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    # torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _reset_peak_resident() -> None:
    """Reset the peak on Linux; elsewhere the peak covers the whole life of the process."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not every libc, not every sandbox
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def count_parameters(module: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def forward_flops(network: nn.Module, image_size: int) -> int:
    """Return the FLOPs of one image's forward pass, counting 2 per multiply-add."""
    image = next(network.parameters()).new_zeros(1, 3, image_size, image_size)
    training = network.training
    with torch.no_grad():
        flops = count_flops(lambda: network.eval()(image))
    network.train(training)
    return flops


def count_flops(call: Callable[[], object]) -> int:
    """Return the FLOPs of a call, backward passes included, counting 2 per multiply-add."""
    exact = {torch.ops.aten.convolution_backward: _convolution_backward}
    counter = FlopCounterMode(display=False, custom_mapping=exact)
    with counter:
        call()
    return int(counter.get_total_flops())


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
    """Count each gradient like the forward pass.

    PyTorch's own formula counts grouped convolutions as dense ones.
    """
    forward = conv_flop_count(x_shape, w_shape, grad_out_shape, transposed)
    return int(forward) * (output_mask[0] + output_mask[1])
