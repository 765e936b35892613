"""kdbench gate: verdicts, tolerances, exit codes, what it writes and what it refuses."""

import json
import math
from pathlib import Path

import pytest
from conftest import is_one_sentence, slow_except
from made_results import CIFAR, made
from scipy import stats

from kdbench.bench import command as bench_command
from kdbench.bench.record import Spread
from kdbench.errors import UserError
from kdbench.gate import command, measure
from kdbench.gate.compare import FALSE_ALARM_RATE, MIN_STEP_TIME_TOLERANCE, compare, loss_distance
from kdbench.gate.record import Baseline, Entry, Rounding, StepMeasurement, Trace, read_baseline
from kdbench.gate.tables import summarize
from kdbench.report.analysis.schedule_agreement import agreement

FILE = Path(__file__).parents[1] / "results/gate/digits.json"
COMMITTED = read_baseline(FILE)
TOP1 = (90.0, 92.0, 94.0)


def make_step(ratio: float = 1.2, margin: float = 0.01, mib: float = 100, work: int = 10**9):
    return StepMeasurement(
        ratio=Spread(median=ratio, quartiles=(ratio - margin, ratio + margin)),
        rounds=10,
        peak_memory_bytes=round(mib * 2**20),
        bytes=work,
    )


def make_traces(*shifts: float, top1: float = 0.0, **terms: float) -> dict[int, Trace]:
    """Traces of three seeds, with two steps, shifted accuracies and relatively shifted losses."""
    losses = {"ce": 2.0} | terms
    return {
        seed: Trace(
            top1={"student": value + top1},
            losses={name: [value * (1 + shift)] * 2 for name, value in losses.items()},
            evaluation={"student": [2.3, 2.2]},
        )
        for seed, (value, shift) in enumerate(zip(TOP1, shifts or (0.0, 0.0, 0.0), strict=True))
    }


def make_entry(method: str = "a", **changes: object) -> Entry:
    entry = Entry(
        architecture="resnet8",
        method=method,
        method_hash="0",
        traces=make_traces(),
        training_flops=10**9,
        step=make_step(),
        rounding=Rounding(losses=[1e-5, 1e-4], evaluation=[1e-5, 1e-4]),
    )
    return entry.model_copy(update=changes)


STORED = COMMITTED.model_copy(update={"entries": [make_entry("a"), make_entry("b")]})


def compare_all(entries: list[Entry], methods: set[str] | None = None, stored: Baseline = STORED):
    return compare(stored, entries, methods, stored.environment.torch)


def compare_measure(measure: str, stored: Baseline = STORED, **changes: object):
    """Return the comparison of one measure of method a, with changes to its entry."""
    comparisons = compare_all([make_entry("a", **changes)], {"a"}, stored)
    (comparison,) = [c for c in comparisons if c.measure.startswith(measure)]
    return comparison


def test_the_committed_baseline_is_identical_to_itself():
    assert json.loads(COMMITTED.model_dump_json()) == json.loads(FILE.read_text())
    comparisons = compare_all(COMMITTED.entries, stored=COMMITTED)
    assert all(comparison.identical for comparison in comparisons)
    assert list(dict.fromkeys(comparison.measure for comparison in comparisons)) == [
        *("student top-1 %", "training losses, step 1", "evaluation losses, step 1"),
        *("training GFLOP", "GB per step", "step time ratio", "step memory MiB"),
        "ensemble top-1 %",
    ]


def test_equal_numbers_are_identical_whatever_the_hash_of_the_source():
    new = [make_entry("a", method_hash="1"), make_entry("b")]
    comparisons = compare_all(new)
    assert [(c.verdict, c.identical) for c in comparisons] == [("same", True)] * 2 * 7
    summary = summarize(comparisons)
    assert summary == "No regression: 14 measures: 14 same, 14 of them identical."
    other_torch = compare(STORED, new, None, "0.0")  # may move other bytes
    assert len(other_torch) == 2 * 6 and not any("GB" in c.measure for c in other_torch)


def test_missing_new_and_unfinished_methods_are_reported():
    comparisons = compare_all([make_entry("a"), make_entry("c")])
    verdicts = [(c.method, c.verdict) for c in comparisons if c.measure == "method"]
    assert verdicts == [("b", "missing"), ("c", "new")]
    only = compare_all([make_entry("a")], {"a"})  # b was not requested
    assert {c.method for c in only} == {"a"}
    assert "REGRESSION" in summarize(comparisons) and "REGRESSION" not in summarize(only)
    failed = compare_measure("seed 1", traces={}, unfinished={1: "diverged: loss is nan"})
    assert failed.verdict == "failed" and "nan" in failed.now


def test_accuracy_has_the_tolerance_of_a_prediction_interval_over_pooled_seeds():
    """Both methods have a standard deviation of 2, so there are 4 degrees of freedom."""

    def tolerance(comparisons: int) -> float:
        return stats.t.isf(FALSE_ALARM_RATE / comparisons / 2, 4) * 2.0 * math.sqrt(2 / 3)

    for share, expected in ((-1.01, "worse"), (-0.99, "same"), (1.01, "better")):
        shifted = make_entry("a", traces=make_traces(top1=share * tolerance(4)))
        result = compare_all([shifted, make_entry("b")])[0]  # 2 methods x 2 roles
        assert (result.measure, result.verdict) == ("student top-1 %", expected)
        assert float(result.tolerance) == pytest.approx(tolerance(4), abs=0.01)
    # If one method is requested, the spread is still that of all methods.
    alone = compare_measure("student top-1")
    assert float(alone.tolerance) == pytest.approx(tolerance(2), abs=0.01)


def test_accuracy_is_compared_over_common_seeds():
    last = {2: make_traces()[2]}
    common = compare_measure("student top-1", traces=last)
    assert common.identical and common.baseline == "94.00"
    one = STORED.model_copy(update={"entries": [make_entry("a", traces=last)]})
    single = compare_measure("student top-1", one, traces={2: make_traces(top1=-80)[2]})
    assert single.verdict == "same" and single.tolerance == "n/a (one seed)"


SLOW = 1.2 * (1 + MIN_STEP_TIME_TOLERANCE) + 0.01


@pytest.mark.parametrize(
    ("measure", "changes", "verdict"),
    [
        ("training GFLOP", {"training_flops": 10**9 + 1}, "worse"),
        ("training GFLOP", {"training_flops": 10**9 - 1}, "better"),
        ("GB per step", {"step": make_step(work=10**9 + 1)}, "worse"),
        ("GB per step", {"step": make_step(work=10**9 - 1)}, "better"),
        ("step time", {"step": make_step(SLOW)}, "worse"),
        ("step time", {"step": make_step(SLOW, margin=0.5)}, "same"),  # the machine was busy
        ("step time", {"step": make_step(SLOW - 0.02)}, "same"),
        ("step time", {"step": make_step(0.8)}, "better"),
        ("step memory", {"step": make_step(mib=151)}, "worse"),
        ("step memory", {"step": make_step(mib=149)}, "same"),
        ("step memory", {"step": make_step(mib=49)}, "better"),
        ("training losses", {"traces": make_traces(2e-4, 3e-4, 4e-4)}, "changed"),
        ("training losses", {"traces": make_traces(-2e-4, 3e-4, 4e-4)}, "changed"),
        ("training losses", {"traces": make_traces(0.5, 0.5, 2e-5)}, "same"),  # in two seeds only
        ("evaluation losses", {"traces": make_traces(0.5, 0.5, 0.5)}, "identical"),
    ],
)
def test_a_measure_fails_beyond_its_tolerance(measure, changes, verdict):
    comparison = compare_measure(measure, **changes)
    assert ("identical" if comparison.identical else comparison.verdict) == verdict


def test_added_loss_terms_are_named_and_small_ones_count_as_much_as_large_ones():
    added = compare_measure("training losses", traces=make_traces(kl=1.0))
    assert added.verdict == "changed" and "kl" in added.now and "none" in added.baseline
    before, after = {"ce": [2.0], "kl": [1e-6]}, {"ce": [2.0], "kl": [2e-6]}
    assert loss_distance(before, after, 0) == pytest.approx(math.sqrt(1 / 2))
    assert loss_distance({"off": [0.0]}, {"off": [0.0]}, 0) == 0


@pytest.fixture
def gate(kdbench, monkeypatch):
    """Run `kdbench gate` on the tiny suite, as if from a clean checkout on a quiet machine."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.setattr(measure, "ROUNDS", 2)
    monkeypatch.setattr(bench_command, "_window", lambda subject: (subject.spec.networks, 0.1))
    monkeypatch.setattr(command, "environment", lambda *arguments: COMMITTED.environment)
    options = ("gate", "--suite", "tiny.toml", "--methods", "baseline,dml")
    return lambda *arguments: kdbench(*options, *arguments)


@pytest.mark.parametrize(
    "methods", slow_except([["baseline"]], [["baseline"], ["baseline", "dml"]])
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
    assert [e.traces for e in read_baseline(file).entries] == [e.traces for e in stored.entries]


def test_only_committed_code_and_finished_runs_make_a_baseline(gate, monkeypatch):
    dirty = COMMITTED.environment.model_copy(update={"dirty": True})
    monkeypatch.setattr(command, "environment", lambda *arguments: dirty)
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
def test_mistakes_print_one_sentence(gate, change, arguments, words):
    Path("stored.json").write_text(json.dumps(STORED.model_dump(mode="json") | change))
    kept = Path("kept/tiny/resnet8/c/seed0.json")
    kept.parent.mkdir(parents=True)
    kept.touch()
    code, _, err = gate("--baseline", "stored.json", *arguments)
    assert code == 2 and "Traceback" not in err
    if words:
        assert is_one_sentence(err) and words in err


def test_agreement_correlates_the_ranks_of_means_over_seeds(kdbench):
    def results(**identity: str):
        short = zip("abcd", (1, 2, 3, 4), strict=True)
        full = zip("abbce", (0, 0, 1, 0, 0), (70, 90, 50, 80, 1), strict=True)
        return (
            [made(method, top1=top1, **identity) for method, top1 in short],
            [made(method, seed, top1, suite=CIFAR, **identity) for method, seed, top1 in full],
        )

    def lines(*results) -> list[str]:
        return agreement(results, "cifar100-reduced", "cifar100").splitlines()

    short, full = results()
    (line,) = lines(*short, *full)
    rho = stats.spearmanr([1, 2, 3], [70, 70, 80]).statistic  # the mean of b is that of a
    assert line.startswith(f"resnet20: Spearman's rho {rho:.2f} ") and "over 3 methods" in line
    assert "2 methods have both, 3 are needed" in lines(*short[:2], *full)[0]
    assert "no method has" in lines(*short[3:], *full)[0]
    short[0] = short[0].model_copy(update={"harness": 2})
    others, full_others = results(architecture="z")
    mixed, comparable = lines(*short, *full, *others, *full_others)
    assert mixed.startswith("resnet20: n/a") and "harness" in mixed and "z: " in comparable

    code, out, _ = kdbench("gate", "--agreement", "cifar100", "--suite", "cifar100-reduced")
    assert (code, out) == (0, "n/a: no results of 'cifar100'.\n")
    assert agreement([], "short", "full") == "n/a: no results of 'full'."
