"""The signals that ask a run to end."""

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C, and what cluster managers send before they take a node away."""


def leave_to_the_run(worker: int = 0) -> None:
    """For processes that load data (`worker_init_fn`): managers signal all processes of a run.

    The run ends them when it has ended; without its data it could not finish its step.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
