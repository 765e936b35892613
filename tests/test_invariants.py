"""Tests of the invariants of a fair comparison in one process, named by their numbers."""

import getpass
import json
import platform
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import METHODS, Stopper, Watcher, slow_except
from launched import DRAWING, eventually

from kdbench.engine import run as run_module
from kdbench.engine import run_files
from kdbench.engine.checkpoint import Progress, _progress
from kdbench.engine.evaluate import evaluate
from kdbench.engine.part import PartOfEpoch, Share
from kdbench.engine.schedule import learning_rate_factor
from kdbench.engine.stop import StoppedError
from kdbench.method import Cohort, ContractError
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.suite.load import load_suite


def seen_by(run) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return view 0 and labels of every training step of a run."""
    batches = []
    forward = run.method.forward
    run.method.forward = lambda v, y: batches.append((v[0].clone(), y.clone())) or forward(v, y)
    run.train()
    return batches


def test_1_all_methods_see_the_same_images_in_the_same_order(make_run):
    reference = seen_by(make_run("baseline", folder="reference"))
    assert len(reference) == 12
    for method in METHODS:
        batches = seen_by(make_run(method, folder=method))
        for (view, labels), (their_view, their_labels) in zip(batches, reference, strict=True):
            assert torch.equal(labels, their_labels), method
            assert torch.equal(view, their_view), method


def test_1_all_methods_train_under_the_suites_learning_rates(make_run, monkeypatch, suite):
    expected = [learning_rate_factor(step, 4, suite.schedule) for step in range(12)]
    assert len(set(expected)) > 2
    factors = []
    original = run_module.set_learning_rates

    def spy(optimizers, factor):
        factors.append(factor)
        original(optimizers, factor)

    monkeypatch.setattr(run_module, "set_learning_rates", spy)
    for method in METHODS:
        make_run(method, folder=method).train()
    assert factors == expected * len(METHODS)


def test_1_a_group_follows_the_suites_factor_from_its_own_base(make_run):
    run = make_run("ffsd")
    run_module.set_learning_rates(run.optimizers, 0.1)
    rates = {g["lr"] for optimizer in run.optimizers for g in optimizer.param_groups}
    assert rates == {0.1 * 0.05, 0.1 * 1e-3}


def test_2_network_i_starts_from_the_same_weights_in_all_methods(make_run, monkeypatch):
    built: dict[int, list[torch.Tensor]] = {}
    original = Cohort.build

    def build(cohort: Cohort):
        index = cohort._built
        network = original(cohort)
        weights = torch.cat([p.detach().flatten() for p in network.parameters()])
        built.setdefault(index, []).append(weights)
        return network

    monkeypatch.setattr(Cohort, "build", build)
    for method in METHODS:
        make_run(method)
    assert set(built) == {0, 1, 2}
    for copies in built.values():
        assert all(torch.equal(copies[0], other) for other in copies)
    assert not torch.equal(built[0][0], built[1][0])


def test_2_another_seed_changes_weights_order_and_views(make_run):
    first, second = seen_by(make_run("baseline")), seen_by(make_run("baseline", seed=1, folder="b"))
    assert not torch.equal(first[0][1], second[0][1])
    weights = [next(make_run("baseline", seed=s).method.parameters()) for s in (0, 1)]
    assert not torch.equal(*weights)


def test_2_the_student_of_independent_equals_the_baseline_exactly(make_run):
    alone = make_run("baseline", folder="alone").train()
    among_others = make_run("independent", folder="among").train()
    assert [e.metrics["student"] for e in alone.history] == [
        e.metrics["student"] for e in among_others.history
    ]


def test_3_learning_rates_of_cifar100_step_at_epochs_150_and_225():
    schedule, steps = load_suite("cifar100").schedule, 390
    rates = [0.1 * learning_rate_factor(step, steps, schedule) for step in range(300 * steps)]
    assert rates[: 150 * steps] == [0.1] * 150 * steps
    assert rates[150 * steps : 225 * steps] == pytest.approx([0.01] * 75 * steps)
    assert rates[225 * steps :] == pytest.approx([0.001] * 75 * steps)


def test_3_warm_up_rises_linearly_per_step(suite):
    schedule = suite.schedule.model_copy(update={"warmup_epochs": 2.0, "milestones": ()})
    factors = [learning_rate_factor(step, 5, schedule) for step in range(12)]
    assert factors == pytest.approx([*(i / 10 for i in range(1, 11)), 1, 1])


class Fixed(torch.nn.Module):
    """A method that predicts given logits, image after image."""

    def __init__(self, **roles: torch.Tensor):
        super().__init__()
        self.roles = roles
        self.position = 0
        self.modes: list[bool] = []

    def predict(self, images):
        self.modes.append(self.training)
        part = slice(self.position, self.position + len(images))
        self.position += len(images)
        return {role: logits[part] for role, logits in self.roles.items()}


def batched(labels: torch.Tensor, size: int):
    return [(torch.zeros(len(y), 3, 2, 2), y) for y in labels.split(size)]


def test_5_every_image_counts_once_also_in_the_incomplete_last_batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(37, 10, generator=generator)
    labels = torch.randint(10, (37,), generator=generator)
    metrics = evaluate(Fixed(student=logits), batched(labels, 16))["student"]
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert metrics.top1 == pytest.approx(100 * (ranks == 0).sum().item() / 37)
    assert metrics.top5 == pytest.approx(100 * (ranks < 5).sum().item() / 37)
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    assert metrics.loss == pytest.approx(loss)


def test_5_evaluation_of_a_run_covers_the_test_set(make_run, images):
    run = make_run("baseline")
    assert torch.cat([labels for _, labels in run.evaluation]).tolist() == images[1].labels.tolist()


def test_6_the_headline_is_the_last_epoch_and_the_best_is_kept_apart(make_run):
    run = make_run("baseline")
    result = run.train()
    worse = result.history[-1].metrics["student"].model_copy(update={"top1": 1.0})
    last = result.history[-1].model_copy(update={"metrics": {"student": worse}})
    run.history = [*result.history[:-1], last]
    result = run.result("finished")
    assert result.last["student"].top1 == 1.0
    assert result.best_on_test.metrics["student"].top1 > 1.0
    assert result.best_on_test.epoch < last.epoch
    assert leaderboard(runs_frame([result])).student_top1.tolist() == [1.0]


def test_7_the_ensemble_is_the_argmax_of_mean_probabilities():
    # Network 0 is sure and right, the others lean to class 1: the mean probability is right, the
    # majority is wrong. In image 1 any network right would count, the mean does not.
    student = torch.tensor([[6.0, 0.0, 0.0], [0.0, 6.0, 0.0]])
    peers = torch.tensor([[0.0, 0.4, 0.0], [0.4, 0.0, 0.0]])
    method = Fixed(student=student, peer0=peers, peer1=peers, fusion=torch.zeros(2, 3))
    metrics = evaluate(method, batched(torch.tensor([0, 0]), 2))
    assert metrics["ensemble"].top1 == 50.0
    p = torch.stack([z.softmax(1) for z in (student, peers, peers)]).mean(0)
    assert metrics["ensemble"].loss == pytest.approx(-p[:, 0].log().mean().item())
    assert metrics["mean"].top1 == pytest.approx((50 + 50 + 50) / 3)


def test_7_a_method_cannot_bring_its_own_ensemble():
    method = Fixed(student=torch.zeros(2, 3), ensemble=torch.zeros(2, 3))
    with pytest.raises(ContractError, match="ensemble"):
        evaluate(method, batched(torch.tensor([0, 0]), 2))


@pytest.mark.parametrize("method", slow_except({"ffsd"}, METHODS))
def test_8_a_killed_run_ends_with_the_same_numbers(make_run, method):
    whole = make_run(method, folder="whole")
    expected = whole.train()
    for stop in (2, 6):  # in the first epoch, then in the second of what is left
        with pytest.raises(KeyboardInterrupt):
            make_run(method, folder="killed", watcher=Watcher(stop_after=stop)).train()
    resumed = make_run(method, folder="killed")
    result = resumed.train()
    assert result.history == expected.history
    for mine, theirs in zip(
        resumed.method.state_dict().values(), whole.method.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)
    logs = [(run.folder / "log.jsonl").read_text() for run in (whole, resumed)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("method", slow_except({"./drawing.py"}, [*METHODS, "./drawing.py"]))
def test_8_a_run_stopped_in_mid_epoch_ends_with_the_same_numbers(make_run, method):
    Path("drawing.py").write_text(DRAWING)
    whole = make_run(method, folder="whole")
    expected = whole.train()
    reached = 0
    for after in (3, 1, 3):  # in mid-epoch, after its last step, in mid-epoch of the next
        watcher = Stopper(after)
        with pytest.raises(StoppedError):
            make_run(method, folder="stopped", watcher=watcher, stop=watcher.stop).train()
        assert watcher.resumed_at == reached
        reached += after
    watcher = Watcher()
    resumed = make_run(method, folder="stopped", watcher=watcher)
    result = resumed.train()
    assert (watcher.resumed_at, watcher.steps) == (7, 5)
    assert result.history == expected.history
    for mine, theirs in zip(
        resumed.method.state_dict().values(), whole.method.state_dict().values(), strict=True
    ):
        assert torch.equal(mine, theirs)


def test_8_a_checkpoint_of_another_run_is_not_used(make_run):
    make_run("dml").train()
    watcher = Watcher()
    make_run("dml", watcher=watcher, temperature="2").train()
    assert watcher.steps == 12


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_8_the_intact_one_of_two_checkpoints_is_used(make_run):
    run = make_run("dml")
    expected = run.train()
    last, before = sorted(run.folder.glob("checkpoint-*"), reverse=True)
    damage(last)
    watcher = Watcher()
    assert make_run("dml", watcher=watcher).train().history == expected.history
    (said,) = watcher.messages
    assert f"{last.name} is damaged" in said and "resumes after step 8 of 12" in said
    assert watcher.steps == 4  # one epoch of three
    damage(last)
    before.write_bytes(before.read_bytes()[:1000])
    watcher = Watcher()
    assert make_run("dml", watcher=watcher).train().history == expected.history
    (said,) = watcher.messages
    assert f"{last.name}, {before.name} are damaged" in said and "from the beginning" in said
    assert watcher.steps == 12


def test_8_a_checkpoint_is_a_snapshot_although_training_continues(make_run, monkeypatch):
    expected = make_run("dml", folder="whole").train()
    watcher = Watcher()
    write = run_files.write_checkpoint

    def late(folder, content, step):
        assert step == 12 or eventually(lambda: watcher.steps > step + 1)
        write(folder, content, step)

    monkeypatch.setattr(run_files, "write_checkpoint", late)
    run = make_run("dml", watcher=watcher)
    assert run.train().history == expected.history and watcher.messages == []
    (run.folder / "checkpoint-000000012.pt").unlink()
    again = Watcher()
    assert make_run("dml", watcher=again).train().history == expected.history
    assert again.steps == 4


def test_8_checkpoints_of_another_run_are_replaced(make_run):
    folder = make_run("baseline").folder
    make_run("baseline").train()
    with pytest.raises(KeyboardInterrupt):  # in the same folder
        make_run("baseline", seed=1, watcher=Watcher(stop_after=6)).train()
    assert [file.name for file in folder.glob("checkpoint-*")] == ["checkpoint-000000004.pt"]
    watcher = Watcher()
    make_run("baseline", seed=1, watcher=watcher).train()
    assert watcher.steps == 8


def test_8_a_checkpoint_of_another_version_is_ignored_with_a_message(make_run):
    with pytest.raises(KeyboardInterrupt):
        make_run("baseline", seed=1, watcher=Watcher(stop_after=6)).train()
    watcher = Watcher()
    assert make_run("baseline", watcher=watcher).train().status == "finished"
    assert (watcher.resumed_at, watcher.steps) == (0, 12)
    (said,) = watcher.messages
    assert "checkpoint-000000004.pt is of another version of its suite, its data, its" in said


def test_8_a_checkpoint_with_more_or_fewer_fields_is_used():
    noted = Progress(epochs_done=2, part=PartOfEpoch(3, ["ce"], [Share([0.5], (), {})]))
    written = asdict(noted)
    del written["waiting_seconds"]
    assert _progress(written | {"novel": 1}) == noted
    moved = _progress(written | {"left": {"another GPU, 1": 7}, "place": "a GPU, 1"})
    assert (moved.places, moved.place) == ([("another GPU, 1", 7)], "")


@pytest.mark.parametrize("method", slow_except({"dml"}, [*METHODS, "./drawing.py"]))
def test_8_a_run_killed_within_an_epoch_resumes_there(make_run, method, monkeypatch):
    Path("drawing.py").write_text(DRAWING)
    expected = make_run(method, folder="whole").train()
    monkeypatch.setattr(run_module, "SAVE_SECONDS", -1)  # after each step
    with pytest.raises(KeyboardInterrupt):
        make_run(method, watcher=Watcher(stop_after=7)).train()
    watcher = Watcher()
    result = make_run(method, watcher=watcher).train()
    assert (watcher.resumed_at, watcher.steps) == (6, 6)
    assert result.history == expected.history
    assert result.cost.training_seconds > 0


def test_9_a_result_records_its_provenance_without_private_paths(make_run):
    result = make_run("ffsd", temperature="3").train()
    content = json.loads(result.model_dump_json())
    assert content["identity"]["method"] == "ffsd@temperature=3.0"
    assert content["options"]["temperature"] == 3.0
    assert content["protocol"]["schedule"]["epochs"] == 3
    assert content["environment"]["torch"] == torch.__version__
    assert "--set ffsd.temperature=3.0" in content["environment"]["command"]
    text = result.model_dump_json()
    for private in (platform.node(), str(Path.home()), str(Path.cwd()), f"{getpass.getuser()}@"):
        assert private not in text


def test_networks_are_trained_in_train_mode_and_evaluated_in_eval_mode(make_run):
    for method in METHODS:
        run = make_run(method, folder=method)
        modes = {"forward": [], "predict": []}
        for name, seen in modes.items():
            original = getattr(run.method, name)

            def spy(*inputs, original=original, seen=seen, run=run):
                seen.append({module.training for module in run.method.modules()})
                return original(*inputs)

            setattr(run.method, name, spy)
        run.train()
        assert modes["forward"] == [{True}] * 12, method
        assert modes["predict"] == [{False}] * 12, method  # four batches in each of three epochs
