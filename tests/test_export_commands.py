"""`kdbench export` and `kdbench evaluate`: output, files written, and rejected input."""

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

from kdbench.export.formats import CARD_KEY, FORMATS, MAX_CARD_BYTES
from kdbench.results.files import read_result, write_result

RUN = "digits@epochs=1/resnet8/baseline/seed0"
RESULT = Path("results", f"{RUN}.json")
FILE = "digits@epochs=1-resnet8-baseline-seed0.safetensors"
CUSTOM = """
from torch import nn
from kdbench.methods.baseline import Baseline

class Custom(Baseline):
    def __init__(self, cohort, options):
        super().__init__(cohort, options)
        self.network.branch.classifier = nn.Linear(64, 10, bias=False)
"""


@pytest.fixture
def trained(kdbench, tmp_path_factory):
    """The command, in a folder with the result and the checkpoint of one run."""
    cache = tmp_path_factory.getbasetemp() / "trained"
    if not cache.exists():
        assert kdbench("run", "--methods", "baseline", "--epochs", "1")[0] == 0
        shutil.copytree(Path(), cache)
    shutil.copytree(cache, Path(), dirs_exist_ok=True)
    return kdbench


def change_result(**changes: object) -> None:
    write_result(Path("results"), read_result(RESULT).model_copy(update=changes))


def read_card() -> dict:
    with safetensors.safe_open(FILE, "pt") as content:
        return json.loads(content.metadata()[CARD_KEY])


def is_refused(outcome: tuple[int, str, str], *words: str) -> bool:
    code, _, error = outcome
    return code == 2 and is_one_sentence(error) and all(word in error for word in words)


def test_a_run_can_be_named_in_three_ways(trained):
    for run in (RUN, str(RESULT), f"runs/{RUN}", f"runs/{RUN}/"):
        code, out, error = trained("export", run)
        assert (code, error) == (0, "") and out.count("\n") == 1 and FILE in out
        for file in (FILE, f"{FILE}.md"):
            Path(file).unlink()
    for name in ("nonsense", "digits/resnet8/dml/0.5"):
        assert is_refused(trained("export", name), "does not name a run")
    assert is_refused(trained("export", "digits/resnet8/dml/seed7"), "seed7.json' does not exist")


def test_files_are_replaced_only_on_request(trained):
    file = Path("deep/folder/student.safetensors")
    export = ("export", RUN, "--output", str(file))
    assert trained(*export)[0] == 0
    file.write_bytes(b"old")
    assert is_refused(trained(*export), "exists", "--overwrite")
    assert file.read_bytes() == b"old"
    assert trained(*export, "--overwrite")[0] == 0 and file.read_bytes() != b"old"
    assert is_refused(trained("export", RUN, "--output", "a.onnx"), ".safetensors")


def test_a_failed_write_leaves_no_file(trained):
    Path("file").touch()
    export = ("export", RUN, "--output", "file/student.safetensors")
    assert is_refused(trained(*export), "Cannot write") and not list(Path().rglob("*.tmp"))


def test_evaluation_agrees_with_the_run_or_fails(trained):
    trained("export", RUN)
    code, out, error = trained("evaluate", FILE)
    top1 = read_result(RESULT).last["student"].top1
    assert (code, error) == (0, "")
    assert out.count(f"top-1 {top1:.2f} %") == 2 and "360 images" in out and "is equal" in out
    assert trained("evaluate", FILE, "--suite", "digits")[0] == 0

    Path("digits2.toml").write_text('version = 1\nextends = "digits"\ndescription = ""\n')
    code, out, _ = trained("evaluate", FILE, "--suite", "./digits2.toml")
    assert code == 0 and "nothing to compare" in out

    state = safetensors.torch.load_file(FILE)
    state["branch.classifier.bias"] += torch.linspace(0, 9, 10)
    safetensors.torch.save_file(state, FILE, {CARD_KEY: json.dumps(read_card())})
    code, out, error = trained("evaluate", FILE)
    assert code == 1 and is_one_sentence(error) and "differ" in error


def test_the_model_card_gives_the_numbers_of_the_run(trained):
    def export_card(folder: str) -> str:
        trained("export", RUN, "--output", folder)
        (card,) = (file.read_text() for file in Path(folder).glob("*.md"))
        return card

    result = read_result(RESULT)
    card, student = export_card("one"), result.last["student"]
    flops = f"{result.cost.student_forward_flops:,}"
    for text in (f"{student.top1:.2f} %", "78,042", "1 epoch,", result.environment.command, flops):
        assert text in card
    assert "±" not in card and str(Path.cwd()) not in card

    for seed, top1 in ((1, student.top1 + 2), (2, student.top1 + 4)):
        identity = result.identity.model_copy(update={"seed": seed})
        change_result(identity=identity, **one_epoch({"student": metrics(top1)}))
    change_result(identity=identity.model_copy(update={"seed": 3, "method_hash": "another"}))
    assert f"over 3 seeds | {student.top1 + 2:.2f} ± 2.00 %" in export_card("three")


def test_missing_or_foreign_weights_are_not_exported(trained):
    command = "kdbench run --suite digits --methods baseline"
    (checkpoint,) = Path("runs", RUN).glob("checkpoint*.pt")
    content, result = checkpoint.read_bytes(), read_result(RESULT)
    checkpoint.write_bytes(content[:1000])
    assert is_refused(trained("export", RUN), "not found", command)
    checkpoint.unlink()
    assert is_refused(trained("export", RUN), "not found", command)
    checkpoint.write_bytes(content)
    epoch = result.history[0].model_copy(update={"learning_rate": 1.0})
    for changes, *words in (
        ({"notes": {"images": "prepared"}}, "not found", command),
        ({"notes": {}, "history": [epoch]}, "another training", command),
        ({"history": result.history, "status": "diverged"}, "diverged"),
        ({"fingerprint": "another", "status": "finished"}, "--overwrite-stale"),
    ):
        change_result(**changes)
        assert is_refused(trained("export", RUN), *words)
    assert not Path(FILE).exists()


def test_a_custom_method_is_named_by_its_file(kdbench):
    Path("custom.py").write_text(CUSTOM)
    kdbench("run", "--methods", "./custom.py", "--epochs", "1")
    run = RUN.replace("baseline", "custom")
    assert is_refused(kdbench("export", run), "--method ./custom.py")
    export = ("export", run, "--method", "custom.py")
    assert is_refused(kdbench(*export), "plain resnet8", "onnx or pt2")
    assert kdbench(*export, "--format", "pt2", "--output", "custom.pt2")[0] == 0
    assert kdbench("evaluate", "custom.pt2")[0] == 0


def test_onnx_is_an_optional_dependency(trained, monkeypatch):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    Path("a.onnx").write_bytes(b"")
    for command in (("export", RUN, "--format", "onnx"), ("evaluate", "a.onnx")):
        assert is_refused(trained(*command), "pip install 'kdbench[onnx]'")


@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_files_are_refused(trained, suffix):
    file = Path(f"bad.{suffix}")
    trained("export", RUN, "--format", suffix, "--output", str(file))
    content = file.read_bytes()
    file.unlink()
    assert is_refused(trained("evaluate", str(file)), "does not exist")
    for damaged in (b"", b"nonsense", content[: len(content) // 2], content[:-100]):
        file.write_bytes(damaged)
        assert is_refused(trained("evaluate", str(file)), "'bad.")
    assert is_refused(trained("evaluate", "results"), ".safetensors, .onnx, .pt2")


def test_damaged_and_foreign_pt2_files_are_refused_before_they_are_unpickled(trained):
    trained("export", RUN, "--format", "pt2", "--output", "whole.pt2")
    with zipfile.ZipFile("whole.pt2") as whole, zipfile.ZipFile("bad.pt2", "w") as bad:
        for name in whole.namelist():
            is_graph = name.endswith("models/model.json")
            bad.writestr(name, whole.read(name)[: 1000 if is_graph else None])
    assert is_refused(trained("evaluate", "bad.pt2"), "cannot be opened")
    for name, content in (
        ("data/sample_inputs/model.pt", pickle.dumps(sys.exit)),
        (f"extra/{CARD_KEY}", b" " * (MAX_CARD_BYTES + 1)),
    ):
        with zipfile.ZipFile("foreign.pt2", "w") as archive:
            archive.writestr(f"archive/{name}", content)
        assert is_refused(trained("evaluate", "foreign.pt2"), "no card")


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
        ({"identity": {"suite": "elsewhere"}}, "--suite ./elsewhere.toml"),
    ],
)
def test_a_forged_card_is_refused(trained, change, words):
    trained("export", RUN)
    weights, card = safetensors.torch.load_file(FILE), read_card()
    if change.get("identity"):
        change = {"identity": card["identity"] | change["identity"]}
    forged = {CARD_KEY: json.dumps(card | change)}
    for metadata, error in ((forged, words), (None, "no card")):
        safetensors.torch.save_file(weights, FILE, metadata)
        assert is_refused(trained("evaluate", FILE), error)
