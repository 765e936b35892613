"""What a run costs: rates over windows of steps, peak memory, parameters, FLOPs."""

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
"""Steps between two marks: long enough to time, short enough for a median."""


def synchronised_clock(device: torch.device) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class StepClock:
    """Times windows of steps without making the step wait: events on a GPU, a clock on a CPU."""

    def __init__(self, device: torch.device, window: int = WINDOW):
        self.cuda = device.type == "cuda"
        self.window = window
        self.windows: list[float] = []
        """Seconds per step, a value a window."""
        self._marks: list[float | torch.cuda.Event] = []
        self._steps = 0
        self._warm = False

    def start(self) -> None:
        """Before the first step of an epoch, or after a checkpoint in it."""
        self._marks = [self._mark()]
        self._steps = 0

    def step(self) -> None:
        """After each step."""
        self._steps += 1
        if self._steps % self.window == 0:
            self._marks.append(self._mark())

    def finish(self) -> None:
        """After the last step before one of these, once its results were read from the device."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        seconds = [self._between(start, end) / self.window for start, end in pairs]
        # The first window of a process pays for warming up: allocator, algorithm choice, caches.
        self.windows += seconds if self._warm else seconds[1:]
        self._warm = self._warm or bool(seconds)

    def median(self) -> float | None:
        """Seconds per step; None before two windows were seen."""
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
    """Peak memory from now on: allocated on the GPU, or resident memory of this process."""

    def __init__(self, device: torch.device):
        self.device = device
        self.kind: Literal["device", "process"] = "process"
        gc.collect()  # the networks of the run before
        if device.type == "cuda":
            self.kind = "device"
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_peak_resident()

    def peak(self) -> int:
        """Bytes."""
        if self.kind == "device":
            return torch.cuda.max_memory_allocated(self.device)
        return _peak_resident()


def is_out_of_memory(error: BaseException) -> bool:
    """Of the device or of the host; torch's allocator on the CPU has no error of its own."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def _reset_peak_resident() -> None:
    """Linux can forget the peak of the runs before; elsewhere the peak is the process's."""
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
    """Trainable parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def forward_flops(network: nn.Module, image_size: int) -> int:
    """FLOPs of one image through a network, 2 per multiply-add."""
    image = next(network.parameters()).new_zeros(1, 3, image_size, image_size)
    training = network.training
    with torch.no_grad():
        flops = count_flops(lambda: network.eval()(image))
    network.train(training)
    return flops


def count_flops(call: Callable[[], object]) -> int:
    """FLOPs of a call, gradients and all, 2 per multiply-add."""
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
    """Each gradient takes what forward takes; torch's own formula counts grouped ones as dense."""
    forward = conv_flop_count(x_shape, w_shape, grad_out_shape, transposed)
    return int(forward) * (output_mask[0] + output_mask[1])
