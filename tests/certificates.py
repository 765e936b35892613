"""Each method against the training steps of its authors' code, replayed in float64.

test_reference.py asserts the bounds; fidelity.py writes docs/fidelity.md.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from kdbench.methods.ffl import FFL
from kdbench.methods.ffsd import FFSD
from kdbench.methods.okddip import OKDDip
from kdbench.methods.one import ONE
from torch import Tensor, nn

from kdbench.engine.optimizers import build_optimizers, set_learning_rates
from kdbench.engine.step import TrainingStep
from kdbench.method import Cohort, Method
from kdbench.suite.suite import OptimizerRecipe

FOLDER = Path(__file__).parent / "reference"
LOSS_BOUND = 1e-9
PARAMETER_BOUND = 1e-8

Archive = dict[str, np.ndarray]
Trace = dict[str, list[float]]


def load(name: str) -> Archive:
    with np.load(FOLDER / f"{name}.npz") as archive:
        return dict(archive)


def tensors(archive: Archive, *prefixes: str) -> dict[str, Tensor]:
    """Return the entries with the given prefixes as tensors, in order; floats become float64."""
    found = {k: v for p in prefixes for k, v in archive.items() if k.startswith(p)}
    assert found, f"no reference value below {prefixes}"
    values = {k: torch.from_numpy(v) for k, v in found.items()}
    return {k: v.double() if v.is_floating_point() else v for k, v in values.items()}


@dataclass(frozen=True)
class Certificate:
    """Mapping of a reference trace to a method of kdbench."""

    name: str
    trace: str
    build: Callable[[], Method]
    first_epoch: int
    """Number of the first epoch in the reference; kdbench counts from 0."""
    parts: Callable[[Method], dict[tuple[str, ...], nn.Module]]
    """Function that maps reference prefixes to modules with the same tensors in the same order."""
    losses: Callable[[Archive, Trace], dict[str, tuple[np.ndarray, np.ndarray]]]
    """Function that maps loss names to pairs of kdbench's and the reference's values per step."""
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class Agreement:
    """Largest relative differences."""

    losses: dict[str, float]
    parameters: dict[str, float]


def agreement(certificate: Certificate) -> Agreement:
    """Replay the reference's three steps and compare every loss and every tensor."""
    archive = load(certificate.trace)
    method = certificate.build().double()
    parts = certificate.parts(method)
    for prefixes, module in parts.items():
        copy_in_order(module, tensors(archive, *(f"init/{p}" for p in prefixes)))
    method.begin_epoch(int(archive["meta/epoch"]) - certificate.first_epoch)
    trace = replay(method, archive, certificate.weight_decay)
    losses = {
        name: float(np.max(np.abs(ours - theirs) / np.abs(theirs)))
        for name, (ours, theirs) in certificate.losses(archive, trace).items()
    }
    parameters = {
        prefixes[0].rstrip("./"): largest_difference(
            module, tensors(archive, *(f"final/{p}" for p in prefixes))
        )
        for prefixes, module in parts.items()
    }
    return Agreement(losses, parameters)


def replay(method: Method, archive: Archive, weight_decay: float) -> Trace:
    """Run three training steps like the harness; return the values of every loss term by step."""
    recipe = OptimizerRecipe(
        learning_rate=0.1, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    optimizers = build_optimizers(method, recipe)
    set_learning_rates(optimizers, 1.0)
    trace = defaultdict(list)
    step = TrainingStep(method.train(), optimizers)
    for index in range(3):
        batch = tensors(archive, f"batch{index}/")
        images, labels = batch[f"batch{index}/images"], batch[f"batch{index}/labels"]
        values = step(images[None], labels).tolist()
        for name, value in zip(step.names, values, strict=True):
            trace[name].append(value)
    return dict(trace)


def state(module: nn.Module) -> list[Tensor]:
    """Return the parameters and running statistics in registration order."""
    items = module.state_dict().items()
    return [value for key, value in items if not key.endswith("num_batches_tracked")]


def copy_in_order(module: nn.Module, values: dict[str, Tensor]) -> None:
    for mine, theirs in zip(state(module), values.values(), strict=True):
        assert mine.shape == theirs.shape
        mine.copy_(theirs)


def largest_difference(module: nn.Module, values: dict[str, Tensor]) -> float:
    """Return the largest difference from the reference, relative to each tensor's largest value."""
    pairs = zip(state(module), values.values(), strict=True)
    return max(float((mine - ref).abs().max() / ref.abs().max()) for mine, ref in pairs)


def cohort(size: int) -> Cohort:
    return Cohort(["resnet8"] * size, num_classes=100, seed=0, epochs=300)


def summed(trace: Trace, *terms: str) -> np.ndarray:
    """Return the sum of the terms with the given prefixes, one value per step."""
    chosen = [values for name, values in trace.items() if name.startswith(terms)]
    assert chosen, terms
    return np.sum(chosen, axis=0)


def ffsd_parts(method: Method) -> dict[tuple[str, ...], nn.Module]:
    assert isinstance(method, FFSD)
    return {
        ("student0/",): method.students[0],
        ("student1/",): method.students[1],
        ("leader/",): nn.ModuleList([method.leader, method.transfer]),
        ("fusion/",): method.fusion,
        ("selfdistill_student1/",): method.student_distillers[0],
        ("selfdistill_leader/",): method.leader_distiller,
    }


def ffsd_losses(archive: Archive, trace: Trace) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    theirs = {
        "ce/peer0": "student0/ce",
        "kl/peer0": "student0/kl_peers",
        "ce/peer1": "student1/ce",
        "kl/peer1": "student1/kl_peers",
        "diversity/peer1": "student1/diversity",
        "self_distillation/peer1": "student1/self_distillation",
        "ce/fusion": "fusion/ce",
        "kl/fusion": "fusion/kl_students",
        "ce/student": "leader/ce",
        "kl/student": "leader/kl_fusion",
        "fused_attention/student": "leader/fused_attention",
        "transferred_attention/student": "leader/transferred_attention",
        "self_distillation/student": "leader/self_distillation",
    }
    pairs = {name: (np.array(trace[name]), archive[f"loss/{key}"]) for name, key in theirs.items()}
    # The reference splits reconstruction into features and attention.
    for name, prefix in {
        "reconstruction/peer1": "loss/student1/selfdistill_",
        "reconstruction/student": "loss/selfdistill_leader/",
    }.items():
        both = archive[f"{prefix}feature"] + archive[f"{prefix}attention"]
        pairs[name] = (np.array(trace[name]), both)
    assert set(pairs) == set(trace), "a loss term has no reference"
    return pairs


def shared_trunk_parts(
    networks: nn.ModuleList, classifier: str, first: int
) -> dict[tuple[str, ...], nn.Module]:
    """Return trunk and branches by their names in the authors' code, which counts from `first`."""
    parts: dict[tuple[str, ...], nn.Module] = {
        ("conv1.", "bn1.", "layer1.", "layer2."): networks[0].trunk
    }
    for i, network in enumerate(networks, start=first):
        parts[f"layer3_{i}.",] = network.branch.stage
        parts[f"{classifier}_{i}.",] = network.branch.classifier
    return parts


def ffl_parts(method: Method) -> dict[tuple[str, ...], nn.Module]:
    assert isinstance(method, FFL)
    depthwise, bn, _, pointwise, fused_bn, _ = method.fusion.remix
    fusion = nn.ModuleList([method.fusion.classifier, depthwise, bn, pointwise, fused_bn])
    return shared_trunk_parts(method.networks, "classfier3", 1) | {("fusion/",): fusion}


def ffl_losses(archive: Archive, trace: Trace) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    ramp = archive["meta/ramp_weight"]
    reference = {
        "ce/student": archive["loss/sub1/ce"],
        "ce/peer0": archive["loss/sub2/ce"],
        "ce/fusion": archive["loss/fused/ce"],
        "kl/student": ramp * archive["loss/sub1/kl_fused_unweighted"],
        "kl/peer0": ramp * archive["loss/sub2/kl_fused_unweighted"],
        "kl/fusion": ramp * archive["loss/fused/kl_ensemble_unweighted"],
    }
    assert set(reference) == set(trace), "a loss term has no reference"
    pairs = {name: (np.array(trace[name]), values) for name, values in reference.items()}
    return pairs | {"total": (summed(trace, ""), archive["loss/total"])}


def one_parts(method: Method) -> dict[tuple[str, ...], nn.Module]:
    assert isinstance(method, ONE)
    return shared_trunk_parts(method.networks, "classfier3", 1) | {
        ("control_v1.",): method.gate.linear,
        ("bn_v1.",): method.gate.bn,
    }


def one_losses(archive: Archive, trace: Trace) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    ramp = archive["meta/ramp_weight"]
    return {
        "cross-entropy": (summed(trace, "ce/"), archive["loss/cross_entropy"]),
        "kl": (summed(trace, "kl/"), ramp * archive["loss/kl_unweighted"]),
        "total": (summed(trace, ""), archive["loss/total"]),
    }


def okddip_parts(method: Method) -> dict[tuple[str, ...], nn.Module]:
    assert isinstance(method, OKDDip)
    if method.shared:
        networks = shared_trunk_parts(method.networks, "classifier3", 0)
    else:
        networks = {(f"stu{i}.",): network for i, network in enumerate(method.networks)}
    return networks | {
        ("query_weight.",): method.attention.query,
        ("key_weight.",): method.attention.key,
    }


def okddip_losses(archive: Archive, trace: Trace) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    ramp = archive["meta/ramp_weight"]
    return {
        "cross-entropy of peers": (
            summed(trace, "ce/peer"),
            archive["loss/cross_entropy_of_peers"],
        ),
        "kl of peers": (summed(trace, "kl/peer"), ramp * archive["loss/kl_of_peers_unweighted"]),
        "total": (summed(trace, ""), archive["loss/total"]),
    }


CERTIFICATES = [
    Certificate(
        "ffsd", "ffsd_resnet8", lambda: FFSD(cohort(3), FFSD.Options()), 1, ffsd_parts, ffsd_losses
    ),
    Certificate(
        "ffl", "ffl_resnet8", lambda: FFL(cohort(2), FFL.Options()), 0, ffl_parts, ffl_losses
    ),
    Certificate(
        "one", "one_resnet8", lambda: ONE(cohort(3), ONE.Options()), 0, one_parts, one_losses
    ),
    Certificate(
        "okddip, form network",
        "okddip_net_resnet8",
        lambda: OKDDip(cohort(4), OKDDip.Options()),
        0,
        okddip_parts,
        okddip_losses,
        weight_decay=5e-4,
    ),
    Certificate(
        "okddip, form branch",
        "okddip_branch_resnet8",
        lambda: OKDDip(cohort(4), OKDDip.Options(form="branch")),
        0,
        okddip_parts,
        okddip_losses,
        weight_decay=5e-4,
    ),
]
