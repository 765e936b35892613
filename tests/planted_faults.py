"""Plants faults in a copy of kdbench, one at a time, and says which the gate catches.

python tests/planted_faults.py [--baseline results/gate/digits.json] [NAME ...]

Prints a markdown table; docs/gate.md holds one. Run it where the baseline was made, or make one
first: a fault is caught if something fails that does not fail without it, which is tried first.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from faults import FAULTS, ROOT, Fault, planted
from faults.harness import BATCHES, STEP

FAILS = ("changed", "worse", "missing", "failed")
FORWARD = """logits = [network(views[0]).logits for network in self.networks]
        terms"""

SLOW_FORWARD = """started = __import__("time").perf_counter()
        logits = [network(views[0]).logits for network in self.networks]
        __import__("time").sleep(0.9 * (__import__("time").perf_counter() - started))
        terms"""  # forward is a third of the step

TWICE = """self.eval()
        [network(views[0]) for network in self.networks]
        self.train()
        """

FIRST = """            return self._first(views, labels)
"""

SLOW_STEP = """            return self._first(views, labels)
        started = __import__("time").perf_counter()
        values = self._run(views, labels)
        __import__("time").sleep(0.3 * (__import__("time").perf_counter() - started))
        return values
"""

NONE = Fault("none", (), methods="baseline,dml,ffsd,independent,kdcl")
GATE_ONLY = (
    Fault("step of dml 30 % slower", (("methods/dml.py", FORWARD, SLOW_FORWARD),), methods="dml"),
    Fault(
        "networks of dml run twice", (("methods/dml.py", FORWARD, TWICE + FORWARD),), methods="dml"
    ),
    Fault("every step 30 % slower", ((STEP, FIRST, SLOW_STEP),), methods="dml"),
    Fault(
        "another order of images",
        ((BATCHES, 'generator(seed, "order", epoch)', 'generator(seed, "order", epoch + 1)'),),
        methods="baseline,independent",
    ),
)
"""No test times a step, or knows which order is the right one."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", type=Path, default=ROOT / "results/gate/digits.json")
    parser.add_argument("names", nargs="*", help="of faults; default: all")
    asked = parser.parse_args()
    print("| fault | methods run | caught by |\n| --- | --- | --- |", flush=True)
    alarms = 0
    for fault in (NONE, *(fault for fault in FAULTS if fault.methods), *GATE_ONLY):
        if not asked.names or fault.name in asked.names:
            found = run(fault, asked.baseline.resolve())
            alarms += fault is NONE and bool(found)
            missed = "nothing, as it should" if fault is NONE else "**not caught**"
            print(f"| {fault.name} | {fault.methods} | {found or missed} |", flush=True)
    return int(alarms > 0)


def run(fault: Fault, baseline: Path) -> str:
    """The measures that failed."""
    with planted(fault, "kdbench", "methods", "suites") as copy:
        table = copy / "table.md"
        command = [sys.executable, "-m", "kdbench", "gate", "--methods", fault.methods]
        command += ["--baseline", str(baseline), "--summary", str(table)]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        assert done.returncode in (0, 1), done.stderr
        rows = [
            [cell.strip() for cell in line.split("|")[1:-1]]
            for line in table.read_text().splitlines()
        ]
        failed = [f"{row[0]}: {row[1]}" for row in rows if len(row) > 1 and row[-1] in FAILS]
        assert bool(failed) == bool(done.returncode)
        return "; ".join(failed)


if __name__ == "__main__":
    sys.exit(main())
