"""A real Slurm of one node on this machine, without systemd: its daemons in one folder."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
TOOLS = (*DAEMONS, "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
CPUS = 8
"""Number of declared cores; they need not exist, because the tests' runs sleep."""

CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=6
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
KillWait=15
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=2:00:00 State=UP PriorityTier=1
PartitionName=urgent Nodes={host} MaxTime=INFINITE State=UP PriorityTier=9
"""


def missing() -> str | None:
    """Return the reason why Slurm cannot run here, or None."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"no {', '.join(absent)} (Debian: slurmctld slurmd slurm-client munge)"
    return None if os.geteuid() == 0 else "slurmd needs root to start jobs"


class Controller:
    """The daemons of a Slurm cluster within a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.configuration = folder / "slurm.conf"
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Wait until the node accepts jobs."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        controller_port, node_port = _free_ports(2)
        text = CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            folder=self.folder,
            controller_port=controller_port,
            node_port=node_port,
            cpus=CPUS,
        )
        self.configuration.write_text(text)
        self._run("munged", "--foreground", "--force", *self._munge_options())
        _wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._run("slurmctld", "-D", "-f", str(self.configuration))
        self._run("slurmd", "-D", "-f", str(self.configuration))
        _wait(lambda: set(self.ask("sinfo", "-h", "-o", "%t").split()) == {"idle"}, "slurmd")

    def stop(self) -> None:
        """End all jobs, then the daemons, the controller last but one."""
        self.ask("scancel", "--user", str(os.geteuid()))
        _wait(lambda: not self.ask("squeue", "-h"), "scancel")
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20)

    @contextlib.contextmanager
    def paused(self, daemon: str) -> Iterator[None]:
        """Raised when a daemon does not answer."""
        process = self._processes[DAEMONS.index(daemon)]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def ask(self, *command: str) -> str:
        """Return the output of a tool; empty if it fails."""
        environment = os.environ | {"SLURM_CONF": str(self.configuration)}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=30, check=False
        )
        return done.stdout

    def _munge_options(self) -> list[str]:
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "seed-file": "seed"}
        return [
            f"--{option}={self.folder}/munge.{name}"
            for option, name in (names | {"log-file": "log"}).items()
        ]

    def _run(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._processes.append(process)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _wait(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} does not do what it should")
        time.sleep(0.1)
