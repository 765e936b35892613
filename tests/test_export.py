"""Exported networks give the logits that were evaluated, in every format, without kdbench."""

import json
import re
import subprocess
import sys
import zipfile
from functools import cache, partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import METHODS, Watcher, slow_except
from encoded_data import photo_suite, write_parquet
from torch import nn

from kdbench.backbones import ARCHITECTURES, build
from kdbench.data import load_images, locate
from kdbench.engine.run import Run
from kdbench.errors import UserError
from kdbench.export import formats
from kdbench.export.card import Card, make_card
from kdbench.export.evaluate import evaluate_file
from kdbench.export.formats import FORMATS, ONNX_OPSET, open_exported
from kdbench.export.student import DeployedNetwork, FinishedRun, load_run
from kdbench.export.write import write_export
from kdbench.launch.plan import make_specs
from kdbench.results.files import write_result
from kdbench.suite.load import load_suite
from kdbench.suite.suite import Suite

CPU = torch.device("cpu")
ONNX_ARCHITECTURES = {"wrn16-2", "densenet40-12", "googlenet", "resnet18"}
"""One architecture per family, because ONNX conversion takes seconds. `files` has a resnet8."""


def train(suite: Suite, method: str, folder: Path, accelerator) -> FinishedRun:
    (spec,), data = make_specs(suite, [method], ["resnet8"]), suite.data
    images = (load_images(locate(data, None), split) for split in (data.train, data.test))
    result = Run(spec, *images, folder / "run", accelerator, Watcher()).train()
    return load_run(write_result(folder / "results", result), folder / "run")


@pytest.fixture(scope="module")
def digits() -> Suite:
    return load_suite("digits").with_epochs(1)


@pytest.fixture(scope="module")
def finished(digits, accelerator, tmp_path_factory) -> FinishedRun:
    return train(digits, "dml", tmp_path_factory.mktemp("dml"), accelerator)


@pytest.fixture(scope="module")
def card(finished) -> Card:
    return make_card(finished)


@pytest.fixture(scope="module")
def files(finished, tmp_path_factory) -> dict[str, Path]:
    """The trained network in each format."""
    folder = tmp_path_factory.mktemp("exported")
    return {name: write_export(finished, name, folder).file for name in FORMATS}


def randomize_statistics(network: nn.Module) -> nn.Module:
    """Change the running statistics as training does, so that losing them changes the logits."""
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network


def encode(network: nn.Module, card: Card, file: Path) -> DeployedNetwork:
    deployed = DeployedNetwork(network, card.mean, card.std)
    file.write_bytes(FORMATS[file.suffix.removeprefix(".")].encode(deployed, card))
    return deployed


# Allows for the rounding of another order of summation.
assert_close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4)
evaluate = partial(evaluate_file, suite=None, data_dir=None, device=CPU, workers=0)


@pytest.mark.parametrize("name", slow_except({"resnet8"}, sorted(ARCHITECTURES)))
def test_every_architecture_gives_the_same_logits_from_each_format(name, card, monkeypatch):
    monkeypatch.setattr(formats, "_export_program", cache(formats._export_program))
    size = 32 if name in ("resnet18", "resnet34") else 8
    card = card.model_copy(update={"architecture": name, "image_size": size})
    network = randomize_statistics(build(name, 10))
    images = torch.rand(3, 3, size, size)
    for suffix in FORMATS if name in ONNX_ARCHITECTURES else ("safetensors", "pt2"):
        file = Path(f"network.{suffix}")
        deployed = encode(network, card, file)
        opened_card, opened = open_exported(file, CPU)
        assert opened_card == card
        for count in (1, 3):
            assert_close(opened(images[:count]), deployed(images[:count]))


@pytest.mark.parametrize("cohort", [*(f"{m} resnet8" for m in METHODS), "dml resnet20+resnet8"])
def test_the_exported_student_of_every_method_predicts_like_its_role(cohort, digits, card):
    name, architecture = cohort.split()
    (spec,) = make_specs(digits, [name], [architecture])
    method, file = randomize_statistics(spec.build()).eval(), Path("student.safetensors")
    deployed = encode(method.student(), card, file)
    images = torch.rand(5, 3, 8, 8)
    with torch.no_grad():
        expected = method.predict((images - deployed.mean) / deployed.std)["student"]
    assert_close(open_exported(file, CPU)[1](images), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_and_its_model_card_repeat_the_run_on_every_test_image(
    name, files, finished, card, digits, monkeypatch
):
    file, student = files[name], finished.result.last["student"]
    opened_card, opened = open_exported(file, CPU)
    assert opened_card == card
    test = load_images(locate(digits.data, None), digits.data.test)
    images = test.pixels.permute(0, 3, 1, 2).float() / 255
    actual, expected = opened(images), finished.network(images)
    assert_close(actual, expected)
    assert torch.equal(actual.argmax(1), expected.argmax(1))
    evaluation = evaluate(file)
    assert evaluation.agrees is True and evaluation.images == 360
    assert evaluation.metrics.top1 == student.top1 > 30  # it learned something
    assert evaluation.metrics.loss == pytest.approx(student.loss, rel=1e-5)

    (code,) = re.findall(r"```python\n(.*?)```", Path(f"{file}.md").read_text(), flags=re.DOTALL)
    variables = {"images": images.numpy() if name == "onnx" else images}
    monkeypatch.chdir(file.parent)
    exec(code, variables)
    assert_close(torch.as_tensor(variables["logits"]), expected)


def test_a_loaded_network_is_frozen_and_has_the_weights_of_the_file(files, finished):
    loaded, network = finished.network, build("resnet8", 10)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    network.load_state_dict(safetensors.torch.load_file(files["safetensors"]), strict=True)
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(network.eval()(images).logits, loaded.network(images).logits)


def test_pt2_needs_no_kdbench(files, finished):
    code = (
        "import sys; sys.modules['kdbench'] = None; import torch\n"
        "images = torch.linspace(0, 1, 768).view(4, 3, 8, 8)\n"
        "print(torch.export.load(sys.argv[1]).module()(images).tolist())"
    )
    printed = subprocess.check_output([sys.executable, "-c", code, files["pt2"]])
    images = torch.linspace(0, 1, 768).view(4, 3, 8, 8)
    assert_close(torch.tensor(json.loads(printed)), finished.network(images))


def test_an_onnx_file_describes_its_input_and_output(files):
    import onnx

    model = onnx.load(files["onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", ONNX_OPSET)]
    (images,), (logits,) = model.graph.input, model.graph.output
    assert (images.name, logits.name) == ("images", "logits")
    assert images.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_no_file_contains_paths_of_this_machine(files):
    private = (b"kdbench/backbones", b"kdbench/export", b"site-packages", b'stack_trace": "F')
    for file in files.values():
        contents = [file.read_bytes(), file.with_name(f"{file.name}.md").read_bytes()]
        if file.suffix == ".pt2":
            with zipfile.ZipFile(file) as archive:
                contents += [archive.read(name) for name in archive.namelist()]
        assert not any(text in content for content in contents for text in private)


def test_a_bf16_run_is_exported_in_float32_and_evaluated_in_bf16(digits, accelerator):
    finished = train(digits.with_precision("bf16"), "baseline", Path(), accelerator)
    file = write_export(finished, "safetensors", Path()).file
    state, evaluation = safetensors.torch.load_file(file), evaluate(file)
    assert {t.dtype for t in state.values()} == {torch.float32, torch.int64}
    assert evaluation.agrees
    assert evaluation.metrics.loss == pytest.approx(finished.result.last["student"].loss, rel=1e-4)


def test_a_file_is_evaluated_on_encoded_images_of_a_suite_that_fits(card):
    photo_suite()  # writes photos.toml
    file, data = Path("network.safetensors"), write_parquet(Path("photos"))
    # A suite may not have so many epochs: there is none to compare with.
    identity = card.identity.model_copy(update={"suite": f"photos@epochs={9 * 10**30}"})
    card = card.model_copy(update={"classes": 4, "image_size": 32, "identity": identity})
    encode(randomize_statistics(build("resnet8", 4)), card, file)
    evaluation = evaluate(file, suite="photos.toml", data_dir=data)
    assert evaluation.images == 10 and evaluation.agrees is None
    with pytest.raises(UserError, match="10 classes and 8 pixels"):
        evaluate(file, suite="digits")


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        (b'"classes":10', b'"classes":99', "99 classes and images of 8 pixels"),
        (b"images", b"photos", r"cannot be run: [^\n]*\.$"),
    ],
)
def test_a_file_that_contradicts_its_card_is_refused(files, old, new, error):
    content = files["onnx"].read_bytes()
    assert old in content
    Path("network.onnx").write_bytes(content.replace(old, new))
    with pytest.raises(UserError, match=error):
        evaluate(Path("network.onnx"))
