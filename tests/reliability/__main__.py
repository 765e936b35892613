"""Runs all heavy tests in sequence: `python tests/reliability` takes hours on two cores."""

import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
FUZZ = "-m pytest tests/test_fuzz.py --hypothesis-show-statistics --hypothesis-profile thorough"
PARTS = (
    "tests/reliability/kills.py",
    "tests/reliability/soak.py",
    FUZZ,
    "tests/reliability/mutations.py",
)

if __name__ == "__main__":
    failed = []
    for part in PARTS:
        print(f"\npython {part}\n", flush=True)
        if subprocess.run([sys.executable, *part.split()], cwd=TESTS.parent).returncode:
            failed.append(f"python {part}")
    sys.exit("\n".join(["Failed:", *failed]) if failed else 0)
