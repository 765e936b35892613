"""Exported networks are those that were measured, in every format, and carry what they need."""

import json
import re
import subprocess
import sys
import zipfile
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from conftest import METHODS, Watcher
from encoded_data import photo_suite, write_parquet
from torch import Tensor, nn

from kdbench.backbones import ARCHITECTURES, build
from kdbench.data import load_images, locate
from kdbench.discovery import find_methods
from kdbench.engine.run import Run
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError
from kdbench.export import formats
from kdbench.export.card import Card, make_card
from kdbench.export.evaluate import evaluate_file
from kdbench.export.formats import FORMATS, OPSET, open_exported
from kdbench.export.student import Deployed, FinishedRun, load
from kdbench.export.write import write
from kdbench.results.files import write_result
from kdbench.results.schema import Identity, Metrics
from kdbench.suite.load import load_suite
from kdbench.suite.suite import Suite

CPU = torch.device("cpu")
ONNX_TOO = {"wrn16-2", "densenet40-12", "googlenet", "resnet18"}
"""One of each family, as its conversion takes seconds; digits have a resnet8."""


class Trained(NamedTuple):
    result: Path
    folder: Path


def train(suite: Suite, method: str, folder: Path, accelerator, architecture="resnet8") -> Trained:
    (entry,) = find_methods([method])
    spec = RunSpec(suite, architecture, entry, entry.options({}), 0)
    source = locate(suite.data, None)
    images = (load_images(source, split) for split in (suite.data.train, suite.data.test))
    result = Run(spec, *images, folder / "run", accelerator, Watcher()).train()
    return Trained(write_result(folder / "results", result), folder / "run")


@pytest.fixture(scope="module")
def digits() -> Suite:
    return load_suite("digits").with_epochs(1)


@pytest.fixture(scope="module")
def trained(digits, accelerator, tmp_path_factory) -> Trained:
    return train(digits, "dml", tmp_path_factory.mktemp("dml"), accelerator)


@pytest.fixture(scope="module")
def finished(trained) -> FinishedRun:
    return load(*trained)


@pytest.fixture(scope="module")
def files(finished, tmp_path_factory) -> dict[str, Path]:
    """The trained network in each format."""
    folder = tmp_path_factory.mktemp("exported")
    return {form: write(finished, form, folder).file for form in FORMATS}


def shaken(network: nn.Module) -> nn.Module:
    """With running statistics as if it had been trained, which forgetting them would show."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network


def make_card(architecture: str, image_size: int) -> Card:
    return Card(
        kdbench="0",
        architecture=architecture,
        classes=10,
        image_size=image_size,
        resize=None,
        mean=(0.4, 0.5, 0.6),
        std=(0.2, 0.3, 0.4),
        identity=Identity(
            suite="digits",
            suite_hash="0",
            architecture=architecture,
            method="baseline",
            method_hash="0",
            seed=0,
        ),
        metrics=Metrics(top1=0, top5=0, loss=0),
        precision="fp32",
        command="kdbench run",
    )


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """Within the rounding of another order of sums."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_gives_the_same_logits_from_each_format(name, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_program", cache(formats._program))
    card = make_card(name, 32 if name in ("resnet18", "resnet34") else 8)
    network = Deployed(shaken(build(name, 10)), card.mean, card.std)
    images = torch.rand(3, 3, card.image_size, card.image_size)
    for form in FORMATS if name in ONNX_TOO else ("safetensors", "pt2"):
        file = tmp_path / f"network.{form}"
        file.write_bytes(FORMATS[form].encode(network, card))
        found, opened = open_exported(file, CPU)
        assert found == card
        for count in (1, 3):
            assert_same(opened(images[:count]), network(images[:count]))


@pytest.mark.parametrize(
    ("name", "architecture"), [*((m, "resnet8") for m in METHODS), ("dml", "resnet20+resnet8")]
)
def test_the_student_of_every_method_is_what_it_predicts_with(name, architecture, digits, tmp_path):
    (entry,) = find_methods([name])
    spec = RunSpec(digits, architecture, entry, entry.options({}), 0)
    method = shaken(spec.build()).eval()
    card = make_card("resnet8", 8)
    file = tmp_path / "student.safetensors"
    network = Deployed(method.student(), card.mean, card.std)
    file.write_bytes(FORMATS["safetensors"].encode(network, card))
    _, opened = open_exported(file, CPU)
    images = torch.rand(5, 3, 8, 8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (card.mean, card.std))
    with torch.no_grad():
        assert_same(opened(images), method.predict((images - mean) / std)["student"])


@pytest.mark.parametrize("form", FORMATS)
def test_a_file_repeats_the_run_on_every_test_image(form, files, finished, digits):
    card, opened = open_exported(files[form], CPU)
    assert card == make_card(finished)
    test = load_images(locate(digits.data, None), digits.data.test)
    images = test.pixels.permute(0, 3, 1, 2).float() / 255
    ours, theirs = opened(images), finished.network(images)
    assert_same(ours, theirs)
    assert torch.equal(ours.argmax(1), theirs.argmax(1))
    measured = evaluate_file(files[form], None, None, CPU, workers=0)
    assert measured.agrees is True and measured.images == 360
    assert measured.metrics.top1 == finished.result.last["student"].top1
    assert measured.metrics.loss == pytest.approx(finished.result.last["student"].loss, rel=1e-5)


def test_the_network_is_that_of_the_last_epoch_and_learned_something(finished):
    assert finished.result.last["student"].top1 > 30
    assert not finished.network.training
    assert not any(p.requires_grad for p in finished.network.parameters())


def test_pt2_needs_no_kdbench(files, finished, tmp_path):
    images = torch.linspace(0, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8)
    code = """
import sys
sys.modules["kdbench"] = None  # an import of it fails
import torch
images = torch.linspace(0, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8)
print(torch.export.load(sys.argv[1]).module()(images).tolist())
"""
    command = [sys.executable, "-c", code, str(files["pt2"])]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert_same(torch.tensor(json.loads(ran.stdout)), finished.network(images))


def test_safetensors_rebuild_by_name_alone(files, finished):
    state = safetensors.torch.load_file(files["safetensors"])
    network = build("resnet8", 10)
    network.load_state_dict(state, strict=True)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(network.eval()(images).logits, finished.network.network(images).logits)


@pytest.mark.parametrize("form", FORMATS)
def test_the_code_in_the_model_card_gives_the_logits(form, files, finished, monkeypatch):
    file = files[form]
    (code,) = re.findall(r"```python\n(.*?)```", Path(f"{file}.md").read_text(), flags=re.DOTALL)
    images = torch.rand(2, 3, 8, 8)
    variables = {"images": images.numpy() if form == "onnx" else images}
    monkeypatch.chdir(file.parent)
    exec(code, variables)
    assert_same(torch.as_tensor(variables["logits"]), finished.network(images))


def test_onnx_says_what_it_is(files):
    import onnx

    model = onnx.load(files["onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert images.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_no_file_tells_of_the_machine(files):
    """Nodes of a graph know the files and lines they came from, until that is taken from them."""
    places = (b"kdbench/backbones", b"kdbench/export", b"site-packages", b'stack_trace": "F')
    for file in files.values():
        contents = [file.read_bytes(), file.with_name(f"{file.name}.md").read_bytes()]
        if file.suffix == ".pt2":
            with zipfile.ZipFile(file) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        for content in contents:
            assert not any(place in content for place in places)


def test_what_a_bf16_run_exports_is_float32_and_measured_as_the_run_was(
    digits, accelerator, tmp_path
):
    trained = train(digits.with_precision("bf16"), "baseline", tmp_path, accelerator)
    finished = load(*trained)
    file = write(finished, "safetensors", tmp_path).file
    state = safetensors.torch.load_file(file)
    assert {t.dtype for t in state.values()} == {torch.float32, torch.int64}
    measured = evaluate_file(file, None, None, CPU, workers=0)
    assert measured.agrees
    assert measured.metrics.loss == pytest.approx(finished.result.last["student"].loss, rel=1e-4)


def test_encoded_suites_are_measured_through_their_batches(accelerator, tmp_path):
    suite = photo_suite()
    data = write_parquet(tmp_path / "photos")
    card = make_card("resnet8", 32).model_copy(
        update={"classes": 4, "mean": suite.augmentation.mean, "std": suite.augmentation.std}
    )
    network = Deployed(shaken(build("resnet8", 4)), card.mean, card.std)
    file = tmp_path / "network.safetensors"
    file.write_bytes(FORMATS["safetensors"].encode(network, card))
    measured = evaluate_file(file, "photos.toml", data, CPU, workers=0)
    assert measured.images == 10 and measured.agrees is None
    with pytest.raises(UserError, match="10 in 8"):
        evaluate_file(file, "digits", None, CPU, workers=0)


def test_a_file_that_is_not_what_its_card_says_is_refused_in_one_sentence(files, tmp_path):
    import onnx

    def measured(change) -> None:
        model = onnx.load(files["onnx"])
        change(model)
        onnx.save(model, tmp_path / "network.onnx")
        evaluate_file(tmp_path / "network.onnx", None, None, CPU, workers=0)

    def renamed(model) -> None:
        for node in model.graph.node:
            node.input[:] = ["pictures" if name == "images" else name for name in node.input]
        model.graph.input[0].name = "pictures"

    def more_classes(model) -> None:
        model.metadata_props[0].value = model.metadata_props[0].value.replace(
            '"classes":10', '"classes":9'
        )

    def endless(model) -> None:
        model.metadata_props[0].value = model.metadata_props[0].value.replace(
            "digits@epochs=1", f"digits@epochs={9 * 10**30}"
        )

    with pytest.raises(UserError, match=r"cannot be run: [^\n]*\.$"):
        measured(renamed)
    with pytest.raises(UserError, match="9 classes in images of 8 pixels"):
        measured(more_classes)
    measured(endless)  # of no suite's: the measured is then compared with nothing
    with zipfile.ZipFile(tmp_path / "network.pt2", "w") as archive:
        archive.writestr("network/extra/kdbench", " " * (formats.MAX_CARD_BYTES + 1))
    with pytest.raises(UserError, match="carries no card"):
        open_exported(tmp_path / "network.pt2", CPU)
