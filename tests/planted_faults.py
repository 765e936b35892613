"""Plants faults in a copy of kdbench, one at a time, and shows which the gate finds.

python tests/planted_faults.py [--baseline results/gate/digits.json] [NAME ...]

Prints the Markdown table of docs/gate.md. A fault is found if a measure fails that passes without
the fault, so the unchanged copy runs first. Use a baseline that was made on the same machine.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

from faults import FAULTS, ROOT, Fault, planted
from faults.harness import BATCHES, STEP

from kdbench.gate.compare import REGRESSIONS

DML = "methods/dml.py"
STARTED = 'started = __import__("time").perf_counter()'
SLEEP = '__import__("time").sleep({share} * (__import__("time").perf_counter() - started))'
NETWORKS = "logits = [network(views[0]).logits for network in self.networks]"
FORWARD = f"""{NETWORKS}
        terms"""

# The forward pass is a third of the step.
SLOW_FORWARD = f"""{STARTED}
        {NETWORKS}
        {SLEEP.format(share=0.9)}
        terms"""

TWICE = """self.eval()
        [network(views[0]) for network in self.networks]
        self.train()
        """

FIRST = """            return self._first(views, labels)
"""

SLOW_STEP = f"""{FIRST}        {STARTED}
        values = self._run(views, labels)
        {SLEEP.format(share=0.3)}
        return values
"""
ORDER = 'generator(seed, "order", epoch'

NONE = Fault("none", (), methods="baseline,dml,ffsd,independent,kdcl")
GATE_ONLY = (
    Fault("step of dml 30 % slower", ((DML, FORWARD, SLOW_FORWARD),), methods="dml"),
    Fault("networks of dml run twice", ((DML, FORWARD, TWICE + FORWARD),), methods="dml"),
    Fault("every step 30 % slower", ((STEP, FIRST, SLOW_STEP),), methods="dml"),
    Fault(
        "another order of images",
        ((BATCHES, f"{ORDER})", f"{ORDER} + 1)"),),
        methods="baseline,independent",
    ),
)
"""Faults that no test can find: they change step times, or the order of images to another one."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", type=Path, default=ROOT / "results/gate/digits.json")
    parser.add_argument("names", nargs="*", help="faults to plant; default: all")
    arguments = parser.parse_args()
    print("| fault | methods run | caught by |\n| --- | --- | --- |", flush=True)
    false_alarm = False
    for fault in (NONE, *FAULTS, *GATE_ONLY):
        if fault.methods and fault.name in (arguments.names or [fault.name]):
            failed = find_failed_measures(fault, arguments.baseline.resolve())
            false_alarm |= fault is NONE and bool(failed)
            nothing = "nothing, as expected" if fault is NONE else "**not caught**"
            print(f"| {fault.name} | {fault.methods} | {failed or nothing} |", flush=True)
    return int(false_alarm)


def find_failed_measures(fault: Fault, baseline: Path) -> str:
    with planted(fault, "kdbench", "methods", "suites") as copy:
        table = copy / "table.md"
        command = [sys.executable, "-m", "kdbench", "gate", "--methods", fault.methods]
        command += ["--baseline", str(baseline), "--summary", str(table)]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        process = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        assert process.returncode in (0, 1), process.stderr
        rows = [re.split(r" *\| *", row) for row in table.read_text().splitlines()]
        failed = [f"{row[1]}: {row[2]}" for row in rows if len(row) > 3 and row[-2] in REGRESSIONS]
        assert bool(failed) == bool(process.returncode)
        return "; ".join(failed)


if __name__ == "__main__":
    sys.exit(main())
