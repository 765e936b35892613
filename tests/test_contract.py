"""Every method keeps the contract, and `kdbench check` finds methods that do not."""

from pathlib import Path

import pytest
import torch
from conftest import METHODS, slow_except

from kdbench.check.checks import CHECKS
from kdbench.check.command import check_method, check_methods, format_table, run_check
from kdbench.check.subject import Subject
from kdbench.check.two_processes import train_in_two_processes
from kdbench.discovery import BrokenMethodError, find_methods
from kdbench.errors import UserError
from kdbench.method import network_roles
from kdbench.scaffold import TEMPLATE
from kdbench.suite.load import load_suite

VARIANTS = [
    ("kdcl", {"variant": "naive"}),
    ("kdcl", {"variant": "linear"}),
    ("kdcl", {"variant": "general"}),
    ("okddip", {"form": "branch"}),
    ("okddip", {"networks": "4"}),
]

OPTIONS_OF_THE_PAPERS = {
    "baseline": {},
    "independent": {},
    "label_smoothing": {"smoothing": 0.1},
    "dml": {"temperature": 1.0},
    "one": {"temperature": 3.0, "ramp_share": 80 / 300},
    "ffl": {"temperature": 3.0, "ramp_share": 80 / 300, "fusion_weight_decay": 1e-5},
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

GOOD = TEMPLATE.read_text(encoding="utf-8")
CE, KL = "F.cross_entropy(z, labels)", "kl(target, z, self.temperature)"
FORWARD = "        logits = [network(v"
PREDICTION = "network_roles([network(images).logits for network in self.networks])"
STUDENT, BUILD = "    def student(self)", "cohort.build_all())"
CLASS = "    minimum_networks = 2"
GROUPS = """    def parameter_groups(self):
        from kdbench.method import ParameterGroup

        return [ParameterGroup(self.networks[0].parameters())]
"""

# What is replaced in GOOD, the beginning of the name of the check that fails, words of its reason.
FAULTS = {
    "lost detach": (".detach()", "", "targets", "Detach its target"),
    "no attached target": (CLASS, "    attached_targets = True", "targets", "Remove"),
    "terms of no network": ('/{role}"', '/x{role}"', "targets", "'ce/student'"),
    "eval mode left on": (FORWARD, f"        self.eval()\n{FORWARD}", "train and", "training step"),
    "another student": ("return self.networks[0]", "return self.networks[1]", "student", "same"),
    "loss per sample": (CE, f"{CE[:-1]}, reduction='none')", "losses", "'ce/student' as (12,)"),
    "loss is nan": (KL, f"{KL} * float('nan')", "losses", "'kl/student' is nan"),
    "no role in the name": ('f"kl/{role}"', 'f"kl {role}"', "losses", "'kl student'"),
    "no student": (PREDICTION, "{'peer0': self.networks[0](images).logits}", "roles", "'student'"),
    "own ensemble": (PREDICTION, PREDICTION + " | {'ensemble': None}", "roles", "'ensemble'"),
    "embedding for logits": ("(images).logits", "(images).embedding", "roles", "(12, 10)"),
    "untrained module": (BUILD, f"{BUILD}; self.extra = nn.Linear(2, 2)", "sum", "'extra.weight'"),
    "lost by the optimizer": (STUDENT, f"{GROUPS}\n{STUDENT}", "every parameter", "networks.1"),
    "unseeded noise": (KL, f"{KL} * __import__('random').random()", "deterministic", "same seed"),
    "order matters": (KL, f"{KL} * z[0, 0]", "independent of", "'kl/student'"),
    "deploys two": ("return self.networks[0]", "return self.networks", "deploys", "78,042"),
    "waits for the device": (KL, f"{KL} * z.mean().item()", "never waits", ".item()"),
}
SLOW_CHECKS_OF_VARIANTS = {"compiles", "deterministic", "train and eval mode"}


def make_subject(method: str, settings: dict[str, str] | None = None, **more: str) -> Subject:
    (entry,) = find_methods([method])
    return Subject(entry, entry.options(settings or {}), **more)


def write_method(folder: Path, source: str, name: str = "mine") -> str:
    folder.mkdir(exist_ok=True)
    file = folder / f"{name}.py"
    file.write_text(source)
    return str(file)


@pytest.mark.parametrize("method", METHODS)
def test_options_are_those_of_the_papers(method):
    options = make_subject(method).options
    assert options.model_dump(exclude={"networks"}) == OPTIONS_OF_THE_PAPERS[method]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("check", slow_except(CHECKS.keys() - {"compiles"}, CHECKS))
def test_methods_keep_the_contract(check, method):
    outcome = run_check(make_subject(method), check, CHECKS[check])
    if outcome.result == "skipped":
        pytest.skip(outcome.reason)
    assert outcome.result == "passed", outcome.reason


@pytest.mark.parametrize("is_slow", slow_except({False}, [False, True]))
@pytest.mark.parametrize(("method", "settings"), VARIANTS, ids=str)
def test_variants_keep_the_contract(method, settings, is_slow):
    subject = make_subject(method, settings)
    names = [name for name in CHECKS if (name in SLOW_CHECKS_OF_VARIANTS) == is_slow]
    outcomes = [run_check(subject, name, CHECKS[name]) for name in names]
    assert [outcome for outcome in outcomes if outcome.result != "passed"] == []


@pytest.mark.parametrize("networks", slow_except({2, 3}, [2, 3, 8]))
@pytest.mark.parametrize("method", METHODS)
def test_methods_work_with_two_to_eight_networks(method, networks):
    (entry,) = find_methods([method])
    if entry.method.fixed_networks or networks < entry.method.minimum_networks:
        pytest.skip(f"{method} does not take {networks} networks")
    subject = make_subject(method, {"networks": str(networks)})
    names = ["roles and shapes", "losses named and finite", "targets detached"]
    for name in (*names, "student matches predict"):
        assert run_check(subject, name, CHECKS[name]).result == "passed"
    roles = subject.build().eval().predict(subject.make_batch()[0][0]).keys()
    assert network_roles(range(networks)).keys() <= roles


@pytest.mark.parametrize(
    "architecture", slow_except({"resnet20", "wrn16-2"}, load_suite("cifar100").architectures)
)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_step_with_every_architecture(method, architecture):
    spec = make_subject(method, architecture=architecture).spec
    model = spec.build().train()
    model.begin_epoch(0)
    size = spec.suite.data.image_size
    terms = model(torch.randn(spec.views, 2, 3, size, size), torch.tensor([1, 2]))
    total = torch.stack(list(terms.values())).sum()
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_methods_and_variants_work_in_two_processes(tmp_path):
    methods = [*((name, {}) for name in METHODS), VARIANTS[2], VARIANTS[3]]
    subjects = [make_subject(*method) for method in methods]
    problems = train_in_two_processes(subjects)
    assert problems == dict.fromkeys(subject.spec.method_name for subject in subjects)
    assert "kdcl@variant=general" in problems
    outcomes = check_methods(find_methods([write_method(tmp_path, GOOD)]))
    assert len(outcomes) == len(CHECKS) + 1
    assert [outcome for outcome in outcomes if outcome.result != "passed"] == []


def test_two_processes_must_end_with_equal_weights(tmp_path):
    # DDP does not average a change of weights outside of the losses.
    change = "        self.networks[0].branch.classifier.bias.data += 1e-3 * views.var()\n"
    drift = GOOD.replace(FORWARD, f"{change}{FORWARD}")
    files = [write_method(tmp_path, GOOD), write_method(tmp_path, drift, "drift")]
    problems = train_in_two_processes([make_subject(file) for file in files])
    assert problems["mine"] is None
    assert "differs between the processes" in problems["drift"]


def test_a_good_method_passes_every_check(tmp_path):
    outcomes = check_method(make_subject(write_method(tmp_path, GOOD)))
    assert [(o.check, o.result) for o in outcomes] == [(name, "passed") for name in CHECKS]
    table = format_table(outcomes)
    assert "mine" in table and table.count("passed") == len(CHECKS)


@pytest.mark.parametrize("fault", FAULTS)
def test_check_finds_a_planted_fault(tmp_path, fault):
    old, new, check, words = FAULTS[fault]
    assert old in GOOD
    subject = make_subject(write_method(tmp_path, GOOD.replace(old, new)))
    name = next(name for name in CHECKS if name.startswith(check))
    outcome = run_check(subject, name, CHECKS[name])
    assert outcome.result == "FAILED" and words in outcome.reason
    assert f"mine, {name}: FAILED: {outcome.reason}" in format_table([outcome])


def test_a_constructor_that_raises_is_reported_with_its_line(tmp_path):
    source = GOOD.replace("self.networks = nn", "raise RuntimeError('no memory')\n        _ = nn")
    (outcome,) = check_methods(find_methods([write_method(tmp_path, source)]))
    line = source[: source.index("raise")].count("\n") + 1
    assert outcome.result == "FAILED"
    assert f"mine.py, line {line}: RuntimeError: no memory" in outcome.reason


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("class Broken(:\n    pass\n", ["mine.py, line 1", "syntax"]),
        ("import torch\n", ["mine.py", "no method"]),
        (GOOD.replace("def predict(", "def predictt("), ["mine.py, line", "predict()"]),
        ("\n\nimport nothing_of_this_name\n", ["mine.py, line 3", "ModuleNotFoundError"]),
        ("import sys\nsys.exit(3)\n", ["mine.py, line 2", "SystemExit: 3"]),
        ("x = '\0'\n", ["mine.py, line 1", "null bytes"]),
        (f"{GOOD}\n\nclass Twice(MeanOfLogits):\n    pass\n", ["line", "MeanOfLogits and Twice"]),
        (GOOD.replace("default=2.0, ", ""), ["mine", "option", "default"]),
        (GOOD.replace("Options(MethodOptions)", "Options(dict)"), ["mine", "MethodOptions"]),
    ],
)
@pytest.mark.parametrize("is_relative", [False, True])
def test_a_broken_file_is_reported_with_its_line(tmp_path, monkeypatch, source, words, is_relative):
    file = write_method(tmp_path, source)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second time as well, although Python has seen the module
        with pytest.raises(BrokenMethodError) as error:
            find_methods(["./mine.py" if is_relative else file])
        assert all(word in str(error.value) for word in words), error.value


def test_every_method_needs_a_file_and_a_name_of_its_own(tmp_path):
    twice = [write_method(tmp_path / name, GOOD) for name in ("a", "b")]
    for files, name in ((twice, "'mine'"), ([write_method(tmp_path, GOOD, "dml")], "'dml'")):
        with pytest.raises(BrokenMethodError, match=name):
            find_methods(files)
    with pytest.raises(UserError, match=r"'\./missing\.py' does not exist"):
        find_methods(["./missing.py"])


def test_a_file_is_read_in_the_encoding_that_it_declares(tmp_path):
    file = tmp_path / "mine.py"
    file.write_bytes(f"# -*- coding: latin-1 -*-\nNAME = 'é'\n{GOOD}".encode("latin-1"))
    assert [entry.name for entry in find_methods([str(file)])] == ["mine"]
