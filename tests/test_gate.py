"""kdbench gate: verdicts, tolerances, exit codes, what it writes and what it refuses."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import is_one_sentence
from scipy import stats

from kdbench.bench import command as bench_command
from kdbench.bench.record import Spread
from kdbench.discovery import find_methods
from kdbench.engine.result_builder import empty_result
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError
from kdbench.gate import command, measure
from kdbench.gate.compare import FALSE_ALARM_RATE, STEP_FLOOR, Finding, compare, loss_distance
from kdbench.gate.record import Baseline, Entry, Rounding, StepFigures, Trace, read_baseline
from kdbench.gate.tables import verdict
from kdbench.report.analysis.schedule_agreement import agreement
from kdbench.results.schema import Cost, Metrics, Result

TORCH = torch.__version__
TOP1 = (90.0, 92.0, 94.0)
STEP = StepFigures(
    ratio=Spread(median=1.2, quartiles=(1.19, 1.21)),
    rounds=10,
    peak_memory_bytes=100 * 2**20,
    bytes=10**9,
)


def trace(top1: float, shift: float = 0.0, **terms: float) -> Trace:
    losses = {name: [value * (1 + shift)] * 2 for name, value in ({"ce": 2.0} | terms).items()}
    return Trace(top1={"student": top1}, losses=losses, evaluation={"student": [2.3, 2.2]})


def entry(method: str = "a", **changes: object) -> Entry:
    made = Entry(
        architecture="resnet8",
        method=method,
        method_hash="0",
        traces={seed: trace(top1) for seed, top1 in enumerate(TOP1)},
        training_flops=10**9,
        step=STEP,
        rounding=Rounding(losses=[1e-5, 1e-4], evaluation=[1e-5, 1e-4]),
    )
    return made.model_copy(update=changes)


@pytest.fixture
def stored(made) -> Baseline:
    return made.model_copy(update={"entries": [entry("a"), entry("b")]})


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Baseline:
    """A baseline of the tiny suite, made for the environment it holds."""
    from kdbench.engine.device import make_accelerator
    from kdbench.engine.environment import environment

    return Baseline(
        suite="tiny",
        suite_hash="0",
        epochs=2,
        seeds=3,
        harness_version=1,
        against="independent",
        environment=environment(make_accelerator(cpu=True).device, 1, "fp32", "kdbench gate"),
        entries=[],
    )


def test_another_torch_may_move_other_bytes(stored):
    findings = compare(stored, [entry("a"), entry("b")], None, "0.0")
    assert len(findings) == 2 * 6 and not any("GB" in finding.measure for finding in findings)


def judged(stored: Baseline, new: Entry, measure: str) -> Finding:
    (found,) = [
        f for f in compare(stored, [new], {new.method}, TORCH) if f.measure.startswith(measure)
    ]
    return found


def test_what_did_not_move_is_identical(stored):
    findings = compare(stored, [entry("a"), entry("b")], None, TORCH)
    assert {f.verdict for f in findings} == {"same"} and all(f.identical for f in findings)
    assert len(findings) == 2 * 7
    assert verdict(findings) == "No regression: 14 measures: 14 same, 14 of them identical."


def test_another_hash_with_the_same_numbers_is_the_same(stored):
    findings = compare(stored, [entry("a", method_hash="1"), entry("b")], None, TORCH)
    assert {f.verdict for f in findings} == {"same"}


def test_methods_come_and_go(stored):
    findings = compare(stored, [entry("a"), entry("c")], None, TORCH)
    assert [(f.method, f.verdict) for f in findings if f.measure == "method"] == [
        ("b", "missing"),
        ("c", "new"),
    ]
    only = compare(stored, [entry("a")], {"a"}, TORCH)  # b was not asked for
    assert {f.method for f in only} == {"a"}
    assert "REGRESSION" in verdict(findings) and "REGRESSION" not in verdict(only)


def test_a_run_that_did_not_finish_fails(stored):
    new = entry("a", traces={0: trace(90.0)}, unfinished={1: "diverged: 'ce' is nan in epoch 1"})
    found = judged(stored, new, "seed 1")
    assert found.verdict == "failed" and "nan" in found.now


def test_accuracy_has_the_tolerance_of_a_prediction_interval_over_pooled_seeds(stored):
    """Standard deviation 2 in both methods, so 4 degrees of freedom; 2 methods x 2 roles."""
    tolerance = stats.t.isf(FALSE_ALARM_RATE / 4 / 2, 4) * 2.0 * math.sqrt(2 / 3)
    for shift, expected in (
        (-1.01 * tolerance, "worse"),
        (-0.99 * tolerance, "same"),
        (1.01 * tolerance, "better"),
    ):
        traces = {seed: trace(top1 + shift) for seed, top1 in enumerate(TOP1)}
        alone = compare(stored, [entry("a", traces=traces), entry("b")], None, TORCH)
        found = next(f for f in alone if f.method == "a" and f.measure == "student top-1 %")
        assert found.verdict == expected
        assert float(found.tolerance) == pytest.approx(tolerance, abs=0.01)


def test_a_spread_is_of_all_methods_whichever_were_asked_for(stored):
    tolerance = (
        stats.t.isf(FALSE_ALARM_RATE / 2 / 2, 4) * 2.0 * math.sqrt(2 / 3)
    )  # 1 method x 2 roles
    found = judged(stored, entry("a"), "student top-1")
    assert float(found.tolerance) == pytest.approx(tolerance, abs=0.01)


def test_accuracy_is_compared_over_the_seeds_that_both_have(stored):
    found = judged(stored, entry("a", traces={2: trace(94.0)}), "student top-1")
    assert found.identical and found.baseline == "94.00"


def test_one_seed_has_no_spread_to_judge_accuracy_by(stored):
    one = stored.model_copy(update={"entries": [entry("a", traces={0: trace(90.0)})]})
    found = judged(one, entry("a", traces={0: trace(10.0)}), "student top-1")
    assert found.verdict == "same" and found.tolerance == "n/a (one seed)"


def test_losses_are_changed_where_every_seed_moved_further_than_rounding(stored):
    def shifted(*shifts: float) -> Entry:
        pairs = enumerate(zip(TOP1, shifts, strict=True))
        return entry("a", traces={seed: trace(top1, shift) for seed, (top1, shift) in pairs})

    assert judged(stored, shifted(2e-4, 3e-4, 4e-4), "training losses").verdict == "changed"
    assert judged(stored, shifted(-2e-4, 3e-4, 4e-4), "training losses").verdict == "changed"
    flipped = judged(stored, shifted(0.5, 0.5, 2e-5), "training losses")  # not every seed
    assert flipped.verdict == "same" and not flipped.identical
    assert judged(stored, shifted(0.5, 0.5, 0.5), "evaluation losses").identical


def test_a_small_term_counts_as_much_as_a_large_one():
    before, after = {"ce": [2.0], "kl": [1e-6]}, {"ce": [2.0], "kl": [2e-6]}
    assert loss_distance(before, after, 0) == pytest.approx(math.sqrt(1 / 2))
    assert loss_distance({"off": [0.0]}, {"off": [0.0]}, 0) == 0


def test_terms_that_came_or_went_are_named(stored):
    traces = {seed: trace(top1, kl=1.0) for seed, top1 in enumerate(TOP1)}
    found = judged(stored, entry("a", traces=traces), "training losses")
    assert (
        found.verdict == "changed"
        and found.now == "added: kl"
        and found.baseline == "removed: none"
    )


@pytest.mark.parametrize(
    ("flops", "verdict"), [(10**9 + 1, "worse"), (10**9 - 1, "better"), (10**9, "same")]
)
def test_counted_work_has_no_tolerance(stored, flops, verdict):
    assert judged(stored, entry("a", training_flops=flops), "training GFLOP").verdict == verdict
    step = STEP.model_copy(update={"bytes": flops})
    assert judged(stored, entry("a", step=step), "GB a step").verdict == verdict


def test_step_times_are_judged_by_the_spread_of_their_windows(stored):
    def timed(median: float, low: float, high: float) -> str:
        step = STEP.model_copy(update={"ratio": Spread(median=median, quartiles=(low, high))})
        return judged(stored, entry("a", step=step), "step time").verdict

    slow = 1.2 * (1 + STEP_FLOOR) + 0.01
    assert timed(slow, slow - 0.01, slow + 0.01) == "worse"
    assert timed(slow, slow - 0.5, slow + 0.5) == "same"  # the machine did something else
    assert timed(slow - 0.02, slow - 0.03, slow - 0.01) == "same"
    assert timed(0.8, 0.79, 0.81) == "better"


@pytest.mark.parametrize(("grown", "verdict"), [(1.51, "worse"), (1.49, "same"), (0.49, "better")])
def test_memory_has_a_margin(stored, grown, verdict):
    step = STEP.model_copy(update={"peak_memory_bytes": round(grown * STEP.peak_memory_bytes)})
    assert judged(stored, entry("a", step=step), "step memory").verdict == verdict


@pytest.fixture
def gate(kdbench, monkeypatch):
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    monkeypatch.setattr(measure, "ROUNDS", 2)
    # A busy machine's steps are worse, whatever the code.
    monkeypatch.setattr(bench_command, "_window", lambda subject: (subject.spec.networks, 0.1))
    # The checkout of whoever runs the tests may have changes.
    monkeypatch.setattr(command, "environment", _clean(command.environment))
    return lambda *arguments: kdbench(
        "gate", "--suite", "tiny.toml", "--methods", "baseline,dml", *arguments
    )


def _clean(environment):
    return lambda *arguments: environment(*arguments).model_copy(update={"dirty": False})


def test_a_gate_end_to_end(gate, monkeypatch):
    file = Path("results/gate/tiny.json")
    code, out, err = gate()
    assert code == 2 and is_one_sentence(err) and "--update" in err and not out

    assert gate("--update", "--seeds", "1")[0] == 0
    stored = read_baseline(file)
    assert stored.seeds == 1 and [e.method for e in stored.entries] == ["baseline", "dml"]
    assert all(e.rounding and len(e.rounding.losses) == 8 for e in stored.entries)
    assert all(e.step and e.step.ratio.median > 0 for e in stored.entries)
    before = file.read_bytes()

    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    code, out, _ = gate()
    rows = [line.split() for line in out.splitlines() if line.startswith(("baseline ", "dml "))]
    assert code == 0 and "No regression" in out
    assert {r[-1] for r in rows if "time" not in r and "memory" not in r} == {"identical"}
    assert "| baseline | " in " ".join(Path("summary.md").read_text().split())

    worse = json.loads(before)
    for run in worse["entries"][1]["traces"].values():
        run["losses"]["kl/student"] = [2 * x for x in run["losses"]["kl/student"]]
    file.write_text(json.dumps(worse))
    code, out, _ = gate()
    assert code == 1 and "REGRESSION" in out
    assert [r[0] for r in rows_of(out, "changed")] == ["dml"]
    assert json.loads(file.read_text()) == worse  # a gate never rewrites its baseline
    assert not Path("runs").exists() and not list(Path("results").glob("tiny*"))

    code, out, _ = gate("--update")
    assert code == 0 and "REGRESSION" in out  # the differences are shown
    losses = [[run.losses for run in e.traces.values()] for e in read_baseline(file).entries]
    assert losses == [[run.losses for run in e.traces.values()] for e in stored.entries]


def rows_of(table: str, verdict: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines() if line.endswith(verdict)]


def test_an_update_from_changed_code_is_refused(gate, monkeypatch):
    dirty = _clean(command.environment)
    monkeypatch.setattr(
        command, "environment", lambda *a: dirty(*a).model_copy(update={"dirty": True})
    )
    code, _, err = gate("--update")
    assert code == 2 and is_one_sentence(err) and "commit" in err
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("change", "arguments", "complaint"),
    [
        ({}, ("--update", "--architectures", "wrn16-2", "--methods", "all"), "lose resnet8"),
        ({}, ("--results-dir", "kept"), "'kept' holds results"),
        ({}, (), "another version of suite"),
        ({"schema_version": 2}, (), "not a valid baseline"),
        ({}, ("--update",), "would lose c"),
        ({}, ("--seeds", "0"), None),
        ({}, ("--methods", "dlm"), "Did you mean 'dml'?"),
    ],
)
def test_mistakes_are_one_sentence(gate, made, change, arguments, complaint):
    stored = made.model_copy(update={"entries": [entry("c")]})
    Path("stored.json").write_text(json.dumps(stored.model_dump(mode="json") | change))
    kept = Path("kept/tiny/resnet8/c/seed0.json")
    kept.parent.mkdir(parents=True)
    kept.touch()
    code, _, err = gate("--baseline", "stored.json", *arguments)
    assert code == 2 and "Traceback" not in err
    if complaint:
        assert is_one_sentence(err) and complaint in err


def test_unfinished_runs_make_no_baseline():
    broken = entry("a", unfinished={1: "failed: it broke"})
    with pytest.raises(UserError, match="a resnet8 seed 1 failed: it broke"):
        command._check_finished([broken])


@pytest.fixture
def result(suite, accelerator):
    (method,) = find_methods(["baseline"])
    spec = RunSpec(suite, "resnet8", method, method.options({}), 0)
    empty = empty_result(spec, accelerator, "failed")
    cost = Cost(
        images_per_second=None,
        step_milliseconds=None,
        training_seconds=1.0,
        evaluation_seconds=1.0,
        peak_memory_bytes=1,
        peak_memory_kind="process",
        parameters_trained=1,
        parameters_deployed=1,
        student_forward_flops=1,
    )

    def make(suite: str, method: str, top1: float, seed: int = 0) -> Result:
        changes = {"suite": suite, "method": method, "seed": seed}
        identity = empty.identity.model_copy(update=changes)
        last = {"student": Metrics(top1=top1, top5=99.0, loss=1.0)}
        return empty.model_copy(
            update={"status": "finished", "identity": identity, "last": last, "cost": cost}
        )

    return make


def test_agreement_is_of_the_ranks_of_means_over_seeds(result):
    short = [result("short", m, top1) for m, top1 in zip("abcd", (1.0, 2.0, 3.0, 4.0), strict=True)]
    full = [
        result("full", m, top1) for m, top1 in zip("abce", (70.0, 90.0, 80.0, 1.0), strict=True)
    ]
    full.append(result("full", "b", 50.0, seed=1))  # b: 70, as a
    found = agreement([*short, *full], "short", "full")
    rho = stats.spearmanr([1, 2, 3], [70, 70, 80]).statistic
    assert found.startswith(f"resnet8: Spearman's rho {rho:.2f} ") and "over 3 methods" in found
    assert "2 methods have both, 3 are needed" in agreement([*short[:2], *full], "short", "full")
    assert "no method has" in agreement([*short[3:], *full], "short", "full")
    short[0] = short[0].model_copy(update={"harness": 2})
    others = [
        run.model_copy(
            update={"identity": run.identity.model_copy(update={"architecture": "wrn16-2"})}
        )
        for run in [*short[1:], *full]
    ]
    mixed, whole = agreement([*short, *full, *others], "short", "full").splitlines()
    assert mixed.startswith("resnet8: n/a: results are of several") and "wrn16-2" in whole


def test_agreement_says_what_is_missing(kdbench):
    code, out, _ = kdbench("gate", "--agreement", "cifar100", "--suite", "cifar100-reduced")
    assert (code, out) == (0, "n/a: no results of 'cifar100'.\n")
    assert agreement([], "short", "full") == "n/a: no results of 'full'."
