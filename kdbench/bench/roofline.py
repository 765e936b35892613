"""The least time a step can take: its bytes and FLOPs over what the device was measured to do."""

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


@dataclass(frozen=True)
class DeviceRates:
    """Measured, not from a data sheet."""

    bytes_per_second: float
    """Read and written by a copy far larger than any cache."""
    flops_per_second: float
    """Of a large matrix product in the suite's precision, 2 per multiply-add."""


@dataclass(frozen=True)
class StepWork:
    """What an eager step does; a compiled one may touch less memory."""

    bytes: int
    """Read and written by all operations, each on its own."""
    flops: int
    """Forward and backward."""
    operations: int

    def floor(self, rates: DeviceRates) -> float:
        """Seconds."""
        return max(self.bytes / rates.bytes_per_second, self.flops / rates.flops_per_second)


def measure_rates(device: torch.device, precision: Precision) -> DeviceRates:
    """A copy and a matrix product, the best of several."""
    large = device.type == "cuda"
    # Random numbers: a GPU multiplies constants faster.
    source = torch.rand(2**28 if large else 2**26, device=device)
    target = torch.empty_like(source)
    size = 8192 if large else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.rand(size, size, device=device, dtype=dtype)
    copying = _best(lambda: target.copy_(source), device)
    multiplying = _best(lambda: matrix @ matrix, device)
    return DeviceRates(2 * source.nbytes / copying, 2 * size**3 / multiplying)


def step_work(step: Callable[[], object]) -> StepWork:
    """Counted while a whole step runs once."""
    traffic = _Traffic()

    def watched() -> None:
        with traffic:
            step()

    flops = count_flops(watched)
    return StepWork(traffic.bytes, flops, traffic.operations)


class _Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write; views and allocations touch none."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.operations = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _touches_nothing(func):
            self.operations += 1
            self.bytes += sum(_size(tensor) for tensor in _tensors((args, kwargs, result)))
        return result


def _touches_nothing(func: Any) -> bool:
    name = func._schema.name
    if name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "prim::")):
        return True
    aliases = [value.alias_info for value in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _tensors(tree: object) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _size(tensor: Tensor) -> int:
    """An expanded tensor is no larger than what it stands on."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds: the fastest of several, since others can only slow it down."""
    times = []
    for _ in range(REPEATS):
        started = synchronized_time(device)
        work()
        times.append(synchronized_time(device) - started)
    return min(times)
