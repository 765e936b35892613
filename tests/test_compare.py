"""Tests of `kdbench compare` with folders, revisions and methods."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import is_one_sentence
from made_results import LOST, made, made_seeds

from kdbench.report.analysis.compare import Row, compare, render
from kdbench.report.analysis.inference import compare_pairs
from kdbench.results.files import write_result
from kdbench.results.schema import TRAINED_BEFORE

RESULTS = Path("results")


def save(folder: str, method: str, *top1: float, run: dict | None = None, **changes) -> None:
    """Write results of a method with given accuracies by seed."""
    for result in made_seeds(method, [*top1], **changes):
        write_result(Path(folder), result.model_copy(update=run or {}))


def compared(a: str = "a", b: str = "b") -> dict[str, Row]:
    """Return the rows by method, or by architecture if methods are compared."""
    return {row.method or row.architecture: row for row in compare(a, b, RESULTS).rows}


BETTER = [70.0, 70.2, 70.1, 70.4, 70.3, 70.2, 70.5, 70.1]

UP = [top1 + 2 + seed / 10 for seed, top1 in enumerate(BETTER)]
DOWN = [top1 - 1 - seed / 10 for seed, top1 in enumerate(BETTER)]
NOISE = [top1 + (-1) ** seed / 2 for seed, top1 in enumerate(BETTER)]


def test_differences_are_paired_adjusted_and_sorted_by_evidence():
    changes = {"up": UP, "down": DOWN, "noise": NOISE}
    for method, top1s in {**changes, "same": BETTER}.items():
        save("a", method, *BETTER)
        save("b", method, *top1s)
    rows = compared()
    assert [(method, row.verdict) for method, row in rows.items()] == [
        ("up", "better"),
        ("down", "worse"),
        ("noise", "not distinguishable"),
        ("same", "identical"),
    ]
    values = {method: dict(enumerate(top1s)) for method, top1s in changes.items()}
    values |= {f"{method} before": dict(enumerate(BETTER)) for method in changes}
    expected = compare_pairs(values, [(method, f"{method} before") for method in changes])
    for row, found in zip(rows.values(), expected, strict=False):  # without the identical one
        assert (row.difference, row.p) == (found.difference, pytest.approx(found.p))
        assert row.interval == pytest.approx(found.interval)
        assert row.seeds_needed == found.seeds_needed
    text = render(compare("a", "b", RESULTS), "terminal")
    assert text.endswith("\n1 better, 1 worse, 1 not distinguishable, 1 identical\n")


def test_three_seeds_decide_a_large_difference_only():
    save("a", "dml", 60.0, 60.1, 60.2)
    save("b", "dml", 60.0, 60.2, 60.5)
    assert compared()["dml"].verdict == "not distinguishable"
    text = render(compare("a", "b", RESULTS), "terminal")
    assert "not distinguishable at n = 3 (needs 13)" in text and "+0.13" in text
    save("b", "dml", 70.0, 70.2, 70.5)
    assert compared()["dml"].verdict == "better"


def test_only_common_seeds_count():
    save("a", "dml", 60.0, 70.0)
    save("b", "dml", 61.0, 72.0, 99.0)
    row = compared()["dml"]
    assert (row.n, row.a, row.b) == (2, 65.0, 66.5)
    assert row.notes == ["1 seed only in B"]


def costs(factor: int) -> dict[str, float]:
    return {"images_per_second": 100.0 * factor, "peak_memory_bytes": 1000 * factor}


def test_costs_are_of_common_seeds():
    save("a", "dml", 60.0, cost=costs(1))
    save("b", "dml", 60.0, cost=costs(2))
    save("b", "dml", 61.0, first=1, cost=costs(5))
    row = compared()["dml"]
    assert (row.rate, row.memory) == (2.0, 2.0)


def test_equal_accuracies_of_other_runs_are_not_identical():
    save("a", "dml", 60.0)
    save("b", "dml", 60.0)
    assert compared()["dml"].verdict == "identical"
    epoch = made("dml", 0, 60.0).history[0].model_copy(update={"losses": {"ce/student": 2.0}})
    save("b", "dml", 60.0, run={"history": [epoch]})
    assert compared()["dml"].verdict == "not distinguishable"


@pytest.mark.parametrize(
    ("before", "after", "note"),
    [
        ({}, {"suite_hash": "another"}, "another suite hash"),
        ({}, {"environment": {"precision": "bf16"}}, "another precision"),
        ({"run": {"data": "1" * 16}}, {"run": {"data": "2" * 16}}, "other data"),
    ],
)
def test_other_recipes_and_data_are_not_compared(before, after, note):
    save("a", "dml", 60.0, **before)
    save("b", "dml", 61.0, **after)
    rows = compare("a", "b", RESULTS).rows
    assert sorted(row.verdict for row in rows) == ["only in A", "only in B"]
    assert all(row.notes == [note] and row.difference is None for row in rows)


def test_missing_and_unfinished_runs_of_one_side_are_reported():
    save("a", "dml", 60.0)
    save("a", "one", 60.0)
    save("b", "dml", 61.0, method_hash="another")
    save("b", "kdcl", 60.0)
    save("b", "dml", 60.0, first=1, run=LOST)
    save("a", "ffsd", 60.0)
    save("b", "ffsd", 60.0, run=LOST)
    rows = compared()
    assert rows["one"].verdict == "only in A" and rows["kdcl"].verdict == "only in B"
    assert rows["dml"].notes == ["another method hash", "1 diverged in B"]
    assert rows["dml"].n == 1
    assert rows["ffsd"].notes == ["1 diverged in B"]  # of no version that is known


@pytest.mark.parametrize(
    ("environment", "cost", "notes", "ratio"),
    [
        ({}, {}, {}, 2.0),
        ({"device": "another"}, {}, {}, None),
        ({"step": "graph"}, {}, {}, None),
        ({"threads": 64}, {}, {}, None),
        ({}, {"jobs": 2}, {}, None),
        ({}, {}, {TRAINED_BEFORE: ["elsewhere"]}, None),
    ],
)
def test_costs_are_ratios_where_runs_were_executed_alike(environment, cost, notes, ratio):
    save("a", "dml", 60.0, cost=costs(1))
    save("b", "dml", 60.0, environment=environment, cost=costs(2) | cost, run={"notes": notes})
    row = compared()["dml"]
    assert (row.rate, row.memory) == (ratio, ratio)


def test_two_methods_are_compared_by_architecture():
    save("results", "dml", 60.0, 60.0)
    save("results", "ffsd", 61.0, 62.0, method_hash="another")
    save("results", "ffsd", 61.0, architecture="resnet32")
    rows = compared("dml", "ffsd")
    assert rows["resnet20"].difference == 1.5
    assert rows["resnet20"].notes == []  # that two methods differ is no news
    assert rows["resnet32"].verdict == "only in B"


def test_several_versions_are_reported():
    save("results", "dml", 60.0, 60.0)
    save("results", "ffsd", 61.0, 62.0)
    save("results", "ffsd", 61.0, method_hash="another")
    assert compared("dml", "ffsd")["resnet20"].notes == ["more than one version in B"]
    save("a", "dml", 60.0)
    save("b", "dml", 61.0, run={"harness": 2})
    assert compared()["dml"].notes == ["another harness version"]


def git(*arguments: str) -> None:
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", *who, *arguments], check=True, capture_output=True)


def commit_results() -> None:
    git("add", "results")
    git("commit", "-m", "results")


def test_a_revision_with_a_link_out_of_its_folder_is_refused(kdbench):
    git("init")
    save("results", "dml", 60.0)
    Path("results/link").symlink_to("/etc")
    commit_results()
    code, _, err = kdbench("compare", "HEAD", "HEAD")
    assert code == 2 and is_one_sentence(err) and "Revision 'HEAD' cannot be read" in err


def test_revisions_are_read_without_a_checkout(kdbench):
    git("init")
    save("results", "dml", 60.0)
    bad = Path("results/cifar100-reduced/resnet20/one/seed0.json")
    bad.parent.mkdir(parents=True)
    bad.write_text("{")
    commit_results()
    save("results", "dml", 61.0)
    bad.unlink()
    commit_results()
    shutil.rmtree("results")
    code, out, err = kdbench("compare", "HEAD~1", "HEAD", "--format", "json")
    assert code == 2  # for the damaged file, as of `report`
    assert is_one_sentence(err) and f"'HEAD~1:{bad}' is not valid and was skipped" in err
    (row,) = json.loads(out)["rows"]
    assert (row["a"], row["b"], row["difference"]) == (60.0, 61.0, 1.0)
    assert not Path("results").exists()


def test_formats(kdbench):
    save("a", "dml", 60.0)
    save("b", "dml", 61.0)
    code, out, err = kdbench("compare", "a", "b", "--format", "markdown")
    assert (code, err) == (0, "")
    assert out.startswith("### A: a, B: b\n") and "| cifar100-reduced | resnet20" in out
    content = json.loads(kdbench("compare", "a", "b", "--format", "json")[1])
    assert content["summary"]["not distinguishable"] == 1
    assert content["rows"][0]["interval"] is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            "dml dmml",
            "'dmml' is neither a folder, nor a method with results.* Did you mean 'dml'\\?",
        ),
        ("dml empty", "'dml' is a method but 'empty' is not"),
        ("empty empty", "'empty' has no results"),
        ("dml -- -x", "'-x' is neither a folder"),
    ],
)
def test_incomparable_inputs_print_one_sentence(kdbench, names, words):
    save("results", "dml", 60.0)
    Path("empty").mkdir()
    code, out, err = kdbench("compare", *names.split())
    assert (code, out) == (2, "")
    assert is_one_sentence(err) and re.search(words, err)
