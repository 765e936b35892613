"""Leaves word of a task whose process could not: `python -m kdbench.launch.died ORDER CODE LOG`.

The batch script of a Slurm task calls it where the process ended with another code than 0.
"""

import sys
from pathlib import Path

import torch

from kdbench.errors import UserError
from kdbench.launch.death import how_it_ended, record_death
from kdbench.launch.dispatch import read_order
from kdbench.launch.status import RunStatus, leave_word, read_status


def main() -> None:
    """Write the failed result, unless the run itself said how it ended."""
    order, code, log = read_order(Path(sys.argv[1])), int(sys.argv[2]), Path(sys.argv[3])
    if _said_how_it_ended(read_status(order.folder)):
        return
    code = 128 - code if code > 128 else code  # as shells tell of signals
    try:
        record_death(order, order.spec(), how_it_ended(code, log), torch.get_num_threads())
    except UserError as error:
        leave_word(order.folder, "failed", str(error))


def _said_how_it_ended(status: RunStatus | None) -> bool:
    if status is None or status.state in ("starting", "running"):
        return False
    return status.state != "queued" or status.pid is not None  # it had its turn, and waits again


if __name__ == "__main__":
    main()
