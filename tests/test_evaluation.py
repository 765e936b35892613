"""What an evaluation measures, and after which epochs there is one."""

import pytest
from conftest import Watcher

from kdbench.results.schema import Result


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
