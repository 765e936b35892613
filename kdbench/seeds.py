"""Independent random streams, one per axis of randomness.

The initial weights of network i, the order of an epoch and the draws of a view each have their own
stream. Runs with the same seed are therefore paired across methods, and resumed runs are exact.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def derive_seed(seed: int, axis: str, *indices: int) -> int:
    """Return a 63-bit seed for one axis, which is practically independent of all others."""
    key = "/".join([str(seed), axis, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def generator(seed: int, axis: str, *indices: int) -> torch.Generator:
    """Return a CPU generator for one axis, so that draws do not depend on the device."""
    return torch.Generator().manual_seed(derive_seed(seed, axis, *indices))


@contextmanager
def seeded(seed: int, axis: str, *indices: int) -> Iterator[None]:
    """Seed PyTorch's global generators within this context, and restore them afterwards."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_seed(seed, axis, *indices))
        yield


def random_state() -> tuple[Tensor, ...]:
    """Return the states of PyTorch's global generators: the CPU's and the current GPU's."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return tuple(states)


def set_random_state(states: Sequence[Tensor]) -> None:
    """Restore the generators' states; a GPU's generator is unchanged if it was not recorded."""
    torch.set_rng_state(states[0].cpu())
    if torch.cuda.is_available() and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu())
