"""An epoch that was left in its midst: what each process needs to go on there."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from kdbench.method import Method
from kdbench.seeds import random_state, set_random_state


@dataclass
class Share:
    """What is one process's own."""

    loss_sums: list[float]
    """Each term, summed over the steps done."""
    noise: tuple[Tensor, ...]
    """Where torch's generators were."""
    buffers: dict[str, Tensor]
    """Of the method, where there are other processes: they are made equal after an epoch."""


@dataclass
class PartOfEpoch:
    """Where an epoch was left."""

    steps: int
    """Done; all of them where it was left during its evaluation."""
    terms: list[str]
    shares: list[Share]
    """By process."""

    @classmethod
    def now(
        cls, steps: int, terms: Sequence[str], sums: Tensor, method: Method, how: Accelerator
    ) -> Self:
        """After so many steps, the same in all processes; each has summed its loss terms (N,)."""
        several = how.num_processes > 1
        buffers = {n: buffer.cpu() for n, buffer in method.named_buffers()} if several else {}
        own = Share(sums.tolist(), random_state(), buffers)
        return cls(steps, list(terms), gather_object([own]) if several else [own])

    @classmethod
    def of(cls, content: dict[str, Any]) -> Self:
        """From what `asdict` made of it."""
        return cls(**content | {"shares": [Share(**share) for share in content["shares"]]})

    def restore(self, method: Method, how: Accelerator) -> Tensor:
        """Make this process what it was; returns the loss terms it had summed.

        Where there were more processes, or fewer, it takes what they were on average, and draws
        its noise from the start of the epoch.
        """
        if len(self.shares) == how.num_processes:
            share = self.shares[how.process_index]
            set_random_state(share.noise)
        else:
            share = self._average()
        for name, buffer in method.named_buffers():
            if name in share.buffers:
                buffer.copy_(share.buffers[name])
        return torch.tensor(share.loss_sums, dtype=torch.float32, device=how.device)

    def _average(self) -> Share:
        first, count = self.shares[0], len(self.shares)
        sums = [sum(each) / count for each in zip(*(s.loss_sums for s in self.shares), strict=True)]
        buffers = {
            name: torch.stack([share.buffers[name] for share in self.shares]).mean(dim=0)
            if buffer.is_floating_point()
            else buffer
            for name, buffer in first.buffers.items()
        }
        return Share(sums, first.noise, buffers)
