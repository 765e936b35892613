"""Tests of parts of a run: optimizers, measurement, fingerprints, TensorBoard."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import METHODS, Watcher
from torch import nn

from kdbench import method_names as names
from kdbench.backbones import build
from kdbench.discovery import find_methods, source_digest
from kdbench.engine import measure
from kdbench.engine.device import make_accelerator
from kdbench.engine.measure import StepClock, count_parameters, forward_flops
from kdbench.engine.optimizers import build_optimizers, set_learning_rates
from kdbench.engine.result_builder import DivergedError
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError
from kdbench.launch.execution import run_one
from kdbench.launch.plan import make_specs
from kdbench.method import ContractError, MethodOptions, ParameterGroup
from kdbench.suite.load import load_suite


@pytest.fixture
def spec(suite) -> RunSpec:
    return make_specs(suite, ["label_smoothing"], ["resnet8"])[0]


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_is_trained_by_exactly_one_group(make_run, method):
    run = make_run(method)
    assert run.parameters_deployed == count_parameters(build("resnet8", 10))
    trained = [p for o in run.optimizers for group in o.param_groups for p in group["params"]]
    assert len({id(p) for p in trained}) == len(trained) == len(list(run.method.parameters()))
    before = [p.detach().clone() for p in run.method.parameters()]
    run.train()
    assert not any(map(torch.equal, before, run.method.parameters()))


@pytest.mark.parametrize(
    ("names", "complaint"),
    [(["weight", "bias", "weight"], "'weight' is in two"), (["weight"], "'bias' is in no")],
)
def test_a_parameter_in_two_groups_or_none_is_refused(suite, names, complaint):
    module = nn.Linear(2, 2)
    module.parameter_groups = lambda: [ParameterGroup([getattr(module, name) for name in names])]
    with pytest.raises(ContractError, match=complaint):
        build_optimizers(module, suite.optimizer)


def test_ffsd_trains_its_modules_as_its_authors_did(make_run):
    sgd, adam = make_run("ffsd").optimizers
    assert isinstance(adam, torch.optim.Adam)
    assert [g["weight_decay"] for g in sgd.param_groups] == [1e-4, 1e-5]
    assert [(g["lr"], g["weight_decay"]) for g in adam.param_groups] == [(1e-3, 1e-4)]
    assert all(g["nesterov"] and g["momentum"] == 0.9 for g in sgd.param_groups)
    set_learning_rates([sgd, adam], 0.1)  # the suite's factor, of each group's own base
    assert {g["lr"] for g in sgd.param_groups + adam.param_groups} == {0.1 * 0.05, 0.1 * 1e-3}


def test_a_nan_weight_after_the_last_step_is_found(make_run):
    class Poison(Watcher):
        def on_step(self) -> None:
            super().on_step()
            if self.steps == 12:  # the last: no loss and no evaluation sees this module again
                run.method.transfer[0].weight.data[0] = torch.nan

    run = make_run("ffsd", watcher=Poison())
    with pytest.raises(DivergedError, match=r"^'transfer.0.weight' is not finite after epoch 3$"):
        run.train()
    assert len(run.history) == 2


def test_the_rate_is_the_median_over_windows_without_the_first(monkeypatch):
    now = iter([0.0, 100.0, 110.0, 130.0, 1000.0, 1010.0])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(now))
    clock = StepClock(torch.device("cpu"), window=10)
    for steps, windows in ((35, [1.0, 2.0]), (10, [1.0, 2.0, 1.0])):
        clock.start()
        for _ in range(steps):
            clock.step()
        clock.finish()
        assert clock.windows == windows
    assert clock.median() == 1.0
    assert StepClock(torch.device("cpu")).median() is None


def test_flops_count_two_per_multiply_add_of_the_student():
    student = nn.Conv2d(3, 4, 3, padding=1)
    assert forward_flops(student, 8) == 2 * 3 * 3 * 3 * 4 * 8 * 8
    assert student.training


def test_the_fingerprint_changes_with_settings_that_can_change_numbers(spec):
    changes = [
        {"seed": 1},
        {"architecture": "resnet20"},
        {"options": spec.entry.options({"smoothing": "0.2"})},
        {"suite": spec.suite.with_epochs(9)},
        {"entry": find_methods(["one"])[0]},
    ]
    changed = {replace(spec, **change).fingerprint() for change in changes}
    assert len({spec.fingerprint(), *changed}) == 6
    assert replace(spec).fingerprint() == spec.fingerprint()


def test_the_method_digest_ignores_comments_and_layout():
    code = 'def f(x):\n    """Doc."""\n    return x + 1  # why\n'
    assert source_digest(code) == source_digest("def f(x):\n\n    return (x +\n 1)\n")
    assert source_digest(code) != source_digest(code.replace("1", "2"))


def test_kdcl_general_reports_its_holdout(make_run, images):
    run = make_run("kdcl", variant="general", held_out_share="0.1")
    held = torch.cat([labels for _, labels in run.held_out])
    assert torch.bincount(held).tolist() == [2] * 10  # a tenth of 16 images a class
    assert len(run.training.images) == 140
    before = run.method.ensemble_weights.clone()
    result = run.train()
    assert result.notes == {"training images held out": 20}
    assert not torch.equal(run.method.ensemble_weights, before)
    assert run.method.ensemble_weights.sum().item() == pytest.approx(1)


def test_tensorboard_on_request(spec, images, tmp_path):
    accelerator = make_accelerator(tmp_path, tensorboard=True)
    contents = []
    for name in ("board", "another"):  # the second run logs to its own alone
        accelerator.init_trackers(name)
        result = run_one(spec, *images, tmp_path / f"run-{name}", accelerator, Watcher())
        assert result.status == "finished"
        (events,) = (tmp_path / "board").rglob("events.out.tfevents.*")
        contents.append(events.read_bytes())
    assert contents[0] == contents[1]
    assert b"top1/student" in contents[0] and b"loss/ce/student" in contents[0]


def test_an_installed_package_provides_a_method(spec, monkeypatch):
    method = spec.entry.method
    point = SimpleNamespace(name="theirs", group="kdbench.methods", load=lambda: method)
    monkeypatch.setattr(names, "entry_points", lambda group: [point])
    (entry,) = find_methods(["theirs"])
    assert (entry.name, entry.method) == ("theirs", method)
    assert "theirs" in [e.name for e in find_methods(["all"])]
    for load, complaint in (
        (lambda: SimpleNamespace, r"'theirs' of group .* is not a Method class"),
        (lambda: 1 / 0, "'theirs' cannot be loaded: ZeroDivisionError"),
    ):
        point.load = load
        with pytest.raises(UserError, match=complaint):
            find_methods(["theirs"])


def test_the_command_in_a_result_reproduces_it_without_naming_folders(spec, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from kdbench.methods.dml import DML\n\nclass Mine(DML):\n    pass\n")
    (mine,) = find_methods([str(file)])
    options = mine.options({"temperature": "2"})
    custom = RunSpec(spec.suite.with_epochs(9), "resnet8", mine, options, 1)
    assert custom.command() == (
        "kdbench run --suite ./tiny.toml --methods ./mine.py --architectures resnet8 --seeds 2 "
        "--epochs 9 --set mine.temperature=2.0"
    )
    shipped = replace(spec, suite=load_suite("digits"))
    assert shipped.command().startswith("kdbench run --suite digits --methods label_smoothing ")


def test_no_option_value_escapes_the_results_folder(spec):
    class Options(MethodOptions):
        note: str = ""

    escaping = replace(spec, options=Options(note="../../x"))
    assert escaping.method_name == "label_smoothing@note=.._.._x"
    odd = replace(spec, options=Options(note="a\\b\n"))
    assert odd.identity().method == "label_smoothing@note=a_b_n"
