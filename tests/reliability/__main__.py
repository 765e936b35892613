"""Runs all heavy tests in sequence: `python tests/reliability` takes hours on two cores."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
FUZZ = ["-m", "pytest", str(HERE.parent / "test_fuzz.py"), "--hypothesis-show-statistics"]
PARTS = [
    [str(HERE / "kills.py")],
    [str(HERE / "soak.py")],
    [*FUZZ, "--hypothesis-profile", "thorough"],
    [str(HERE / "mutations.py")],
]


def main() -> None:
    failed = []
    for part in PARTS:
        command = " ".join(["python", *part])
        print(f"\n{command}\n", flush=True)
        if subprocess.run([sys.executable, *part], cwd=HERE.parents[1]).returncode:
            failed.append(command)
    sys.exit("\n".join(["Failed:", *failed]) if failed else 0)


if __name__ == "__main__":
    main()
