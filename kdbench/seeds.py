"""One generator per axis of randomness, so that no axis moves when another is used more.

Initial weights of network i, the order of an epoch and the draws of a view each have a stream of
their own. That is what makes runs of one seed paired across methods, and a resumed run exact.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def derive(seed: int, axis: str, *indices: int) -> int:
    """A 63-bit seed for one axis, independent of all others for practical purposes."""
    key = "/".join([str(seed), axis, *map(str, indices)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def generator(seed: int, axis: str, *indices: int) -> torch.Generator:
    """A CPU generator: draws are the same on whatever device trains."""
    return torch.Generator().manual_seed(derive(seed, axis, *indices))


@contextmanager
def seeded(seed: int, axis: str, *indices: int) -> Iterator[None]:
    """Torch's global generators seeded inside the block and restored after it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, axis, *indices))
        yield


def random_state() -> tuple[Tensor, ...]:
    """Where torch's global generators are: the CPU's, and the current GPU's where there is one."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available():
        states.append(torch.cuda.get_rng_state())
    return tuple(states)


def set_random_state(states: Sequence[Tensor]) -> None:
    """Put the generators where they were; a GPU's is left where none was recorded."""
    torch.set_rng_state(states[0].cpu())
    if torch.cuda.is_available() and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu())
