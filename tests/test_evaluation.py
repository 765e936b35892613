"""What an evaluation measures, and after which epochs there is one."""

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Watcher
from made_results import committed, made

from kdbench.data import IGNORE_INDEX
from kdbench.engine.evaluate import BINS, measure
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.tables.columns import columns
from kdbench.results.files import read_result
from kdbench.results.predictions import read_predictions, write_predictions
from kdbench.results.schema import Metrics, Result


@pytest.fixture
def make_sparse_run(make_run, suite):
    """Return a function that opens a run that is evaluated after epochs 2 and 3 of 3."""
    sparse = suite.model_copy(update={"evaluate_every": 2})
    return lambda **how: make_run("dml", changed_suite=sparse, **how)


def test_only_every_nth_and_the_last_epoch_are_evaluated(make_run, make_sparse_run):
    whole = make_run("dml", folder="whole").train()
    watcher = Watcher()
    sparse = make_sparse_run(watcher=watcher).train()
    assert [bool(epoch.metrics) for epoch in watcher.epochs] == [False, True, True]
    assert [epoch.losses for epoch in watcher.epochs] == [epoch.losses for epoch in whole.history]
    assert sparse.history == whole.history[1:] and sparse.last == whole.last
    assert Result.model_validate_json(sparse.model_dump_json(), strict=True) == sparse


def test_a_run_killed_after_an_epoch_without_evaluation_resumes_there(make_sparse_run):
    expected = make_sparse_run(folder="whole").train()
    with pytest.raises(KeyboardInterrupt):
        make_sparse_run(watcher=Watcher(stop_after=6)).train()
    watcher = Watcher()
    assert make_sparse_run(watcher=watcher).train().history == expected.history
    assert (watcher.resumed_at, watcher.steps) == (4, 8)


def test_evaluating_less_often_is_another_recipe(suite):
    assert suite.model_copy(update={"evaluate_every": 1}).digest() == suite.digest()
    assert suite.model_copy(update={"evaluate_every": 2}).digest() != suite.digest()


def test_metrics_match_their_definitions():
    """Probabilities of 40 images are compared with sums written out image by image."""
    torch.manual_seed(0)
    labels = torch.randint(5, (40,))
    logits = {role: 3 * torch.randn(40, 5) for role in ("student", "peer0", "peer1")}
    batches = zip(torch.arange(40).split(16), labels.split(16), strict=True)
    found = measure(lambda rows: {role: z[rows] for role, z in logits.items()}, batches)
    for role, z in logits.items():
        p = z.double().softmax(1)
        losses = [-p[i, label].log() for i, label in enumerate(labels)]
        assert found[role].loss == pytest.approx(float(sum(losses)) / 40)
        one_hot = torch.eye(5, dtype=torch.float64)[labels]
        assert found[role].brier == pytest.approx(float(((p - one_hot) ** 2).sum()) / 40)
        gap = 0.0
        for edge in range(BINS):
            inside = (p.amax(1) > edge / BINS) & (p.amax(1) <= (edge + 1) / BINS)
            right = (p.argmax(1) == labels)[inside].double()
            gap += abs(float((p.amax(1)[inside] - right).sum()))
        assert found[role].ece == pytest.approx(100 * gap / 40)
        assert found[role].disagreement is None
    pairs = combinations([z.argmax(1) for z in logits.values()], 2)
    differing = [float((one != other).double().mean()) for one, other in pairs]
    assert found["mean"].disagreement == pytest.approx(100 * sum(differing) / 3)
    networks = [found[role] for role in logits]
    for name in ("top1", "top5", "loss", "ece", "brier"):
        mean = sum(getattr(metrics, name) for metrics in networks) / 3
        assert getattr(found["mean"], name) == pytest.approx(mean)


def measured(logits: torch.Tensor, labels: list[int]) -> Metrics:
    return measure(lambda x: {"student": x}, [(logits, torch.tensor(labels))])["student"]


def test_images_without_a_label_count_as_wrong_and_are_not_calibrated():
    logits = torch.tensor([[4.0, 0.0], [4.0, 0.0]])
    whole, found = measured(logits[:1], [0]), measured(logits, [0, IGNORE_INDEX])
    assert (found.top1, found.ece, found.brier) == (50.0, whole.ece, whole.brier)


def test_a_diverged_network_can_be_measured():
    found = measured(torch.full((2, 3), torch.nan), [0, 1])
    assert found.loss != found.loss and found.brier != found.brier


def test_what_older_results_lack_is_left_out():
    old = committed("dml")
    assert old.last["student"].ece is None and "ece" not in old.model_dump()["last"]["student"]
    metrics = {
        "student": Metrics(top1=50.0, top5=90.0, loss=1.25, ece=4.0, brier=0.5),
        "ensemble": Metrics(top1=53.0, top5=90.0, loss=1.0, ece=2.0, brier=0.4),
        "mean": Metrics(top1=51.0, top5=90.0, loss=1.2, ece=4.0, brier=0.5, disagreement=30.0),
    }
    new = made("ffsd").model_copy(update={"last": metrics})
    names = ["nll", "ece", "brier", "ensemble-ece", "gain", "disagreement"]
    for each, texts in [
        (new, ["1.250", "4.00", "0.500", "2.00", "2.00", "30.00"]),
        (made("ffsd"), ["1.000", "n/a", "n/a", "n/a", "n/a", "n/a"]),
    ]:
        board = leaderboard(runs_frame([each]))
        cells = [column.text(board.iloc[0]) for column in columns(board, names, "baseline")]
        assert [cell.split(" ")[0] for cell in cells] == texts


def test_the_predictions_of_the_last_epoch_lie_beside_the_result(run_tiny):
    assert run_tiny("--methods", "dml")[0] == 0
    result = read_result(Path("results/tiny/resnet8/dml/seed0.json"))
    found = read_predictions(Path("results"), result.identity)
    assert set(found) == {"student", "peer0", "peer1", "ensemble", "labels"}
    assert {array.dtype for array in found.values()} == {np.dtype("uint8")}
    for role in found.keys() - {"labels"}:
        accuracy = 100 * (found[role] == found["labels"]).mean()
        assert accuracy == pytest.approx(result.last[role].top1)
    pairs = combinations(("student", "peer0", "peer1"), 2)
    differing = [(found[one] != found[other]).mean() for one, other in pairs]
    assert 100 * sum(differing) / 3 == pytest.approx(result.last["mean"].disagreement)


def test_a_run_that_only_lacks_its_result_still_has_predictions(make_run):
    watcher = Watcher()
    first, again = make_run("dml"), make_run("dml", watcher=watcher)
    first.train()
    again.train()
    assert watcher.steps == 0
    for role, classes in first.predictions.items():
        assert (again.predictions[role] == classes).all()


def test_predictions_survive_the_disk_in_the_smallest_type(tmp_path):
    identity = made("dml").identity
    assert read_predictions(tmp_path, identity) is None
    values = {"student": [0, 255], "peer0": [0, 999], "labels": [-1, 3]}
    arrays = {name: np.array(classes) for name, classes in values.items()}
    file = write_predictions(tmp_path, identity, arrays)
    found = read_predictions(tmp_path, identity)
    assert [found[name].dtype for name in arrays] == ["uint8", "uint16", "int64"]
    assert {name: found[name].tolist() for name in arrays} == values
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"seed0\.npz' is not valid"):
        read_predictions(tmp_path, identity)
