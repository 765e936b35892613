"""torchrun on this machine, whose failures are one sentence: `python -m kdbench.launch.torchrun`.

Ends with the code of the process that failed first; with 1 and a sentence where it was killed.
"""

import logging
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from kdbench.launch.place import end_with


def torchrun(processes: int, module: str, *arguments: str) -> list[str]:
    """The command that runs a module in so many processes of this machine."""
    launcher = [sys.executable, "-u", "-P", "-m", __name__, "--standalone"]
    return [*launcher, f"--nproc-per-node={processes}", "-m", module, *arguments]


def main() -> None:
    """Run torchrun with the arguments of this command."""
    os.environ["PYTHONSAFEPATH"] = "1"  # modules of the working folder hide none of kdbench's
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    end_with(os.getppid())
    arguments = run.parse_args(sys.argv[1:])
    try:
        run.run(arguments)
    except ChildFailedError as error:
        first = _first(error)
        if first.exitcode >= 0:
            sys.exit(first.exitcode)
        of = f"process {first.local_rank} of {arguments.nproc_per_node}"
        print(f"kdbench: {of} was killed by {first.signal_name()}", file=sys.stderr)
        sys.exit(1)
    except SignalException as stop:
        signal.signal(stop.sigval, signal.SIG_DFL)
        os.kill(os.getpid(), stop.sigval)


def _first(error: ChildFailedError) -> ProcessFailure:
    """What failed by itself before torchrun ended the others, all within the same second."""
    failures = error.failures.values()
    own = [failure for failure in failures if failure.exitcode != -signal.SIGTERM]
    return min(own or failures, key=lambda failure: failure.timestamp)


if __name__ == "__main__":
    main()
