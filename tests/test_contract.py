"""Every method keeps the contract, and `kdbench check` catches those that do not."""

from pathlib import Path

import pytest
import torch
from conftest import METHODS

from kdbench.check.checks import CHECKS
from kdbench.check.command import check_methods, run_check, table
from kdbench.check.subject import Subject
from kdbench.check.two_processes import train_in_two_processes
from kdbench.discovery import BrokenMethodError, find_methods
from kdbench.errors import UserError
from kdbench.suite.load import load_suite

VARIANTS = [
    ("kdcl", {"variant": "naive"}),
    ("kdcl", {"variant": "linear"}),
    ("kdcl", {"variant": "general"}),
    ("okddip", {"form": "branch"}),
    ("okddip", {"networks": "4"}),
]

PAPERS = {
    "baseline": {},
    "independent": {},
    "label_smoothing": {"smoothing": 0.1},
    "dml": {"temperature": 1.0},
    "one": {"temperature": 3.0, "ramp_share": 80 / 300},
    "cl_ilr": {"temperature": 2.0, "beta": 0.5},
    "kdcl": {"variant": "minlogit", "temperature": 2.0, "weight": 1.0, "held_out_share": 0.02},
    "okddip": {"form": "network", "temperature": 3.0, "ramp_share": 80 / 300},
    "ffsd": {
        "temperature": 2.0,
        "diversity_weight": 1e-5,
        "fusion_weight": 10.0,
        "reconstruction_weight": 1000.0,
        "warmup_epochs": 5,
        "fusion_weight_decay": 1e-5,
        "adam_learning_rate": 1e-3,
    },
    "mcl": {
        "vcl_weight": 0.1,
        "icl_weight": 0.1,
        "soft_vcl_weight": 1.0,
        "soft_icl_weight": 1.0,
        "contrast_temperature": 0.07,
        "temperature": 3.0,
        "size": 128,
    },
}


def subject_of(method: str, settings: dict[str, str] | None = None) -> Subject:
    (entry,) = find_methods([method])
    return Subject(entry, entry.options(settings or {}))


@pytest.mark.parametrize("method", METHODS)
def test_options_are_those_of_the_papers(method):
    (entry,) = find_methods([method])
    assert entry.options({}).model_dump(exclude={"networks"}) == PAPERS[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("check", CHECKS)
def test_methods_keep_the_contract(method, check):
    outcome = run_check(subject_of(method), check, CHECKS[check])
    if outcome.result == "skipped":
        pytest.skip(outcome.reason)
    assert outcome.result == "passed", outcome.reason


@pytest.mark.parametrize(("method", "settings"), VARIANTS, ids=str)
def test_variants_keep_the_contract(method, settings):
    subject = subject_of(method, settings)
    outcomes = [run_check(subject, name, check) for name, check in CHECKS.items()]
    assert [outcome for outcome in outcomes if outcome.result != "passed"] == []


@pytest.mark.parametrize("networks", ["2", "3", "8"])
@pytest.mark.parametrize("method", METHODS)
def test_methods_work_with_two_to_eight_networks(method, networks):
    (entry,) = find_methods([method])
    if entry.method.fixed_networks or int(networks) < entry.method.minimum_networks:
        pytest.skip(f"{method} does not take {networks} networks")
    subject = subject_of(method, {"networks": networks})
    for name in ("roles and shapes", "losses named and finite", "targets detached"):
        assert run_check(subject, name, CHECKS[name]).result == "passed"


def test_methods_and_variants_work_in_two_processes():
    subjects = [subject_of(method) for method in METHODS]
    subjects += [subject_of("kdcl", {"variant": "general"}), subject_of("okddip", VARIANTS[3][1])]
    complaints = train_in_two_processes(subjects)
    assert complaints == dict.fromkeys(subject.spec.method_name for subject in subjects)
    assert "kdcl@variant=general" in complaints


GOOD = '''
import torch
from torch import nn
import torch.nn.functional as F
from kdbench.losses import kl
from kdbench.method import Method, network_roles

class Good(Method):
    """Two networks that learn from each other's mean."""

    def __init__(self, cohort, options):
        super().__init__(cohort, options)
        self.networks = nn.ModuleList(cohort.build_all())

    def forward(self, views, labels):
        logits = [network(views[0]).logits for network in self.networks]
        target = torch.stack(logits).mean(0).detach()
        terms = {}
        for role, z in network_roles(logits).items():
            terms[f"ce/{role}"] = F.cross_entropy(z, labels)
            terms[f"kl/{role}"] = kl(target, z)
        return terms

    def predict(self, images):
        return network_roles([network(images).logits for network in self.networks])

    def student(self):
        return self.networks[0]
'''
# What is planted, and the check that must catch it.
FAULTS = {
    "lost detach": (".detach()", "", "targets detached"),
    "eval mode left on": (
        "logits = [network(v",
        "self.eval()\n        logits = [network(v",
        "train",
    ),
    "student is another": ("return self.networks[0]", "return self.networks[1]", "student ships"),
    "loss per sample": (
        "F.cross_entropy(z, labels)",
        "F.cross_entropy(z, labels, reduction='none')",
        "losses named",
    ),
    "loss is nan": ("kl(target, z)", "kl(target, z) * float('nan')", "losses named"),
    "no role in the name": ('f"kl/{role}"', 'f"kl {role}"', "losses named"),
    "no student": (
        "return network_roles([network(images).logits for network in self.networks])",
        "return {'peer0': self.networks[0](images).logits}",
        "roles and shapes",
    ),
    "own ensemble": (
        "for network in self.networks])",
        "for network in self.networks]) | {'ensemble': self.networks[0](images).logits}",
        "roles and shapes",
    ),
    "untrained module": (
        "cohort.build_all())",
        "cohort.build_all())\n        self.extra = nn.Linear(2, 2)",
        "sum is optimised",
    ),
    "left out of the optimizer": (
        "    def student(self):",
        "    def parameter_groups(self):\n        from kdbench.method import ParameterGroup\n"
        "        return [ParameterGroup(self.networks[0].parameters())]\n\n    def student(self):",
        "every parameter",
    ),
    "unseeded noise": (
        "kl(target, z)",
        "kl(target, z) * (1 + 1e-3 * __import__('random').random())",
        "deterministic",
    ),
    "order matters": ("kl(target, z)", "kl(target, z) * z[0, 0]", "independent of batch order"),
    "deploys two": ("return self.networks[0]", "return self.networks", "deploys one plain"),
    "waits for the device": (
        "kl(target, z)",
        "kl(target, z) * z.mean().item()",
        "waits for nothing",
    ),
}


def written(folder: Path, source: str, name: str = "mine") -> Path:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.py"
    file.write_text(source)
    return file


@pytest.mark.parametrize("fault", FAULTS)
def test_check_catches_a_planted_fault(tmp_path, fault):
    old, new, check = FAULTS[fault]
    assert old in GOOD
    subject = subject_of(str(written(tmp_path, GOOD.replace(old, new))))
    (name,) = (known for known in CHECKS if known.startswith(check))
    assert run_check(subject, name, CHECKS[name]).result == "FAILED"


def test_check_passes_a_good_method_and_catches_ranks_that_drift(tmp_path):
    drift = GOOD.replace(
        "        terms = {}",
        # A change of weights outside the wrapped forward and backward: each rank makes its own.
        "        self.networks[0].branch.classifier.bias.data += 1e-3 * views.var()\n"
        "        terms = {}",
    ).replace("class Good", "class Drift")
    files = [written(tmp_path, GOOD), written(tmp_path, drift, "drift")]
    outcomes = check_methods(find_methods([str(file) for file in files]))
    assert [o for o in outcomes if o.method == "mine" and o.result != "passed"] == []
    (two,) = (o for o in outcomes if (o.method, o.check) == ("drift", "works in two processes"))
    assert two.result == "FAILED" and "differs between the processes" in two.reason
    shown = table(outcomes)
    assert "mine" in shown and "drift, works in two processes: FAILED" in shown


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("class Broken(:\n    pass\n", ["mine.py, line 1", "syntax"]),
        ("import torch\n", ["mine.py", "no method"]),
        (GOOD.replace("def predict(", "def predictt("), ["mine.py, line", "Good lacks predict()"]),
        ("\n\nimport nothing_of_this_name\n", ["mine.py, line 3", "ModuleNotFoundError"]),
        ("import sys\nsys.exit(3)\n", ["mine.py, line 2", "SystemExit: 3"]),
        ("x = '\0'\n", ["mine.py, line 1", "null bytes"]),
        (
            GOOD + GOOD.partition("class ")[0] + "class Twice(Good):\n    pass\n",
            ["mine.py, line", "two methods (Good and Twice)"],
        ),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, source, words):
    file = written(tmp_path, source)
    with pytest.raises(BrokenMethodError) as error:
        find_methods([str(file)])
    assert all(word in str(error.value) for word in words), error.value


def test_a_relative_path_gives_the_line_too(tmp_path, monkeypatch):
    written(tmp_path, "\n\nimport nothing_of_this_name\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BrokenMethodError, match=r"mine\.py, line 3"):
        find_methods(["./mine.py"])


def test_two_files_of_one_name_and_options_without_defaults_are_refused(tmp_path):
    files = [str(written(tmp_path / name, GOOD)) for name in ("a", "b")]
    with pytest.raises(BrokenMethodError, match="Two methods are named 'mine'"):
        find_methods(files)
    needy = GOOD.replace(
        "    def __init__",
        "    class Options(__import__('kdbench').method."
        "MethodOptions):\n        rate: float\n\n    def __init__",
        1,
    )
    with pytest.raises(BrokenMethodError, match="every option needs a default"):
        find_methods([str(written(tmp_path, needy, "needy"))])


@pytest.mark.parametrize("architecture", load_suite("cifar100").architectures)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_step_with_every_architecture(method, architecture):
    (entry,) = find_methods([method])
    subject = Subject(entry, entry.options({}), architecture)
    spec = subject.spec
    model = spec.build().train()
    model.begin_epoch(0)
    size = spec.suite.data.image_size
    terms = model(torch.randn(spec.views, 2, 3, size, size), torch.tensor([1, 2]))
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_taken_name_is_refused(tmp_path):
    with pytest.raises(BrokenMethodError, match="the name 'dml' is taken"):
        find_methods([str(written(tmp_path, GOOD, "dml"))])


def test_a_constructor_that_raises_is_named_with_its_line(tmp_path):
    source = GOOD.replace("self.networks = nn", "raise RuntimeError('no memory')\n        _ = nn")
    (outcome,) = check_methods(find_methods([str(written(tmp_path, source))]))
    line = source[: source.index("raise")].count("\n") + 1
    assert outcome.result == "FAILED"
    assert f"mine.py, line {line}: RuntimeError: no memory" in outcome.reason


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"'\./gone\.py' does not exist"):
        find_methods(["./gone.py"])


def test_a_file_is_read_in_the_encoding_that_it_declares(tmp_path):
    file = tmp_path / "mine.py"
    file.write_bytes(f"# -*- coding: latin-1 -*-\nNAME = 'é'\n{GOOD}".encode("latin-1"))
    assert [entry.name for entry in find_methods([str(file)])] == ["mine"]


def test_options_of_another_kind_are_refused(tmp_path):
    odd = GOOD.replace("    def __init__", "    Options = dict\n\n    def __init__", 1)
    with pytest.raises(BrokenMethodError, match="Options must derive from MethodOptions"):
        find_methods([str(written(tmp_path, odd, "odd"))])
