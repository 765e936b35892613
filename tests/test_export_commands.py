"""`kdbench export` and `kdbench evaluate`: what they print and write, and what they refuse."""

import importlib.util
import io
import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import is_one_sentence
from made_results import metrics, one_epoch

from kdbench.export.formats import FORMATS, KEY
from kdbench.results.files import read_result, write_result
from kdbench.results.schema import Result

RUN = "digits@epochs=1/resnet8/baseline/seed0"
RESULT = Path("results", f"{RUN}.json")
ELSEWHERE = {
    "suite": "elsewhere",
    "suite_hash": "0",
    "architecture": "resnet8",
    "method": "baseline",
    "method_hash": "0",
    "seed": 0,
}
FILE = Path("digits@epochs=1-resnet8-baseline-seed0.safetensors")
CUSTOM = """
from torch import nn
from kdbench.methods.baseline import Baseline

class Doubled(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        features = self.network(images)
        return features._replace(logits=2 * features.logits)

class Custom(Baseline):
    def predict(self, images):
        return {"student": self.student()(images).logits}

    def student(self):
        return Doubled(self.network)
"""


@pytest.fixture(scope="module")
def once(tmp_path_factory) -> Path:
    """Where one run was trained."""
    return tmp_path_factory.mktemp("once")


@pytest.fixture
def ran(kdbench, once):
    """The command, in a folder where that run has its result and checkpoint."""
    if not (once / "runs").exists():
        assert kdbench("run", "--methods", "baseline", "--epochs", "1")[0] == 0
        for name in ("runs", "results"):
            shutil.copytree(name, once / name)
    else:
        shutil.copytree(once, Path(), dirs_exist_ok=True)
    return kdbench


def change_result(**changes: object) -> None:
    result = read_result(RESULT)
    assert isinstance(result, Result)
    write_result(Path("results"), result.model_copy(update=changes))


def refused(outcome: tuple[int, str, str], *words: str) -> bool:
    code, _, error = outcome
    return code == 2 and is_one_sentence(error) and all(word in error for word in words)


@pytest.mark.parametrize("run", [RUN, str(RESULT), f"runs/{RUN}", f"runs/{RUN}/"])
def test_a_run_is_named_in_three_ways(ran, run):
    code, out, error = ran("export", run)
    assert (code, error) == (0, "")
    assert out.count("\n") == 1 and str(FILE) in out
    assert FILE.exists() and FILE.with_name(f"{FILE.name}.md").exists()


def test_a_file_is_not_replaced_unless_asked(ran):
    output = ("--output", "deep/folder/student.safetensors")
    assert ran("export", RUN, *output)[0] == 0
    file = Path(output[1])
    file.write_bytes(b"old")
    assert refused(ran("export", RUN, *output), "exists", "--overwrite")
    assert file.read_bytes() == b"old"
    assert ran("export", RUN, *output, "--overwrite")[0] == 0
    assert file.read_bytes() != b"old"
    assert refused(ran("export", RUN, "--output", "a.onnx"), ".safetensors")


def test_evaluation_agrees_with_the_run_or_fails(ran):
    ran("export", RUN)
    code, out, error = ran("evaluate", str(FILE))
    assert (code, error) == (0, "")
    top1 = read_result(RESULT).last["student"].top1
    assert out.count(f"top-1 {top1:.2f} %") == 2 and "360 images" in out and "agree" in out
    assert ran("evaluate", str(FILE), "--suite", "digits")[0] == 0

    Path("digits2.toml").write_text('version = 1\nextends = "digits"\ndescription = ""\n')
    code, out, _ = ran("evaluate", str(FILE), "--suite", "./digits2.toml")
    assert code == 0 and "nothing to compare" in out

    state = safetensors.torch.load_file(FILE)
    state["branch.classifier.bias"] += torch.linspace(0, 9, 10)
    with safetensors.safe_open(FILE, "pt") as content:
        metadata = content.metadata()
    safetensors.torch.save_file(state, FILE, metadata)
    code, out, error = ran("evaluate", str(FILE))
    assert code == 1 and is_one_sentence(error) and "differ" in error


def test_the_model_card_tells_what_was_measured(ran):
    result = read_result(RESULT)
    ran("export", RUN, "--format", "pt2", "--output", "one")
    (card,) = (file.read_text() for file in Path("one").glob("*.md"))
    student = result.last["student"]
    for text in (f"{student.top1:.2f} %", "78,042", "1 epoch,", result.environment.command):
        assert text in card
    assert f"{result.cost.student_forward_flops:,}" in card and "±" not in card
    assert str(Path.cwd()) not in card

    for seed, top1 in ((1, student.top1 + 2), (2, student.top1 + 4)):
        identity = result.identity.model_copy(update={"seed": seed})
        change_result(identity=identity, **one_epoch({"student": metrics(top1)}))
    other = result.identity.model_copy(update={"seed": 3, "method_hash": "another"})
    change_result(identity=other)
    ran("export", RUN, "--format", "pt2", "--output", "three")
    (card,) = (file.read_text() for file in Path("three").glob("*.md"))
    assert f"over 3 seeds | {student.top1 + 2:.2f} ± 2.00 %" in card


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ("nonsense", "is no run"),
        ("digits/resnet8/dml/0.5", "is no run"),
        ("digits/resnet8/dml/seed7", "There is no result"),
    ],
)
def test_what_is_no_run_is_one_sentence(kdbench, run, words):
    assert refused(kdbench("export", run), words)


def test_weights_that_are_gone_or_of_another_training_are_not_exported(ran):
    (checkpoint,) = Path("runs", RUN).glob("checkpoint*.pt")
    whole = checkpoint.read_bytes()
    again = "kdbench run --suite digits --methods baseline"
    checkpoint.write_bytes(whole[:1000])
    assert refused(ran("export", RUN), "not here", again)
    checkpoint.unlink()
    assert refused(ran("export", RUN), "not here", again)
    checkpoint.write_bytes(whole)
    result = read_result(RESULT)
    change_result(notes={"images": "prepared"})
    assert refused(ran("export", RUN), "not here", again)
    epoch = result.history[0].model_copy(update={"learning_rate": 1.0})
    change_result(notes={}, history=[epoch])
    assert refused(ran("export", RUN), "not of the training", again)
    change_result(history=result.history, status="diverged")
    assert refused(ran("export", RUN), "diverged")
    change_result(fingerprint="another", status="finished")
    assert refused(ran("export", RUN), "--overwrite-stale")
    assert not FILE.exists()


def test_a_method_of_ones_own_is_named_by_its_file(kdbench):
    Path("custom.py").write_text(CUSTOM)
    kdbench("run", "--methods", "./custom.py", "--epochs", "1")
    run = RUN.replace("baseline", "custom")
    assert refused(kdbench("export", run), "--method ./custom.py")
    named = ("export", run, "--method", "custom.py")
    assert refused(kdbench(*named), "another network than the name resnet8", "onnx or pt2")
    assert kdbench(*named, "--format", "pt2", "--output", "custom.pt2")[0] == 0
    assert kdbench("evaluate", "custom.pt2")[0] == 0


def test_onnx_is_an_extra(ran, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if "onnx" in name else find(name, *a)
    )
    assert refused(ran("export", RUN, "--format", "onnx"), "pip install 'kdbench[onnx]'")
    Path("a.onnx").write_bytes(b"")
    assert refused(ran("evaluate", "a.onnx"), "pip install 'kdbench[onnx]'")


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_no_export_is_one_sentence(ran, form):
    ran("export", RUN, "--format", form, "--output", f"whole.{form}")
    whole = Path(f"whole.{form}").read_bytes()
    file = Path(f"bad.{form}")
    assert refused(ran("evaluate", str(file)), "does not exist")
    for content in (b"", b"nonsense", whole[: len(whole) // 2], whole[:-100]):
        file.write_bytes(content)
        assert refused(ran("evaluate", str(file)), "'bad.")
    assert refused(ran("evaluate", "results"), "none of .safetensors, .onnx, .pt2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "resnet9"}, "Unknown architecture 'resnet9'. Did you mean"),
        ({"architecture": "resnet20"}, "weights of a resnet20"),
        ({"classes": 10**12}, f"{10**12} classes"),
        ({"classes": "10"}, "classes: "),
        ({"std": [0.1, 0.2, 0.0]}, "std.2: "),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"identity": {}}, "'identity.suite' is missing"),
        ({"identity": ELSEWHERE}, "--suite ./elsewhere.toml"),
    ],
)
def test_a_card_is_not_believed(ran, change, words):
    ran("export", RUN)
    with safetensors.safe_open(FILE, "pt") as content:
        card = json.loads(content.metadata()[KEY])
    card |= change
    safetensors.torch.save_file(safetensors.torch.load_file(FILE), FILE, {KEY: json.dumps(card)})
    assert refused(ran("evaluate", str(FILE)), words)
    safetensors.torch.save_file(safetensors.torch.load_file(FILE), FILE)
    assert refused(ran("evaluate", str(FILE)), "no card")


def test_a_pt2_file_with_a_card_and_a_damaged_graph_is_one_sentence(ran):
    ran("export", RUN, "--format", "pt2", "--output", "whole.pt2")
    with zipfile.ZipFile("whole.pt2") as whole, zipfile.ZipFile("bad.pt2", "w") as bad:
        for name in whole.namelist():
            damaged = name.endswith("models/model.json")
            bad.writestr(name, whole.read(name)[: 1000 if damaged else None])
    assert refused(ran("evaluate", "bad.pt2"), "cannot be opened")


def test_a_foreign_pt2_file_is_refused_before_it_is_unpickled(kdbench):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data/sample_inputs/model.pt", pickle.dumps(sys.exit))
    Path("foreign.pt2").write_bytes(stream.getvalue())
    assert refused(kdbench("evaluate", "foreign.pt2"), "no card")


def test_a_failed_write_leaves_nothing(ran):
    Path("file").write_text("")
    assert refused(ran("export", RUN, "--output", "file/student.safetensors"), "Cannot write")
    assert list(Path().rglob("*.tmp")) == []
