"""The environment of a run: versions, device, commit. No host name, user name or path."""

import platform
import subprocess
from functools import cache
from pathlib import Path

import accelerate
import torch

from kdbench import __version__
from kdbench.paths import REPOSITORY
from kdbench.results.schema import Arithmetic, Environment
from kdbench.suite.suite import Precision


def environment(
    device: torch.device, processes: int, precision: Precision, command: str
) -> Environment:
    """Return the environment of this process, as a result stores it."""
    commit, dirty = _commit()
    return Environment(
        kdbench=__version__,
        commit=commit,
        dirty=dirty,
        python=platform.python_version(),
        torch=torch.__version__,
        accelerate=accelerate.__version__,
        system=f"{platform.system()} {platform.machine()}",
        device=device_name(device),
        threads=torch.get_num_threads(),
        processes=processes,
        precision=arithmetic(device, precision),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        command=command,
    )


def describe_hardware(env: Environment, step: str) -> str:
    """Return a description of what rates, memory and rounding of a run depend on."""
    description = (
        f"{env.device}, processes {env.processes}, threads {env.threads}, {step}, torch {env.torch}"
    )
    return description + ", deterministic" * env.deterministic


def arithmetic(device: torch.device, precision: Precision) -> Arithmetic:
    """Return the arithmetic that a suite's precision means on a device."""
    if precision == "bf16" or device.type != "cuda":
        return precision
    return "tf32" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"


def device_name(device: torch.device) -> str:
    """Return the model name of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _cpu_name()


@cache
def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@cache
def _commit() -> tuple[str | None, bool | None]:
    """Return the commit of kdbench's own checkout and True if its code has uncommitted changes."""
    if not (REPOSITORY / ".git").exists():
        return None, None
    code = ["kdbench", "methods", "suites"]
    try:
        commit = _git("rev-parse", "HEAD").strip()
        return commit, bool(_git("status", "--porcelain", "--", *code).strip())
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
