"""Every architecture is the network its name means: sizes, stages, split, initial weights."""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from kdbench.backbones import ARCHITECTURES, Backbone, build
from kdbench.engine.measure import count_parameters
from kdbench.errors import UserError


class Expected(NamedTuple):
    parameters: int
    stages: tuple[tuple[int, int, int], ...]
    classes: int = 100
    image_size: int = 32


RESNET = ((16, 32, 32), (32, 16, 16), (64, 8, 8))
WRN = ((32, 32, 32), (64, 16, 16), (128, 8, 8))
IMAGENET = ((64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))

EXPECTED = {
    "resnet8": Expected(83_892, RESNET),
    "resnet20": Expected(278_324, RESNET),
    "resnet32": Expected(472_756, RESNET),
    "resnet56": Expected(861_620, RESNET),
    "resnet110": Expected(1_736_564, RESNET),
    "wrn16-2": Expected(704_420, WRN),
    "wrn40-2": Expected(2_258_084, WRN),
    "densenet40-12": Expected(1_100_428, ((168, 32, 32), (312, 16, 16), (456, 8, 8))),
    "googlenet": Expected(6_258_500, ((480, 32, 32), (832, 16, 16), (1024, 8, 8))),
    "resnet18": Expected(11_689_512, IMAGENET, classes=1000, image_size=224),
    "resnet34": Expected(21_797_672, IMAGENET, classes=1000, image_size=224),
}


@pytest.fixture(scope="module", params=EXPECTED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def expected(name: str) -> Expected:
    return EXPECTED[name]


@pytest.fixture(scope="module")
def backbone(name: str, expected: Expected) -> Backbone:
    return seeded_build(name, expected.classes, seed=0)


@pytest.fixture
def images(expected: Expected) -> Tensor:
    """Return small images: 64x64 pixels for ImageNet's networks."""
    size = min(expected.image_size, 64)
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def seeded_build(name: str, classes: int, seed: int) -> Backbone:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build(name, classes)


def test_every_architecture_has_an_expectation():
    assert set(EXPECTED) == set(ARCHITECTURES)


def test_parameter_count(backbone: Backbone, expected: Expected):
    assert count_parameters(backbone) == expected.parameters


@torch.no_grad()
def test_shapes(backbone: Backbone, expected: Expected):
    size = expected.image_size
    stages, embedding, logits = backbone.eval()(torch.zeros(1, 3, size, size))
    assert tuple(tuple(stage.shape[1:]) for stage in stages) == expected.stages
    assert backbone.channels == tuple(channels for channels, _, _ in expected.stages)
    assert embedding.shape == (1, backbone.width) == (1, backbone.channels[-1])
    assert backbone.branch.classifier.in_features == backbone.width
    assert logits.shape == (1, expected.classes)


@torch.no_grad()
def test_consecutive_stages_halve_the_size(backbone: Backbone, images: Tensor):
    sizes = [stage.shape[2:] for stage in backbone.eval()(images).stages]
    for (height, width), (next_height, next_width) in pairwise(sizes):
        assert (height, width) == (2 * next_height, 2 * next_width)


@torch.no_grad()
def test_trunk_and_branch_are_the_whole_network(backbone: Backbone, images: Tensor):
    whole = backbone.train()(images)
    maps = backbone.trunk(images)
    last, embedding, logits = backbone.branch(maps[-1])
    torch.testing.assert_close(whole.stages, (*maps, last))
    torch.testing.assert_close(whole.embedding, embedding)
    torch.testing.assert_close(whole.logits, logits)
    torch.testing.assert_close(embedding, last.mean(dim=(2, 3)))


@torch.no_grad()
def test_no_stage_modifies_the_output_of_an_earlier_stage(backbone: Backbone, images: Tensor):
    backbone.train()
    x = backbone.trunk.stem(images)
    fresh = []
    for stage in (*backbone.trunk.stages, backbone.branch.stage):
        x = stage(x)
        fresh.append(x.clone())
    torch.testing.assert_close(backbone(images).stages, tuple(fresh))


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


def test_the_seed_decides_the_weights(name: str, backbone: Backbone, expected: Expected):
    again = list(seeded_build(name, expected.classes, seed=0).parameters())
    other = list(seeded_build(name, expected.classes, seed=1).parameters())
    ours = list(backbone.parameters())
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
    random = [x.std() > 0 for x in ours]
    differs = [not torch.equal(x, y) for x, y in zip(ours, other, strict=True)]
    assert differs == random


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("densenet40_12", "densenet40-12"), ("googlnet", "googlenet"), ("wrn-40-2", "wrn40-2")],
)
def test_an_unknown_name_suggests_the_nearest(wrong: str, right: str):
    with pytest.raises(UserError, match=rf"'{wrong}'\. Did you mean '{right}'\?"):
        build(wrong, 100)
