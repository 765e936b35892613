"""Plants faults in a copy of kdbench, one at a time, and shows which the tests catch.

python tests/reliability/mutations.py [NAME ...]

Prints the Markdown table of tests/README.md. For each fault, only the tests that should catch it
run, and each must fail. Without a fault all of them must pass, which is checked first. Exits with 1
otherwise.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import FAULTS, Fault, function, planted

COPIED = (
    *("kdbench", "methods", "suites", "results", "tests", "docs"),
    *("pyproject.toml", "README.md"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="of faults; default: all")
    asked = parser.parse_args()
    chosen = [fault for fault in FAULTS if not asked.names or fault.name in asked.names]
    wrong = failing(None, sorted({test for fault in chosen for test in fault.tests}))
    if wrong:
        print("Fails without any fault: " + ", ".join(wrong), file=sys.stderr)
        return 1
    print("| fault | in | caught by |\n| --- | --- | --- |", flush=True)
    survived = 0
    for fault in chosen:
        failed = failing(fault, list(fault.tests))
        missed = [test for test in fault.tests if not {test} & {*failed, *map(function, failed)}]
        survived += bool(missed)
        files = ", ".join(sorted({f"`{file}`" for file, _, _ in fault.patches}))
        said = [f"**not by** `{test}`" if test in missed else f"`{test}`" for test in fault.tests]
        print(f"| {fault.name} | {files} | {'; '.join(said)} |", flush=True)
    print(f"\n{len(chosen) - survived} of {len(chosen)} faults were caught by every test named.")
    return int(survived > 0)


def failing(fault: Fault | None, tests: list[str]) -> list[str]:
    """Return the node ids of failing tests."""
    with planted(fault, *COPIED) as copy:
        command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider"]
        command += ["-m", "", "-n", "0"]  # slow tests as well, in one process
        command += [f"tests/{test}" for test in tests]
        environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
        if done.returncode not in (0, 1):  # no test failed: none could run
            raise RuntimeError(f"{fault and fault.name}: {done.stdout}{done.stderr}")
        return re.findall(r"^FAILED tests/(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)


if __name__ == "__main__":
    sys.exit(main())
