"""Contract checks for methods.

Each check is a function of a `Subject`. It returns None if the method passes, and raises
`CheckFailedError` or `CheckSkippedError` with a reason otherwise.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kdbench.backbones import build
from kdbench.check.subject import BATCH_SIZE, EPOCHS, Subject, find_own_parameters
from kdbench.engine.evaluate import check_roles
from kdbench.engine.measure import count_parameters
from kdbench.engine.optimizers import build_optimizers
from kdbench.engine.step import check_terms

Check = Callable[[Subject], None]


class CheckFailedError(Exception):
    """Raised if a method violates the contract."""


class CheckSkippedError(Exception):
    """Raised if a check does not apply to a method, or cannot run on this machine."""


def require(condition: bool, message: str) -> None:
    """Raise CheckFailedError with a message unless the condition holds."""
    if not condition:
        raise CheckFailedError(message)


def roles_and_shapes(subject: Subject) -> None:
    """Check that predict() returns logits (B, C) for `student` and for no reserved role."""
    method = subject.build().eval()
    roles = method.predict(subject.make_batch()[0][0])
    check_roles(roles)
    expected = (BATCH_SIZE, subject.suite.data.classes)
    for role, logits in roles.items():
        require(
            logits.shape == expected,
            f"predict() returns '{role}' with shape {tuple(logits.shape)}, but logits must have "
            f"shape {expected}: (batch size, classes)",
        )


def losses_named_and_finite(subject: Subject) -> None:
    """Check that forward() returns finite scalars under names of the form `kind/role`."""
    method = subject.build()
    terms = method(*subject.make_batch())
    check_terms(terms)
    for name, term in terms.items():
        require(
            "/" in name,
            f"loss term '{name}' names no role. Name every term kind/role, for example "
            "'ce/student'",
        )
        require(
            bool(term.isfinite()),
            f"loss term '{name}' is {term.item()} in the first step. Look for a division by zero, "
            "the logarithm of zero, or an overflow",
        )


def sum_is_optimized(subject: Subject) -> None:
    """Check that every parameter is trained by the gradient of the sum of all loss terms."""
    views, labels = subject.make_batch()
    with subject.open_run() as run:
        method = run.method
        method.train().begin_epoch(0)
        state = {key: value.clone() for key, value in method.state_dict().items()}
        run.step(views.float(), labels)
        actual = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
        method.load_state_dict(state)
        total = torch.stack(list(method(views.float(), labels).values())).sum()
        parameters = [p for p in method.parameters() if p.requires_grad]
        expected = torch.autograd.grad(total, parameters, allow_unused=True)
    for (name, gradient), reference in zip(actual.items(), expected, strict=True):
        require(
            reference is not None,
            f"no loss term depends on parameter '{name}'. Use it in forward(), or set its "
            "requires_grad to False",
        )
        require(
            gradient is not None and _is_close(gradient, reference),
            f"the gradient of '{name}' is not that of the sum of all loss terms. Return every loss "
            "as a term, and leave backward() and the gradients to kdbench",
        )


def targets_detached(subject: Subject) -> None:
    """Check that the terms of a network train no other network, unless the method declares it."""
    method = subject.build()
    views, labels = subject.make_batch()
    own = find_own_parameters(method.eval(), views[0])
    if len(own) < 2:
        raise CheckSkippedError("the method has one network")
    terms = method.train()(views, labels)
    for role in own:
        require(
            any(_role_of(name) == role for name in terms),
            f"no loss term is named kind/{role}, so kdbench cannot check that the targets of this "
            f"network are detached. Name its terms accordingly, for example 'ce/{role}'",
        )
    leaks = _find_leaks(terms, own)
    if subject.entry.method.attached_targets:
        require(
            bool(leaks),
            "attached_targets is True, but no loss term trains another network. Remove "
            "attached_targets",
        )
    elif leaks:
        term, network = leaks[0]
        raise CheckFailedError(
            f"loss term '{term}' trains network '{network}'. Detach its target with "
            ".detach(), or set attached_targets = True if the method intends this"
        )


def _find_leaks(
    terms: dict[str, Tensor], own: dict[str, dict[str, nn.Parameter]]
) -> list[tuple[str, str]]:
    """Return pairs of a loss term and a foreign network that it sends gradients into."""
    leaks = []
    for name, term in terms.items():
        role = _role_of(name)
        if role not in own or not term.requires_grad:
            continue
        foreign = [(r, p) for r, ps in own.items() if r != role for p in ps.values()]
        gradients = torch.autograd.grad(
            term, [p for _, p in foreign], retain_graph=True, allow_unused=True
        )
        for (network, _), gradient in zip(foreign, gradients, strict=True):
            if gradient is not None and bool(gradient.any()):
                leaks.append((name, network))
                break
    return leaks


def _role_of(term: str) -> str:
    return term.rpartition("/")[2]


def train_and_eval_mode(subject: Subject) -> None:
    """Check that all modules are in train mode in every step and in eval mode in predict()."""
    with subject.open_run() as run:
        method = run.method
        modes: dict[str, list[bool]] = {"forward": [], "predict": []}

        def record_modes(name: str) -> Callable[..., dict[str, Tensor]]:
            original = getattr(method, name)

            def call(*inputs: Tensor) -> dict[str, Tensor]:
                modes[name] += [module.training for module in method.modules()]
                output: dict[str, Tensor] = original(*inputs)
                modes[name] += [module.training for module in method.modules()]
                return output

            return call

        for name in modes:
            setattr(method, name, record_modes(name))
        run.train()
    advice = "kdbench switches modes, so do not call train() or eval() in the method"
    require(all(modes["forward"]), f"a module is in eval mode in a training step; {advice}")
    require(not any(modes["predict"]), f"a module is in train mode in predict(); {advice}")


def deterministic(subject: Subject) -> None:
    """Check that two runs with the same seed give bit-equal numbers."""
    histories = []
    for _ in range(2):
        with subject.open_run() as run:
            histories.append(run.train().history)
    require(
        len(histories[0]) == EPOCHS, f"{len(histories[0])} epochs were trained instead of {EPOCHS}"
    )
    require(
        histories[0] == histories[1],
        "two runs with the same seed give different numbers. Draw random numbers with torch, which "
        "kdbench seeds, not with random or numpy",
    )


def independent_of_batch_order(subject: Subject) -> None:
    """Check that the losses do not depend on the order of the images in a batch."""
    views, labels = subject.make_batch()
    order = torch.arange(BATCH_SIZE).flip(0)
    first = subject.build()(views, labels)
    second = subject.build()(views[:, order], labels[order])
    for name in first:
        require(
            _is_close(first[name], second[name]),
            f"loss term '{name}' depends on the order of the images in the batch. Treat all images "
            "alike, wherever they are in the batch",
        )


def state_dict_round_trip(subject: Subject) -> None:
    """Check that a new instance with a trained state_dict() predicts the same logits."""
    images = subject.make_batch()[0][0]
    trained = subject.build()
    trained(*subject.make_batch())  # updates running statistics
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.01)
    restored = subject.build()
    restored.load_state_dict(trained.state_dict())
    with torch.no_grad():
        expected, actual = trained.eval().predict(images), restored.eval().predict(images)
    for role in expected:
        require(
            torch.equal(expected[role], actual[role]),
            f"the logits of '{role}' change when state_dict() is loaded into a new instance. Keep "
            "everything they depend on in parameters or buffers (register_buffer)",
        )


def student_matches_predict(subject: Subject) -> None:
    """Check that student() gives the logits of the role `student` of predict()."""
    method = subject.build().eval()
    images = subject.make_batch()[0][0]
    with torch.no_grad():
        deployed, predicted = method.student()(images).logits, method.predict(images)["student"]
    require(
        _is_close(deployed, predicted),
        "student() and role 'student' of predict() give different logits. Use the same network in "
        "both",
    )


def deploys_one_plain_network(subject: Subject) -> None:
    """Check that student() has as many parameters as a plain backbone."""
    plain = count_parameters(build(subject.architecture, subject.suite.data.classes))
    deployed = count_parameters(subject.build().student())
    require(
        deployed == plain,
        f"student() has {deployed:,} parameters, but a plain {subject.architecture} has {plain:,}. "
        "Return one backbone, without modules that are used in training only",
    )


def every_parameter_in_one_group(subject: Subject) -> None:
    """Check that the optimizers hold every trainable parameter exactly once."""
    build_optimizers(subject.build(), subject.suite.optimizer)


class _DeviceSyncDetector(TorchDispatchMode):
    """Dispatch mode that notices operations for which the CPU would have to wait for a GPU."""

    detected = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.detected = True
        return func(*args, **(kwargs or {}))


def never_waits_for_device(subject: Subject) -> None:
    """Check that a step does not wait for the device, for example in `.item()`."""
    method = subject.build()
    views, labels = subject.make_batch()
    with _DeviceSyncDetector() as detector:
        method(views, labels)
    require(
        not detector.detected,
        "forward() reads the value of a tensor, which makes the CPU wait for the GPU. Avoid "
        ".item(), float(), nonzero() and conditions on tensors; use torch.where for conditions",
    )


def compiles(subject: Subject) -> None:
    """Check that the step compiles as one graph and gives the same losses."""
    views, labels = subject.make_batch()
    eager = subject.build()(views, labels)
    method = subject.build()
    method.compile(backend="aot_eager", fullgraph=True)
    compiled = method(views, labels)
    for name in eager:
        require(
            _is_close(eager[name], compiled[name]),
            f"loss term '{name}' has another value after torch.compile. Keep values that change "
            "between steps in buffers, not in Python attributes",
        )


def _is_close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-5
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


CHECKS: dict[str, Check] = {
    check.__name__.replace("_", " "): check
    for check in (
        roles_and_shapes,
        losses_named_and_finite,
        every_parameter_in_one_group,
        sum_is_optimized,
        targets_detached,
        train_and_eval_mode,
        deterministic,
        independent_of_batch_order,
        state_dict_round_trip,
        student_matches_predict,
        deploys_one_plain_network,
        never_waits_for_device,
        compiles,
    )
}
"""All checks that run in one process, by the name that `kdbench check` prints."""
