"""Tests of parts of a run: optimizers, measurement, fingerprints, TensorBoard."""

from types import SimpleNamespace

import pytest
import torch
from conftest import METHODS, Watcher
from torch import nn

from kdbench import method_names as names
from kdbench.discovery import find_methods, source_digest
from kdbench.engine import measure
from kdbench.engine.device import make_accelerator
from kdbench.engine.measure import StepClock, count_parameters, forward_flops
from kdbench.engine.optimizers import build_optimizers
from kdbench.engine.result_builder import DivergedError
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError
from kdbench.launch.execution import run_one
from kdbench.method import ContractError, MethodOptions, ParameterGroup
from kdbench.suite.load import load_suite


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_is_trained_by_exactly_one_group(make_run, method):
    run = make_run(method)
    groups = [g for optimizer in run.optimizers for g in optimizer.param_groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    assert len({id(p) for p in trained}) == len(trained) == len(list(run.method.parameters()))
    before = [p.detach().clone() for p in run.method.parameters()]
    run.train()
    moved = [not torch.equal(a, b) for a, b in zip(before, run.method.parameters(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("wrong", ["twice", "never"])
def test_a_parameter_in_two_groups_or_none_is_refused(suite, wrong):
    class Wrong(nn.Linear):
        def parameter_groups(self):
            groups = {"twice": [self.weight, self.bias, self.weight], "never": [self.weight]}
            return [ParameterGroup(groups[wrong])]

    with pytest.raises(ContractError, match=r"'weight' is in two|'bias' is in no"):
        build_optimizers(Wrong(2, 2), suite.optimizer)


def test_ffsd_trains_its_modules_as_its_authors_did(make_run):
    sgd, adam = make_run("ffsd").optimizers
    assert isinstance(adam, torch.optim.Adam)
    assert [g["weight_decay"] for g in sgd.param_groups] == [1e-4, 1e-5]
    assert [(g["lr"], g["weight_decay"]) for g in adam.param_groups] == [(1e-3, 1e-4)]
    assert all(g["nesterov"] and g["momentum"] == 0.9 for g in sgd.param_groups)


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
    clock.start()
    for _ in range(35):
        clock.step()
    clock.finish()
    assert clock.windows == [1.0, 2.0]
    clock.start()
    for _ in range(10):
        clock.step()
    clock.finish()
    assert clock.windows == [1.0, 2.0, 1.0]
    assert clock.median() == 1.0
    assert StepClock(torch.device("cpu")).median() is None


def test_flops_count_two_per_multiply_add_of_the_student():
    student = nn.Conv2d(3, 4, 3, padding=1)
    assert forward_flops(student, 8) == 2 * 3 * 3 * 3 * 4 * 8 * 8
    assert student.training


def test_deployed_parameters_are_one_plain_network(make_run):
    plain = count_parameters(make_run("baseline").method)
    for method in METHODS:
        assert make_run(method).parameters_deployed == plain, method


def test_the_fingerprint_changes_with_settings_that_can_change_numbers(suite):
    (dml,) = find_methods(["dml"])
    spec = RunSpec(suite, "resnet8", dml, dml.options({}), 0)
    changed = [
        RunSpec(suite, "resnet8", dml, dml.options({}), 1),
        RunSpec(suite, "resnet20", dml, dml.options({}), 0),
        RunSpec(suite, "resnet8", dml, dml.options({"temperature": "2"}), 0),
        RunSpec(suite.with_epochs(9), "resnet8", dml, dml.options({}), 0),
        RunSpec(suite, "resnet8", find_methods(["one"])[0], dml.options({}), 0),
    ]
    prints = {s.fingerprint() for s in [spec, *changed]}
    assert len(prints) == 6
    assert RunSpec(suite, "resnet8", dml, dml.options({}), 0).fingerprint() in prints


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


def test_tensorboard_on_request(suite, images, tmp_path):
    (entry,) = find_methods(["baseline"])
    spec = RunSpec(suite, "resnet8", entry, entry.options({}), 0)
    accelerator = make_accelerator(tmp_path, tensorboard=True)
    accelerator.init_trackers("board")
    result = run_one(spec, *images, tmp_path / "run", accelerator, Watcher())
    assert result.status == "finished"
    (events,) = (tmp_path / "board").rglob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"top1/student" in content and b"loss/ce/student" in content
    accelerator.init_trackers("another")
    run_one(spec, *images, tmp_path / "another", accelerator, Watcher())
    (events,) = (tmp_path / "board").rglob("events.out.tfevents.*")
    assert events.read_bytes() == content  # the next run logs to its own alone


def test_an_installed_package_provides_a_method(monkeypatch):
    (dml,) = find_methods(["dml"])
    point = SimpleNamespace(name="theirs", group="kdbench.methods", load=lambda: dml.method)
    monkeypatch.setattr(names, "entry_points", lambda group: [point])
    (entry,) = find_methods(["theirs"])
    assert (entry.name, entry.method) == ("theirs", dml.method)
    assert "theirs" in [e.name for e in find_methods(["all"])]
    point.load = lambda: SimpleNamespace
    with pytest.raises(UserError, match=r"'theirs' of group .* is not a Method class"):
        find_methods(["theirs"])
    point.load = lambda: 1 / 0
    with pytest.raises(UserError, match=r"'theirs' cannot be loaded: ZeroDivisionError"):
        find_methods(["theirs"])


def test_the_command_in_a_result_reproduces_it_without_naming_folders(suite, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from kdbench.methods.dml import DML\n\nclass Mine(DML):\n    pass\n")
    (mine,) = find_methods([str(file)])
    spec = RunSpec(suite.with_epochs(9), "resnet8", mine, mine.options({"temperature": "2"}), 1)
    assert spec.command() == (
        "kdbench run --suite ./tiny.toml --methods ./mine.py --architectures resnet8 --seeds 2 "
        "--epochs 9 --set mine.temperature=2.0"
    )
    (dml,) = find_methods(["dml"])
    shipped = RunSpec(load_suite("digits"), "resnet8", dml, dml.options({}), 0)
    assert shipped.command().startswith("kdbench run --suite digits --methods dml ")


def test_no_option_value_escapes_the_results_folder(suite):
    class Options(MethodOptions):
        note: str = ""

    (dml,) = find_methods(["dml"])
    spec = RunSpec(suite, "resnet8", dml, Options(note="../../x"), 0)
    assert spec.method_name == "dml@note=.._.._x"
    odd = RunSpec(suite, "resnet8", dml, Options(note="a\\b\n"), 0)
    assert odd.identity().method == "dml@note=a_b_n"
