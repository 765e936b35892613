"""Every architecture is the network its name means: sizes, stages, split, initial weights."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from kdbench.backbones import ARCHITECTURES, Backbone, build
from kdbench.engine.measure import count_parameters
from kdbench.errors import UserError


class Expected(NamedTuple):
    name: str
    parameters: int
    stages: tuple[tuple[int, int, int], ...]
    classes: int = 100
    image_size: int = 32


RESNET = ((16, 32, 32), (32, 16, 16), (64, 8, 8))
WRN = ((32, 32, 32), (64, 16, 16), (128, 8, 8))
IMAGENET = ((64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))

EXPECTED = [
    Expected("resnet8", 83_892, RESNET),
    Expected("resnet20", 278_324, RESNET),
    Expected("resnet32", 472_756, RESNET),
    Expected("resnet56", 861_620, RESNET),
    Expected("resnet110", 1_736_564, RESNET),
    Expected("wrn16-2", 704_420, WRN),
    Expected("wrn40-2", 2_258_084, WRN),
    Expected("densenet40-12", 1_100_428, ((168, 32, 32), (312, 16, 16), (456, 8, 8))),
    Expected("googlenet", 6_258_500, ((480, 32, 32), (832, 16, 16), (1024, 8, 8))),
    Expected("resnet18", 11_689_512, IMAGENET, classes=1000, image_size=224),
    Expected("resnet34", 21_797_672, IMAGENET, classes=1000, image_size=224),
]


@pytest.fixture(scope="module", params=EXPECTED, ids=lambda expected: expected.name)
def expected(request: pytest.FixtureRequest) -> Expected:
    return request.param


@pytest.fixture(scope="module")
def backbone(expected: Expected) -> Backbone:
    return seeded_build(expected, seed=0)


@pytest.fixture
def images(expected: Expected) -> Tensor:
    """Return small images: 64x64 pixels for ImageNet's networks."""
    size = min(expected.image_size, 64)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def seeded_build(expected: Expected, seed: int) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(expected.name, expected.classes)


def test_every_architecture_has_an_expectation():
    assert {expected.name for expected in EXPECTED} == set(ARCHITECTURES)


@torch.no_grad()
def test_parameters_and_shapes(backbone: Backbone, expected: Expected):
    assert count_parameters(backbone) == expected.parameters
    size = expected.image_size
    stages, embedding, logits = backbone.eval()(torch.zeros(1, 3, size, size))
    assert tuple(tuple(stage.shape[1:]) for stage in stages) == expected.stages
    assert backbone.channels == tuple(channels for channels, _, _ in expected.stages)
    assert embedding.shape == (1, backbone.width) == (1, backbone.channels[-1])
    assert backbone.branch.classifier.in_features == backbone.width
    assert logits.shape == (1, expected.classes)


@torch.no_grad()
def test_trunk_and_branch_are_the_whole_network(backbone: Backbone, images: Tensor):
    whole = backbone.train()(images)
    maps = backbone.trunk(images)
    last, embedding, logits = backbone.branch(maps[-1])
    torch.testing.assert_close(tuple(whole), ((*maps, last), embedding, logits))
    torch.testing.assert_close(embedding, last.mean(dim=(2, 3)))
    # No stage modifies the output of an earlier one.
    x, fresh = backbone.trunk.stem(images), []
    for stage in (*backbone.trunk.stages, backbone.branch.stage):
        x = stage(x)
        fresh.append(x.clone())
    torch.testing.assert_close(whole.stages, tuple(fresh))


def test_gradients_reach_every_parameter(backbone: Backbone, images: Tensor):
    names, parameters = zip(*backbone.named_parameters(), strict=True)
    loss = backbone.train()(images).logits.square().sum()
    gradients = torch.autograd.grad(loss, parameters)
    assert all(gradient.isfinite().all() for gradient in gradients)
    # A bias before a BN in train mode has no effect, so its gradient is rounding noise.
    convolutions = {n for n, module in backbone.named_modules() if isinstance(module, nn.Conv2d)}
    for name, gradient in zip(names, gradients, strict=True):
        layer, _, kind = name.rpartition(".")
        assert gradient.any() or (kind == "bias" and layer in convolutions), name


def test_initial_weights(backbone: Backbone):
    normalised = []
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            z = module.weight.detach().flatten() * math.sqrt(fan_out / 2)
            assert abs(z.var() - 1) < 5 * math.sqrt(2 / len(z))
            assert module.bias is None or not module.bias.any()
            normalised.append(z)
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all()
            assert not module.bias.any()
    z = torch.cat(normalised)
    assert abs(z.mean()) < 5 / math.sqrt(len(z))
    fourth_moment = z.square().square().mean()  # 3 for a normal, 1.8 for a uniform distribution
    assert abs(fourth_moment - 3) < 5 * math.sqrt(96 / len(z))
    bound = 1 / math.sqrt(backbone.width)
    largest = backbone.branch.classifier.weight.abs().max()
    assert 0.99 * bound < largest <= bound  # PyTorch's default for Linear is uniform


def test_the_seed_decides_the_weights(backbone: Backbone, expected: Expected):
    ours = list(backbone.parameters())
    assert all(map(torch.equal, ours, seeded_build(expected, seed=0).parameters()))
    random = [x.std() > 0 for x in ours]
    other = seeded_build(expected, seed=1).parameters()
    assert [not torch.equal(x, y) for x, y in zip(ours, other, strict=True)] == random


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("densenet40_12", "densenet40-12"), ("googlnet", "googlenet"), ("wrn-40-2", "wrn40-2")],
)
def test_an_unknown_name_suggests_the_nearest(wrong: str, right: str):
    with pytest.raises(UserError, match=rf"'{wrong}'\. Did you mean '{right}'\?"):
        build(wrong, 100)
