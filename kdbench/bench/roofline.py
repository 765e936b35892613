"""Roofline model: the least time of a step, from its bytes and FLOPs and the device's rates."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kdbench.engine.measure import count_flops, synchronized_time
from kdbench.suite.suite import Precision

REPEATS = 7
"""Number of repetitions of each rate measurement."""


@dataclass(frozen=True)
class DeviceRates:
    """Measured rates of a device."""

    bytes_per_second: float
    """Bytes read and written per second by a copy far larger than any cache."""
    flops_per_second: float
    """FLOPs per second of a large matrix product in the suite's precision, counting 2 per
    multiply-add."""


@dataclass(frozen=True)
class StepWork:
    """Bytes, FLOPs and operations of an eager step. A compiled step may move fewer bytes."""

    bytes: int
    """Bytes that all operations read and write, each counted separately."""
    flops: int
    """FLOPs of the forward and backward pass."""
    operations: int

    def min_seconds(self, rates: DeviceRates) -> float:
        """Return the least time in seconds that the step can take at these rates."""
        return max(self.bytes / rates.bytes_per_second, self.flops / rates.flops_per_second)


def measure_rates(device: torch.device, precision: Precision) -> DeviceRates:
    """Measure the rates of a device with a copy and a matrix product."""
    large = device.type == "cuda"
    # Random numbers, because a GPU multiplies constants faster.
    source = torch.rand(2**28 if large else 2**26, device=device)
    target = torch.empty_like(source)
    size = 8192 if large else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.rand(size, size, device=device, dtype=dtype)
    copying = _best(lambda: target.copy_(source), device)
    multiplying = _best(lambda: matrix @ matrix, device)
    return DeviceRates(2 * source.nbytes / copying, 2 * size**3 / multiplying)


def count_step_work(step: Callable[[], object]) -> StepWork:
    """Count the bytes, FLOPs and operations of a step while it runs once."""
    traffic = _Traffic()

    def counted_step() -> None:
        with traffic:
            step()

    flops = count_flops(counted_step)
    return StepWork(traffic.bytes, flops, traffic.operations)


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write. Views and allocations move none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _moves_no_bytes(func):
            self.operations += 1
            self.bytes += sum(_size(tensor) for tensor in _tensors((args, kwargs, result)))
        return result


def _moves_no_bytes(func: Any) -> bool:
    name = func._schema.name
    if name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "prim::")):
        return True
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _size(tensor: Tensor) -> int:
    """Return the size of a tensor in bytes; an expanded tensor is no larger than its storage."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Return the shortest time in seconds of REPEATS calls; other programs only add to it."""
    times = []
    for _ in range(REPEATS):
        started = synchronized_time(device)
        work()
        times.append(synchronized_time(device) - started)
    return min(times)
