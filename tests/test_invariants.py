"""Tests of the invariants of a fair comparison in one process, named by their numbers."""

import getpass
import json
import platform
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import METHODS, Stopper, Watcher, slow_except
from launched import DRAWING, eventually
from torch.nn.utils import parameters_to_vector

from kdbench.engine import run as run_module
from kdbench.engine import run_files
from kdbench.engine.checkpoint import Progress, _progress
from kdbench.engine.evaluate import evaluate
from kdbench.engine.part import PartOfEpoch, Share
from kdbench.engine.run import Run
from kdbench.engine.schedule import learning_rate_factor
from kdbench.engine.stop import StoppedError
from kdbench.method import Cohort, ContractError
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.suite.load import load_suite

assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def seen_by(run: Run) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Return view 0, labels and learning rate of every training step of a run."""
    steps = []
    forward = run.method.forward

    def spy(views, labels):
        steps.append((views[0].clone(), labels.clone(), run.optimizers[0].param_groups[0]["lr"]))
        return forward(views, labels)

    run.method.forward = spy
    run.train()
    return steps


def test_1_all_methods_see_the_same_images_at_the_same_learning_rates(make_run, suite):
    seen = {method: seen_by(make_run(method, folder=method)) for method in METHODS}
    for method, steps in seen.items():
        assert_equal(steps, seen["baseline"], msg=method)
    factors = [learning_rate_factor(step, 4, suite.schedule) for step in range(12)]
    assert len(set(factors)) > 2
    rates = [rate / suite.optimizer.learning_rate for *_, rate in seen["baseline"]]
    assert rates == pytest.approx(factors)


def test_2_network_i_starts_from_the_same_weights_in_all_methods(make_run, monkeypatch):
    built = defaultdict(list)
    original = Cohort.build

    def build(cohort: Cohort):
        index, network = cohort._built, original(cohort)
        built[index].append(parameters_to_vector(network.parameters()).detach())
        return network

    monkeypatch.setattr(Cohort, "build", build)
    for method in METHODS:
        make_run(method)
    assert set(built) == {0, 1, 2}
    for copies in built.values():
        assert all(torch.equal(copies[0], other) for other in copies)
    assert not torch.equal(built[0][0], built[1][0])


def test_2_another_seed_changes_weights_order_and_views(make_run):
    runs = [make_run("baseline", seed=seed) for seed in (0, 1)]
    assert not torch.equal(*(next(run.method.parameters()) for run in runs))
    (views, labels), (other_views, other_labels) = (next(run.training.epoch(0)) for run in runs)
    assert not torch.equal(labels, other_labels)
    assert not torch.equal(views, other_views)


def test_2_the_student_of_independent_equals_the_baseline_exactly(make_run):
    alone, among_others = (
        [epoch.metrics["student"] for epoch in make_run(method, folder=method).train().history]
        for method in ("baseline", "independent")
    )
    assert alone == among_others


def test_3_learning_rates_warm_up_per_step_and_fall_at_the_milestones(suite):
    schedule, steps = load_suite("cifar100").schedule, 390  # milestones 150 and 225
    rates = [0.1 * learning_rate_factor(step, steps, schedule) for step in range(300 * steps)]
    assert rates[: 150 * steps] == [0.1] * 150 * steps
    assert rates[150 * steps : 225 * steps] == pytest.approx([0.01] * 75 * steps)
    assert rates[225 * steps :] == pytest.approx([0.001] * 75 * steps)
    schedule = suite.schedule.model_copy(update={"warmup_epochs": 2.0, "milestones": ()})
    factors = [learning_rate_factor(step, 5, schedule) for step in range(12)]
    assert factors == pytest.approx([*(i / 10 for i in range(1, 11)), 1, 1])


class Fixed(torch.nn.Module):
    """A method that predicts given logits, image after image."""

    def __init__(self, **roles: torch.Tensor):
        super().__init__()
        self.roles = roles
        self.position = 0

    def predict(self, images):
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
    run.train()
    worse = run.history[-1].metrics["student"].model_copy(update={"top1": 1.0})
    run.history[-1] = run.history[-1].model_copy(update={"metrics": {"student": worse}})
    result = run.result("finished")
    assert result.last["student"].top1 == 1.0
    assert result.best_on_test.metrics["student"].top1 > 1.0
    assert result.best_on_test.epoch < 3
    assert leaderboard(runs_frame([result])).student_top1.tolist() == [1.0]


def test_7_the_ensemble_is_the_argmax_of_mean_probabilities():
    # Network 0 is sure and right, the others lean to class 1: the mean probability is right, the
    # majority is wrong. In image 1 any network right would count, the mean does not.
    student = torch.tensor([[6.0, 0.0, 0.0], [0.0, 6.0, 0.0]])
    peers = torch.tensor([[0.0, 0.4, 0.0], [0.4, 0.0, 0.0]])
    method = Fixed(student=student, peer0=peers, peer1=peers, fusion=torch.zeros(2, 3))
    batches = batched(torch.tensor([0, 0]), 2)
    metrics = evaluate(method, batches)
    assert metrics["ensemble"].top1 == 50.0
    p = torch.stack([z.softmax(1) for z in (student, peers, peers)]).mean(0)
    assert metrics["ensemble"].loss == pytest.approx(-p[:, 0].log().mean().item())
    assert metrics["mean"].top1 == pytest.approx((50 + 50 + 50) / 3)
    with pytest.raises(ContractError, match="ensemble"):
        evaluate(Fixed(student=student, ensemble=student), batches)


def assert_same_end(resumed: Run, whole: Run) -> None:
    """Train both runs, one of them from a checkpoint, and compare their numbers."""
    for run in (resumed, whole):
        run.train()
    assert resumed.history == whole.history
    assert_equal(resumed.method.state_dict(), whole.method.state_dict())
    logs = [(run.folder / "log.jsonl").read_text() for run in (whole, resumed)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("method", slow_except({"ffsd"}, METHODS))
def test_8_a_killed_run_ends_with_the_same_numbers(make_run, method):
    for stop in (2, 6):  # in the first epoch, then in the second of what is left
        with pytest.raises(KeyboardInterrupt):
            make_run(method, watcher=Watcher(stop_after=stop)).train()
    assert_same_end(make_run(method), make_run(method, folder="whole"))


@pytest.mark.parametrize("method", slow_except({"./drawing.py"}, [*METHODS, "./drawing.py"]))
def test_8_a_run_stopped_in_mid_epoch_ends_with_the_same_numbers(make_run, method):
    Path("drawing.py").write_text(DRAWING)
    reached = 0
    for after in (3, 1, 3):  # in mid-epoch, after its last step, in mid-epoch of the next
        watcher = Stopper(after)
        with pytest.raises(StoppedError):
            make_run(method, watcher=watcher, stop=watcher.stop).train()
        assert watcher.resumed_at == reached
        reached += after
    resumed = make_run(method)
    assert_same_end(resumed, make_run(method, folder="whole"))
    assert (resumed.observer.resumed_at, resumed.observer.steps) == (7, 5)


@pytest.mark.parametrize("method", slow_except({"dml"}, [*METHODS, "./drawing.py"]))
def test_8_a_run_killed_within_an_epoch_resumes_there(make_run, method, monkeypatch):
    Path("drawing.py").write_text(DRAWING)
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "SAVE_SECONDS", -1)  # after each step
        with pytest.raises(KeyboardInterrupt):
            make_run(method, watcher=Watcher(stop_after=7)).train()
    resumed = make_run(method)
    assert_same_end(resumed, make_run(method, folder="whole"))
    assert (resumed.observer.resumed_at, resumed.observer.steps) == (6, 6)
    assert resumed.result("finished").cost.training_seconds > 0


def test_8_checkpoints_of_another_run_are_not_used_but_replaced(make_run):
    with pytest.raises(KeyboardInterrupt):
        make_run("label_smoothing", seed=1, watcher=Watcher(stop_after=6)).train()
    run = make_run("label_smoothing")
    assert run.train().status == "finished"
    assert (run.observer.resumed_at, run.observer.steps) == (0, 12)
    (said,) = run.observer.messages
    assert "checkpoint-000000004.pt is of another version of its suite, its data" in said
    with pytest.raises(KeyboardInterrupt):  # in the same folder, with another option
        make_run("label_smoothing", smoothing="0.2", watcher=Watcher(stop_after=6)).train()
    assert [file.name for file in run.folder.glob("checkpoint-*")] == ["checkpoint-000000004.pt"]
    resumed = make_run("label_smoothing", smoothing="0.2")
    resumed.train()
    assert resumed.observer.steps == 8


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_8_the_intact_one_of_two_checkpoints_is_used(make_run):
    run = make_run("dml")
    expected = run.train().history

    def resume() -> tuple[str, int]:
        """Return what a resumed run says, and its number of steps."""
        again = make_run("dml")
        assert again.train().history == expected
        (said,) = again.observer.messages
        return said, again.observer.steps

    last, before = sorted(run.folder.glob("checkpoint-*"), reverse=True)
    damage(last)
    said, steps = resume()
    assert f"{last.name} is damaged" in said and "resumes after step 8 of 12" in said
    assert steps == 4  # one epoch of three
    damage(last)
    before.write_bytes(before.read_bytes()[:1000])
    said, steps = resume()
    assert f"{last.name}, {before.name} are damaged" in said and "from the beginning" in said
    assert steps == 12


def test_8_a_checkpoint_is_a_snapshot_although_training_continues(make_run, monkeypatch):
    expected = make_run("dml", folder="whole").train().history
    run = make_run("dml")
    write = run_files.write_checkpoint

    def late(folder, content, step):
        assert step == 12 or eventually(lambda: run.observer.steps > step + 1)
        write(folder, content, step)

    monkeypatch.setattr(run_files, "write_checkpoint", late)
    assert run.train().history == expected and run.observer.messages == []
    (run.folder / "checkpoint-000000012.pt").unlink()
    again = make_run("dml")
    assert again.train().history == expected
    assert again.observer.steps == 4


def test_8_a_checkpoint_with_more_or_fewer_fields_is_used():
    noted = Progress(epochs_done=2, part=PartOfEpoch(3, ["ce"], [Share([0.5], (), {})]))
    written = asdict(noted)
    del written["waiting_seconds"]
    assert _progress(written | {"novel": 1}) == noted
    moved = _progress(written | {"left": {"another GPU, 1": 7}, "place": "a GPU, 1"})
    assert (moved.places, moved.place) == ([("another GPU, 1", 7)], "")


def test_9_a_result_records_its_provenance_without_private_paths(make_run):
    text = make_run("ffsd", temperature="3").train().model_dump_json()
    content = json.loads(text)
    assert content["identity"]["method"] == "ffsd@temperature=3.0"
    assert content["options"]["temperature"] == 3.0
    assert content["protocol"]["schedule"]["epochs"] == 3
    assert content["environment"]["torch"] == torch.__version__
    assert "--set ffsd.temperature=3.0" in content["environment"]["command"]
    private = (platform.node(), str(Path.home()), str(Path.cwd()), f"{getpass.getuser()}@")
    assert not any(name in text for name in private)
