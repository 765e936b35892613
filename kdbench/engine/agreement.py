"""What processes that train a run together do after a step: all the same, and none waits."""

import functools
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, distributed

from kdbench.engine.device import COLLECTIVE_TIMEOUT

GO_ON = 0
SAVE = 1
"""Any greater number is that of a signal, after which a run ends."""


class Agreement:
    """Asked by every process after each of its steps."""

    def __init__(self, accelerator: Accelerator):
        self.alone = accelerator.num_processes == 1
        self._under_way: tuple[distributed.Work, Tensor] | None = None

    def __call__(self, wanted: int) -> int:
        """What to do now: the most that a process wanted, a step late where there are several.

        Their answers travel during a step, beside what the device does.
        """
        if self.alone:
            return wanted
        before, self._under_way = self._under_way, _ask(wanted)
        most = 0 if before is None else _answer(before)
        if most > GO_ON:  # what was asked just now is done with it
            most = max(most, _answer(self._under_way))
            self._under_way = None
        return most


def _ask(wanted: int) -> tuple[distributed.Work, Tensor]:
    value = torch.tensor([wanted])
    most = distributed.ReduceOp.MAX
    return distributed.all_reduce(value, most, _group(), async_op=True), value


def _answer(asked: tuple[distributed.Work, Tensor]) -> int:
    work, value = asked
    work.wait()
    return int(value)


@functools.cache
def _group() -> Any:
    """Of its own: what is exchanged on GPUs waits for them."""
    return distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
