"""Each method against the training steps of its authors' code, replayed in float64.

test_reference.py asserts the bounds; fidelity.py writes docs/fidelity.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from kdbench.methods.kdcl import error_correlation, general_weights, minlogit_target, naive_target
from torch import Tensor, nn

from kdbench.discovery import find_methods
from kdbench.engine.optimizers import build_optimizers, set_learning_rates
from kdbench.engine.step import TrainingStep
from kdbench.losses import mutual_kl
from kdbench.method import Cohort, Method
from kdbench.suite.suite import OptimizerRecipe

LOSS_BOUND, PARAMETER_BOUND = 1e-9, 1e-8
RATE, MOMENTUM = 0.1, 0.9

Values = dict[str, Tensor]
Parts = dict[str, nn.Module]


def load(name: str) -> Values:
    """Return the values of a file below reference/, with floats as float64."""
    with np.load(Path(__file__).parent / "reference" / f"{name}.npz") as archive:
        values = {key: torch.from_numpy(value) for key, value in archive.items()}
    return {k: v.double() if v.is_floating_point() else v for k, v in values.items()}


def build(name: str, networks: int, num_classes: int = 100, **settings: str) -> Method:
    """Return a method in float64, with networks of ResNet-8."""
    (entry,) = find_methods([name])
    cohort = Cohort(["resnet8"] * networks, num_classes, seed=0, epochs=300)
    torch.manual_seed(0)
    return entry.method(cohort, entry.options(settings)).double().train()


def replay(method: Method, batches: list[tuple[Tensor, Tensor]], weight_decay: float) -> Values:
    """Train a step per batch like the harness; return the values of every loss term by step."""
    recipe = OptimizerRecipe(
        learning_rate=RATE, momentum=MOMENTUM, nesterov=True, weight_decay=weight_decay
    )
    optimizers = build_optimizers(method, recipe)
    set_learning_rates(optimizers, 1.0)
    step = TrainingStep(method, optimizers)
    losses = torch.stack([step(views, labels) for views, labels in batches])
    return dict(zip(step.names, losses.T, strict=True))


@dataclass(frozen=True)
class Certificate:
    """Mapping of a reference trace to a method of kdbench."""

    name: str
    trace: str
    build: Callable[[], Method]
    parts: Callable[[Method], Parts]
    """Returns modules by the prefixes of their tensors in the reference, in the same order."""
    losses: dict[str, str]
    """Prefixes of loss terms, and of the values in the reference that have the same sum."""
    first_epoch: int = 0
    """Number of the first epoch in the reference; kdbench counts from 0."""
    weight_decay: float = 1e-4


def agreement(certificate: Certificate) -> tuple[dict[str, float], dict[str, float]]:
    """Replay three steps; return the largest relative differences of losses and of tensors."""
    reference = load(certificate.trace)
    method = certificate.build()
    parts = certificate.parts(method)
    for prefixes, module in parts.items():
        for mine, theirs in pairs(module, reference, "init", prefixes):
            assert mine.shape == theirs.shape
            mine.copy_(theirs)
    method.begin_epoch(int(reference["meta/epoch"]) - certificate.first_epoch)
    batches = [
        (reference[f"batch{i}/images"][None], reference[f"batch{i}/labels"]) for i in range(3)
    ]
    trace = replay(method, batches, certificate.weight_decay)
    assert all(name.startswith(tuple(certificate.losses)) for name in trace), "no reference"
    compared = certificate.losses | ({"": "total"} if "loss/total" in reference else {})
    losses = {}
    for ours, theirs in compared.items():
        expected = summed(reference, f"loss/{theirs}")
        losses[theirs] = float(((summed(trace, ours) - expected) / expected).abs().max())
    tensors = {
        prefixes: max(difference(*pair) for pair in pairs(module, reference, "final", prefixes))
        for prefixes, module in parts.items()
    }
    return losses, tensors


def pairs(
    module: nn.Module, reference: Values, moment: str, prefixes: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair the parameters and running statistics of a module with the reference's, in order."""
    mine = [v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")]
    names = tuple(f"{moment}/{prefix}" for prefix in prefixes.split())
    return zip(mine, (v for k, v in reference.items() if k.startswith(names)), strict=True)


def summed(values: Values, prefix: str) -> Tensor:
    """Return the sum of losses with a prefix, one value per step."""
    weights = {k: values["meta/ramp_weight"] if k.endswith("_unweighted") else 1 for k in values}
    chosen = [weights[k] * v for k, v in values.items() if k.startswith(prefix)]
    assert chosen, prefix
    return torch.stack(chosen).sum(dim=0)


def difference(mine: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((mine - theirs).abs().max() / theirs.abs().max())


def formulas() -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return what kdbench and the authors' code compute, of methods certified by formulas."""
    terms = load("terms")
    logits, labels = terms["logits"], terms["labels"]
    log_p = F.log_softmax(logits[0], dim=1)
    smoothed = 0.9 * F.nll_loss(log_p, labels) - 0.1 * log_p.mean()
    probabilities, own_labels = terms["kdcl/general_probabilities"], terms["kdcl/general_labels"]
    correlation = error_correlation(probabilities, own_labels)
    weights = general_weights(correlation)
    return {
        "label_smoothing": [(F.cross_entropy(logits[0], labels, label_smoothing=0.1), smoothed)],
        "dml": [
            (torch.stack(mutual_kl(list(logits))), terms["dml/kl_T1"]),
            (torch.stack(mutual_kl(list(logits), 2.0)), terms["dml/kl_T2_scaled"]),
        ],
        "kdcl": [
            (naive_target(logits, labels), terms["kdcl/naive_target"]),
            (minlogit_target(logits, labels), terms["kdcl/minlogit_target"]),
            (correlation, terms["kdcl/general_correlation"]),
            (weights, terms["kdcl/general_weights"]),
            (torch.einsum("k,kbc->bc", weights, logits), terms["kdcl/general_target"]),
        ],
    }


def ffsd_parts(method: Method) -> Parts:
    return {
        "student0/": method.students[0],
        "student1/": method.students[1],
        "leader/": nn.ModuleList([method.leader, method.transfer]),
        "fusion/": method.fusion,
        "selfdistill_student1/": method.student_distillers[0],
        "selfdistill_leader/": method.leader_distiller,
    }


def shared_trunk_parts(networks: nn.ModuleList, classifier: str, first: int) -> Parts:
    """Return trunk and branches by their names in the authors' code, which counts from `first`."""
    parts: Parts = {"conv1. bn1. layer1. layer2.": networks[0].trunk}
    for i, network in enumerate(networks, start=first):
        parts[f"layer3_{i}."] = network.branch.stage
        parts[f"{classifier}_{i}."] = network.branch.classifier
    return parts


def ffl_parts(method: Method) -> Parts:
    depthwise, bn, _, pointwise, fused_bn, _ = method.fusion.remix
    fusion = nn.ModuleList([method.fusion.classifier, depthwise, bn, pointwise, fused_bn])
    return shared_trunk_parts(method.networks, "classfier3", 1) | {"fusion/": fusion}


def one_parts(method: Method) -> Parts:
    gate = {"control_v1.": method.gate.linear, "bn_v1.": method.gate.bn}
    return shared_trunk_parts(method.networks, "classfier3", 1) | gate


def okddip_parts(method: Method) -> Parts:
    if method.shared:
        networks = shared_trunk_parts(method.networks, "classifier3", 0)
    else:
        networks = {f"stu{i}.": network for i, network in enumerate(method.networks)}
    attention = method.attention
    return networks | {"query_weight.": attention.query, "key_weight.": attention.key}


CERTIFICATES = [
    Certificate(
        "ffsd",
        "ffsd_resnet8",
        partial(build, "ffsd", 3),
        ffsd_parts,
        {
            "ce/peer0": "student0/ce",
            "kl/peer0": "student0/kl_peers",
            "ce/peer1": "student1/ce",
            "kl/peer1": "student1/kl_peers",
            "diversity/peer1": "student1/diversity",
            "self_distillation/peer1": "student1/self_distillation",
            "reconstruction/peer1": "student1/selfdistill_",  # of features and of attention
            "ce/fusion": "fusion/ce",
            "kl/fusion": "fusion/kl_students",
            "ce/student": "leader/ce",
            "kl/student": "leader/kl_fusion",
            "fused_attention/student": "leader/fused_attention",
            "transferred_attention/student": "leader/transferred_attention",
            "self_distillation/student": "leader/self_distillation",
            "reconstruction/student": "selfdistill_leader/",
        },
        first_epoch=1,
    ),
    Certificate(
        "ffl",
        "ffl_resnet8",
        partial(build, "ffl", 2),
        ffl_parts,
        {
            "ce/student": "sub1/ce",
            "ce/peer0": "sub2/ce",
            "ce/fusion": "fused/ce",
            "kl/student": "sub1/kl_fused",
            "kl/peer0": "sub2/kl_fused",
            "kl/fusion": "fused/kl_ensemble",
        },
    ),
    Certificate(
        "one",
        "one_resnet8",
        partial(build, "one", 3),
        one_parts,
        {"ce/": "cross_entropy", "kl/": "kl_unweighted"},
    ),
    *(
        Certificate(
            f"okddip, form {form}",
            f"okddip_{trace}_resnet8",
            partial(build, "okddip", 4, form=form),
            okddip_parts,
            {"ce/peer": "cross_entropy_of_peers", "kl/peer": "kl_of_peers", "": "total"},
            weight_decay=5e-4,
        )
        for form, trace in (("network", "net"), ("branch", "branch"))
    ),
]
