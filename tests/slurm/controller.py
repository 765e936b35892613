"""A real Slurm of one node on this machine, without systemd: its daemons in one folder."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from launched import eventually, free_port

DAEMONS = ("munged", "slurmctld", "slurmd")
TOOLS = (*DAEMONS, "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")

# The declared cores need not exist, because the tests' runs sleep.
CONFIGURATION = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
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
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
KillWait=15
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 RealMemory=1000 State=UNKNOWN
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
    """The daemons of a Slurm cluster within a folder; SLURM_CONF names its configuration."""

    def __init__(self, folder: Path):
        self.folder, self.configuration = folder, folder / "slurm.conf"
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Wait until the node accepts jobs."""
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key, munge_socket = self.folder / "munge.key", self.folder / "munge.socket"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        host = socket.gethostname().partition(".")[0]
        ports = {"controller_port": free_port(), "node_port": free_port()}
        text = CONFIGURATION.format(host=host, folder=self.folder, **ports)
        self.configuration.write_text(text)
        names = ("key", "pid", "seed", "log")
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in names]
        self._run("munged", "--foreground", "--force", f"--socket={munge_socket}", *files)
        assert eventually(munge_socket.exists, 30), "munged does not start"
        self._run("slurmctld", "-D")
        self._run("slurmd", "-D")
        states = ("sinfo", "-h", "-o", "%t")
        assert eventually(lambda: set(self.ask(*states).split()) == {"idle"}, 30), "no slurmd"

    def stop(self) -> None:
        """End all jobs, then the daemons, the controller last but one."""
        self.ask("scancel", "--user", str(os.geteuid()))
        assert eventually(lambda: not self.ask("squeue", "-h"), 30), "jobs do not end"
        for process in reversed(self._processes):
            process.terminate()
            process.wait(20)

    @contextlib.contextmanager
    def paused(self, daemon: str) -> Iterator[None]:
        process = self._processes[DAEMONS.index(daemon)]
        process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            process.send_signal(signal.SIGCONT)

    def ask(self, *command: str) -> str:
        """Return the output of a tool; empty if it fails."""
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout

    def _run(self, *command: str) -> None:
        with (self.folder / f"{command[0]}.out").open("wb") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._processes.append(process)
