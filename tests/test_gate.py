"""kdbench gate: verdicts, tolerances, exit codes, what it writes and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import is_one_sentence
from made_results import CIFAR, made
from scipy import stats

from kdbench.bench import command as bench_command
from kdbench.bench.record import Spread
from kdbench.engine.device import make_accelerator
from kdbench.engine.environment import environment
from kdbench.errors import UserError
from kdbench.gate import command, measure
from kdbench.gate.compare import (
    FALSE_ALARM_RATE,
    MIN_STEP_TIME_TOLERANCE,
    Comparison,
    compare,
    loss_distance,
)
from kdbench.gate.record import Baseline, Entry, Rounding, StepMeasurement, Trace, read_baseline
from kdbench.gate.tables import summarize
from kdbench.report.analysis.schedule_agreement import agreement

STORED = Path(__file__).parents[1] / "results/gate/digits.json"
TORCH = torch.__version__
TOP1 = (90.0, 92.0, 94.0)
STEP = StepMeasurement(
    ratio=Spread(median=1.2, quartiles=(1.19, 1.21)),
    rounds=10,
    peak_memory_bytes=100 * 2**20,
    bytes=10**9,
)


def make_trace(top1: float, shift: float = 0.0, **terms: float) -> Trace:
    """A trace of two steps, with losses increased by a relative shift."""
    losses = {name: [value * (1 + shift)] * 2 for name, value in ({"ce": 2.0} | terms).items()}
    return Trace(top1={"student": top1}, losses=losses, evaluation={"student": [2.3, 2.2]})


def make_traces(*shifts: float, top1: float = 0.0, **terms: float) -> dict[int, Trace]:
    """Traces of three seeds, with shifted losses and accuracies."""
    seeds = enumerate(zip(TOP1, shifts or (0.0, 0.0, 0.0), strict=True))
    return {seed: make_trace(value + top1, shift, **terms) for seed, (value, shift) in seeds}


def make_entry(method: str = "a", **changes: object) -> Entry:
    entry = Entry(
        architecture="resnet8",
        method=method,
        method_hash="0",
        traces=make_traces(),
        training_flops=10**9,
        step=STEP,
        rounding=Rounding(losses=[1e-5, 1e-4], evaluation=[1e-5, 1e-4]),
    )
    return entry.model_copy(update=changes)


@pytest.fixture(scope="module")
def stored() -> Baseline:
    """A baseline with the methods a and b, measured in this environment."""
    return Baseline(
        suite="tiny",
        suite_hash="0",
        epochs=2,
        seeds=3,
        harness_version=1,
        against="independent",
        environment=environment(make_accelerator(cpu=True).device, 1, "fp32", "kdbench gate"),
        entries=[make_entry("a"), make_entry("b")],
    )


def compare_measure(stored: Baseline, measure: str, **changes: object) -> Comparison:
    """The comparison of one measure of method a, with changes to its entry."""
    (comparison,) = [
        c
        for c in compare(stored, [make_entry("a", **changes)], {"a"}, TORCH)
        if c.measure.startswith(measure)
    ]
    return comparison


def test_the_committed_baseline_can_be_read_and_is_identical_to_itself():
    baseline = read_baseline(STORED)
    assert [entry.method for entry in baseline.entries][:2] == ["baseline", "cl_ilr"]
    assert json.loads(baseline.model_dump_json()) == json.loads(STORED.read_text())
    comparisons = compare(baseline, baseline.entries, None, baseline.environment.torch)
    assert all(comparison.identical for comparison in comparisons)
    assert {comparison.measure for comparison in comparisons} == {
        "student top-1 %",
        "ensemble top-1 %",
        "training losses, step 1",
        "evaluation losses, step 1",
        "training GFLOP",
        "GB per step",
        "step time ratio",
        "step memory MiB",
    }


def test_equal_numbers_are_identical_whatever_the_hash_of_the_source(stored):
    new = [make_entry("a", method_hash="1"), make_entry("b")]
    comparisons = compare(stored, new, None, TORCH)
    assert len(comparisons) == 2 * 7
    assert {c.verdict for c in comparisons} == {"same"} and all(c.identical for c in comparisons)
    summary = summarize(comparisons)
    assert summary == "No regression: 14 measures: 14 same, 14 of them identical."
    other_torch = compare(stored, new, None, "0.0")  # may move other bytes
    assert len(other_torch) == 2 * 6 and not any("GB" in c.measure for c in other_torch)


def test_missing_new_and_unfinished_methods_are_reported(stored):
    comparisons = compare(stored, [make_entry("a"), make_entry("c")], None, TORCH)
    verdicts = [(c.method, c.verdict) for c in comparisons if c.measure == "method"]
    assert verdicts == [("b", "missing"), ("c", "new")]
    only = compare(stored, [make_entry("a")], {"a"}, TORCH)  # b was not requested
    assert {c.method for c in only} == {"a"}
    assert "REGRESSION" in summarize(comparisons) and "REGRESSION" not in summarize(only)
    unfinished = {1: "diverged: 'ce' is nan in epoch 1"}
    failed = compare_measure(stored, "seed 1", traces={0: make_trace(90.0)}, unfinished=unfinished)
    assert failed.verdict == "failed" and "nan" in failed.now


def test_accuracy_has_the_tolerance_of_a_prediction_interval_over_pooled_seeds(stored):
    """Both methods have a standard deviation of 2, so there are 4 degrees of freedom."""

    def tolerance(comparisons: int) -> float:
        return stats.t.isf(FALSE_ALARM_RATE / comparisons / 2, 4) * 2.0 * math.sqrt(2 / 3)

    for share, expected in ((-1.01, "worse"), (-0.99, "same"), (1.01, "better")):
        traces = make_traces(top1=share * tolerance(4))  # 2 methods x 2 roles
        comparisons = compare(
            stored, [make_entry("a", traces=traces), make_entry("b")], None, TORCH
        )
        result = next(c for c in comparisons if c.method == "a" and c.measure == "student top-1 %")
        assert result.verdict == expected
        assert float(result.tolerance) == pytest.approx(tolerance(4), abs=0.01)
    # If one method is requested, the spread is still that of all methods.
    alone = compare_measure(stored, "student top-1")
    assert float(alone.tolerance) == pytest.approx(tolerance(2), abs=0.01)


def test_accuracy_is_compared_over_common_seeds(stored):
    common = compare_measure(stored, "student top-1", traces={2: make_trace(94.0)})
    assert common.identical and common.baseline == "94.00"
    one = [make_entry("a", traces={0: make_trace(90.0)})]
    single = compare_measure(
        stored.model_copy(update={"entries": one}), "student top-1", traces={0: make_trace(10.0)}
    )
    assert single.verdict == "same" and single.tolerance == "n/a (one seed)"


def test_losses_are_changed_if_every_seed_moved_further_than_rounding(stored):
    for first in (2e-4, -2e-4):
        traces = make_traces(first, 3e-4, 4e-4)
        assert compare_measure(stored, "training losses", traces=traces).verdict == "changed"
    flipped = compare_measure(stored, "training losses", traces=make_traces(0.5, 0.5, 2e-5))
    assert flipped.verdict == "same" and not flipped.identical
    traces = make_traces(0.5, 0.5, 0.5)
    assert compare_measure(stored, "evaluation losses", traces=traces).identical
    renamed = compare_measure(stored, "training losses", traces=make_traces(kl=1.0))
    assert renamed.verdict == "changed"
    assert "kl" in renamed.now and "none" in renamed.baseline


def test_a_small_term_counts_as_much_as_a_large_one():
    before, after = {"ce": [2.0], "kl": [1e-6]}, {"ce": [2.0], "kl": [2e-6]}
    assert loss_distance(before, after, 0) == pytest.approx(math.sqrt(1 / 2))
    assert loss_distance({"off": [0.0]}, {"off": [0.0]}, 0) == 0


@pytest.mark.parametrize(
    ("flops", "verdict"), [(10**9 + 1, "worse"), (10**9 - 1, "better"), (10**9, "same")]
)
def test_counted_work_has_no_tolerance(stored, flops, verdict):
    assert compare_measure(stored, "training GFLOP", training_flops=flops).verdict == verdict
    step = STEP.model_copy(update={"bytes": flops})
    assert compare_measure(stored, "GB per step", step=step).verdict == verdict


SLOW = 1.2 * (1 + MIN_STEP_TIME_TOLERANCE) + 0.01


@pytest.mark.parametrize(
    ("median", "margin", "verdict"),
    [
        (SLOW, 0.01, "worse"),
        (SLOW, 0.5, "same"),  # the machine was busy
        (SLOW - 0.02, 0.01, "same"),
        (0.8, 0.01, "better"),
    ],
)
def test_step_times_are_judged_by_the_spread_of_their_windows(stored, median, margin, verdict):
    ratio = Spread(median=median, quartiles=(median - margin, median + margin))
    step = STEP.model_copy(update={"ratio": ratio})
    assert compare_measure(stored, "step time", step=step).verdict == verdict


@pytest.mark.parametrize(("growth", "verdict"), [(1.51, "worse"), (1.49, "same"), (0.49, "better")])
def test_memory_has_a_margin(stored, growth, verdict):
    step = STEP.model_copy(update={"peak_memory_bytes": round(growth * STEP.peak_memory_bytes)})
    assert compare_measure(stored, "step memory", step=step).verdict == verdict


@pytest.fixture
def gate(kdbench, monkeypatch):
    """Run `kdbench gate` on the tiny suite, as if from a clean checkout on a quiet machine."""

    def clean_environment(*arguments):
        return environment(*arguments).model_copy(update={"dirty": False})

    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.setattr(measure, "ROUNDS", 2)
    monkeypatch.setattr(bench_command, "_window", lambda subject: (subject.spec.networks, 0.1))
    monkeypatch.setattr(command, "environment", clean_environment)
    options = ("gate", "--suite", "tiny.toml", "--methods", "baseline,dml")
    return lambda *arguments: kdbench(*options, *arguments)


@pytest.mark.parametrize(
    "methods", [["baseline"], pytest.param(["baseline", "dml"], marks=pytest.mark.slow)]
)
def test_a_gate_end_to_end(gate, monkeypatch, methods):
    """With one method, steps are not timed."""
    if is_quick := len(methods) == 1:
        monkeypatch.setattr(measure, "STEPS", 2)
        monkeypatch.setattr(command, "time_steps", lambda specs, on_message: {})
    file, options = Path("results/gate/tiny.json"), ("--methods", ",".join(methods))
    code, out, err = gate(*options)
    assert code == 2 and is_one_sentence(err) and "--update" in err and not out

    code, out, _ = gate(*options, "--update", "--seeds", "1")
    assert code == 0 and str(file) in out
    stored = read_baseline(file)
    assert stored.seeds == 1 and [e.method for e in stored.entries] == methods
    assert all(e.rounding and len(e.rounding.losses) == measure.STEPS for e in stored.entries)
    assert is_quick or all(e.step and e.step.ratio.median > 0 for e in stored.entries)

    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    code, out, _ = gate(*options)
    rows = [line.split() for line in out.splitlines() if line.startswith(tuple(methods))]
    assert code == 0 and "No regression" in out
    assert {r[-1] for r in rows if "time" not in r and "memory" not in r} == {"identical"}
    assert "| baseline | " in " ".join(Path("summary.md").read_text().split())

    worse = json.loads(file.read_text())
    for run in worse["entries"][-1]["traces"].values():
        term = next(iter(run["losses"]))
        run["losses"][term] = [2 * x for x in run["losses"][term]]
    file.write_text(json.dumps(worse))
    code, out, _ = gate(*options)
    assert code == 1 and "REGRESSION" in out
    changed = [line.split()[0] for line in out.splitlines() if line.endswith("changed")]
    assert changed == [methods[-1]]
    assert json.loads(file.read_text()) == worse  # only --update writes the baseline
    assert not Path("runs").exists() and not list(Path("results").glob("tiny*"))

    code, out, _ = gate(*options, "--update")
    assert code == 0 and "REGRESSION" in out  # the differences are shown
    losses = [[run.losses for run in e.traces.values()] for e in read_baseline(file).entries]
    assert losses == [[run.losses for run in e.traces.values()] for e in stored.entries]


def test_only_committed_code_and_finished_runs_make_a_baseline(gate, monkeypatch):
    clean = command.environment
    monkeypatch.setattr(
        command, "environment", lambda *a: clean(*a).model_copy(update={"dirty": True})
    )
    code, _, err = gate("--update")
    assert code == 2 and is_one_sentence(err) and "commit" in err
    assert not Path("results").exists()
    with pytest.raises(UserError, match="a resnet8 seed 1 failed: it broke"):
        command._check_finished([make_entry("a", unfinished={1: "failed: it broke"})])


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        ({}, ("--update", "--architectures", "wrn16-2", "--methods", "all"), "lose resnet8"),
        ({}, ("--results-dir", "kept"), "'kept'"),
        ({}, (), "another version of suite"),
        ({"schema_version": 2}, (), "not a valid baseline"),
        ({}, ("--update",), "would lose a, b"),
        ({}, ("--seeds", "0"), None),
        ({}, ("--methods", "dlm"), "Did you mean 'dml'?"),
    ],
)
def test_mistakes_are_one_sentence(gate, stored, change, arguments, words):
    Path("stored.json").write_text(json.dumps(stored.model_dump(mode="json") | change))
    kept = Path("kept/tiny/resnet8/c/seed0.json")
    kept.parent.mkdir(parents=True)
    kept.touch()
    code, _, err = gate("--baseline", "stored.json", *arguments)
    assert code == 2 and "Traceback" not in err
    if words:
        assert is_one_sentence(err) and words in err


def test_agreement_correlates_the_ranks_of_means_over_seeds():
    short = [made(method, top1=top1) for method, top1 in zip("abcd", (1, 2, 3, 4), strict=True)]
    means = zip("abce", (70, 90, 80, 1), strict=True)
    full = [made(method, top1=top1, suite=CIFAR) for method, top1 in means]
    full.append(made("b", seed=1, top1=50, suite=CIFAR))  # the mean of b is 70, like that of a

    def lines(*results) -> list[str]:
        return agreement(results, "cifar100-reduced", "cifar100").splitlines()

    (line,) = lines(*short, *full)
    rho = stats.spearmanr([1, 2, 3], [70, 70, 80]).statistic
    assert line.startswith(f"resnet20: Spearman's rho {rho:.2f} ") and "over 3 methods" in line
    assert "2 methods have both, 3 are needed" in lines(*short[:2], *full)[0]
    assert "no method has" in lines(*short[3:], *full)[0]
    others = [
        run.model_copy(update={"identity": run.identity.model_copy(update={"architecture": "z"})})
        for run in [*short[1:], *full, made("a", top1=1)]
    ]
    mixed, comparable = lines(
        short[0].model_copy(update={"harness": 2}), *short[1:], *full, *others
    )
    assert mixed.startswith("resnet20: n/a") and "harness" in mixed and "z: " in comparable


def test_agreement_reports_missing_results(kdbench):
    code, out, _ = kdbench("gate", "--agreement", "cifar100", "--suite", "cifar100-reduced")
    assert (code, out) == (0, "n/a: no results of 'cifar100'.\n")
    assert agreement([], "short", "full") == "n/a: no results of 'full'."
