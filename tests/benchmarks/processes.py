"""Throughput of several processes beside one with as many threads, in turn on this machine.

    python tests/benchmarks/processes.py --data-dir DIR [--method dml]
        [--architecture resnet20] [--processes 2] [--rounds 3]

Runs `kdbench run --suite cifar100-reduced --epochs 1` both ways, round after round, and prints the
rates that the results hold, their ratio, and the bytes of gradients that each step exchanges. Let
the machine do nothing else. Each process gets its share of the cores, unless OMP_NUM_THREADS says.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def cost(arguments: argparse.Namespace, processes: int, folder: str) -> dict[str, float]:
    """Return the cost of a run with the given number of processes."""
    command = [sys.executable, "-m", "kdbench", "run", "--suite", "cifar100-reduced"]
    command += ["--epochs", "1", "--num-processes", str(processes), "--compile", "off"]
    command += ["--methods", arguments.method, "--architectures", arguments.architecture]
    command += ["--data-dir", str(arguments.data_dir.absolute()), "--overwrite"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)
    (file,) = Path(folder, "results").rglob("seed0.json")
    return json.loads(file.read_text())["cost"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    for option, default in (("method", "dml"), ("architecture", "resnet20")):
        parser.add_argument(f"--{option}", default=default)
    for option, default in (("processes", 2), ("rounds", 3)):
        parser.add_argument(f"--{option}", type=int, default=default)
    arguments = parser.parse_args()
    rates: dict[int, list[float]] = {1: [], arguments.processes: []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for processes, measured in rates.items():
                made = cost(arguments, processes, folder)
                measured.append(made["images_per_second"])
            one, several = (measured[-1] for measured in rates.values())
            print(f"round {number + 1}: {one:.1f} and {several:.1f} images/s", flush=True)
    ratios = [several / one for one, several in zip(*rates.values(), strict=True)]
    gradients = 4 * made["parameters_trained"]
    print(
        f"{arguments.method} {arguments.architecture}: {arguments.processes} processes at "
        f"{statistics.median(ratios):.3f} of one (median of {len(ratios)} rounds, "
        f"{min(ratios):.3f} to {max(ratios):.3f}); {gradients:,} bytes of gradients a step"
    )


if __name__ == "__main__":
    main()
