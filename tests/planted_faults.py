"""Plants faults in a copy of kdbench, one at a time, and says which the gate catches.

python tests/planted_faults.py [--baseline results/gate/digits.json] [NAME ...]

Prints a markdown table; docs/gate.md holds one. Run it where the baseline was made, or make one
first: a fault is caught if something fails that does not fail without it, which is tried first.
"""

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
FAILS = ("changed", "worse", "missing", "failed")


@dataclass(frozen=True)
class Fault:
    name: str
    methods: str
    """Methods that the gate runs: those in which it should be seen."""
    patches: tuple[tuple[str, str, str], ...] = ()
    """File, what stands there once, what is to stand there."""


FROZEN = ".requires_grad_(False)"

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

STEP = """            return self._first(views, labels)
"""

SLOW_STEP = """            return self._first(views, labels)
        started = __import__("time").perf_counter()
        values = self._run(views, labels)
        __import__("time").sleep(0.3 * (__import__("time").perf_counter() - started))
        return values
"""

FAULTS = (
    Fault("none", "baseline,dml,ffsd,independent,kdcl"),
    Fault(
        "temperature T for T squared",
        "kdcl",
        (("kdbench/losses.py", "divergence * temperature**2", "divergence * temperature"),),
    ),
    Fault(
        "temperature 2.2 for 2",
        "kdcl",
        (
            (
                "methods/kdcl.py",
                "temperature: float = Field(default=2.0",
                "temperature: float = Field(default=2.2",
            ),
        ),
    ),
    Fault(
        "lost detach, dml",
        "dml",
        (("kdbench/losses.py", "[z.detach() for z in logits]", "list(logits)"),),
    ),
    Fault(
        "lost detach, kdcl",
        "kdcl",
        (
            (
                "methods/kdcl.py",
                "with torch.no_grad():\n            # In",
                "with torch.enable_grad():\n            # In",
            ),
        ),
    ),
    Fault(
        "lost detach, ffsd",
        "ffsd",
        (("methods/ffsd.py", "[features.stages[-1].detach() for", "[features.stages[-1] for"),),
    ),
    Fault(
        "frozen student, dml",
        "dml",
        (
            (
                "methods/dml.py",
                "nn.ModuleList(cohort.build_all())",
                "nn.ModuleList(cohort.build_all())\n        self.networks[0]" + FROZEN,
            ),
        ),
    ),
    Fault(
        "frozen leader, ffsd",
        "ffsd",
        (("methods/ffsd.py", "self.leader = leader", "self.leader = leader" + FROZEN),),
    ),
    Fault(
        "step of dml 30 % slower",
        "dml",
        (("methods/dml.py", FORWARD, SLOW_FORWARD),),
    ),
    Fault(
        "networks of dml run twice",
        "dml",
        (("methods/dml.py", FORWARD, TWICE + FORWARD),),
    ),
    Fault(
        "every step 30 % slower",
        "dml",
        (("kdbench/engine/step.py", STEP, SLOW_STEP),),
    ),
    Fault(
        "eval mode left on",
        "dml",
        (
            ("kdbench/engine/evaluate.py", "    method.train()\n", ""),
            (
                "kdbench/engine/run.py",
                "            self.method.train()\n            self.method.begin_epoch",
                "            self.method.begin_epoch",
            ),
        ),
    ),
    Fault(
        "milestones a step late",
        "baseline,independent",
        (("kdbench/engine/schedule.py", "step >= round", "step > round"),),
    ),
    Fault(
        "milestones an epoch late",
        "baseline,independent",
        (
            (
                "kdbench/engine/schedule.py",
                "round(milestone * steps",
                "round((milestone + 1) * steps",
            ),
        ),
    ),
    Fault(
        "weight decay 5e-4 for 1e-4",
        "baseline,cl_ilr",
        (("kdbench/engine/optimizers.py", "recipe.weight_decay if", "5 * recipe.weight_decay if"),),
    ),
    Fault(
        "no Nesterov momentum",
        "baseline,independent",
        (("kdbench/engine/optimizers.py", "nesterov=recipe.nesterov", "nesterov=False"),),
    ),
    Fault(
        "augmentation lost",
        "baseline,independent",
        (
            (
                "kdbench/data/batches.py",
                "torch.randint(0, 2 * self.padding + 1, (*shape, 2), generator=source)",
                "torch.full((*shape, 2), self.padding)",
            ),
        ),
    ),
    Fault(
        "another order of images",
        "baseline,independent",
        (
            (
                "kdbench/data/batches.py",
                'generator(seed, "order", epoch)',
                'generator(seed, "order", epoch + 1)',
            ),
        ),
    ),
    Fault(
        "ensemble of logits",
        "independent",
        (
            (
                "kdbench/losses.py",
                "return torch.logsumexp(stacked, dim=0) - math.log(len(logits))",
                "return torch.stack(list(logits)).mean(dim=0)",
            ),
        ),
    ),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--baseline", type=Path, default=ROOT / "results/gate/digits.json")
    parser.add_argument("names", nargs="*", help="of faults; default: all")
    asked = parser.parse_args()
    print("| fault | methods run | caught by |\n| --- | --- | --- |", flush=True)
    alarms = 0
    for fault in FAULTS:
        if not asked.names or fault.name in asked.names:
            found = run(fault, asked.baseline.resolve())
            alarms += fault.name == "none" and bool(found)
            missed = "**not caught**" if fault.patches else "nothing, as it should"
            print(f"| {fault.name} | {fault.methods} | {found or missed} |", flush=True)
    return int(alarms > 0)


def run(fault: Fault, baseline: Path) -> str:
    """The measures that failed."""
    with TemporaryDirectory(prefix="planted-") as folder:
        copy = Path(folder)
        for package in ("kdbench", "methods", "suites"):
            shutil.copytree(ROOT / package, copy / package)
        for name, before, after in fault.patches:
            text = (copy / name).read_text(encoding="utf-8")
            assert text.count(before) == 1, f"{fault.name}: {name} has changed"
            (copy / name).write_text(text.replace(before, after), encoding="utf-8")
        table = copy / "table.md"
        command = [sys.executable, "-m", "kdbench", "gate", "--methods", fault.methods]
        command += ["--baseline", str(baseline), "--summary", str(table)]
        environment = os.environ | {"PYTHONPATH": folder}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
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
