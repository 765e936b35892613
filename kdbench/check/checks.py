"""The checks: each a function of a subject that returns, skips, or says what is wrong."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kdbench.backbones import build
from kdbench.check.subject import BATCH, EPOCHS, Subject, own_parameters
from kdbench.engine.evaluate import check_roles
from kdbench.engine.measure import count_parameters
from kdbench.engine.optimizers import build_optimizers
from kdbench.engine.step import check_terms

Check = Callable[[Subject], None]


class CheckFailedError(Exception):
    """The method does not keep this part of the contract."""


class CheckSkippedError(Exception):
    """This part of the contract does not apply, or cannot be checked here."""


def require(condition: bool, complaint: str) -> None:
    if not condition:
        raise CheckFailedError(complaint)


def roles_and_shapes(subject: Subject) -> None:
    """Logits (B, C) by role, `student` among them, none that kdbench computes itself."""
    method = subject.build().eval()
    roles = method.predict(subject.batch()[0][0])
    check_roles(roles)
    shape = (BATCH, subject.suite.data.classes)
    for role, logits in roles.items():
        require(logits.shape == shape, f"role '{role}' is {tuple(logits.shape)}, not {shape}")


def losses_named_and_finite(subject: Subject) -> None:
    """A dict of scalars under names `kind/role`, finite in the first step."""
    method = subject.build()
    terms = method(*subject.batch())
    check_terms(terms)
    for name, term in terms.items():
        require("/" in name, f"loss term '{name}' is not named kind/role")
        require(bool(term.isfinite()), f"loss term '{name}' is {term.item()}")


def sum_is_optimised(subject: Subject) -> None:
    """A step of the harness gives every parameter the gradient of the sum of all terms."""
    views, labels = subject.batch()
    with subject.run() as run:
        method = run.method
        method.train().begin_epoch(0)
        state = {k: v.clone() for k, v in method.state_dict().items()}
        run.step(views.float(), labels)
        stepped = {name: p.grad for name, p in method.named_parameters() if p.requires_grad}
        method.load_state_dict(state)
        total = torch.stack(list(method(views.float(), labels).values())).sum()
        parameters = [p for p in method.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    for (name, ours), theirs in zip(stepped.items(), gradients, strict=True):
        require(theirs is not None, f"parameter '{name}' is in no loss term")
        require(ours is not None and _close(ours, theirs), f"'{name}' follows another gradient")


def targets_detached(subject: Subject) -> None:
    """A network's terms train no other network, or the method declares that they do."""
    method = subject.build()
    views, labels = subject.batch()
    own = own_parameters(method.eval(), views[0])
    if len(own) < 2:
        raise CheckSkippedError("one network")
    terms = method.train()(views, labels)
    for role in own:
        named = any(name.rpartition("/")[2] == role for name in terms)
        require(named, f"no loss term is named kind/{role}, so its targets cannot be checked")
    leaks = _leaks(terms, own)
    if subject.entry.method.attached_targets:
        require(bool(leaks), "attached_targets is declared, and no term reaches another network")
    else:
        require(not leaks, leaks[0] if leaks else "")


def _leaks(terms: dict[str, Tensor], own: dict[str, dict[str, torch.nn.Parameter]]) -> list[str]:
    found = []
    for name, term in terms.items():
        role = name.rpartition("/")[2]
        others = [(r, p) for r, ps in own.items() if r != role for p in ps.values()]
        if role not in own or not term.requires_grad:
            continue
        gradients = torch.autograd.grad(
            term, [p for _, p in others], retain_graph=True, allow_unused=True
        )
        for (other, _), gradient in zip(others, gradients, strict=True):
            if gradient is not None and bool(gradient.any()):
                found.append(f"'{name}' trains network '{other}'; detach its target")
                break
    return found


def train_and_eval_mode(subject: Subject) -> None:
    """Train mode in every step of every epoch, eval mode in every prediction."""
    with subject.run() as run:
        method = run.method
        modes: dict[str, list[bool]] = {"forward": [], "predict": []}

        def watched(name: str) -> Callable[..., dict[str, Tensor]]:
            original = getattr(method, name)

            def call(*inputs: Tensor) -> dict[str, Tensor]:
                modes[name] += [module.training for module in method.modules()]
                result: dict[str, Tensor] = original(*inputs)
                modes[name] += [module.training for module in method.modules()]
                return result

            return call

        for name in modes:
            setattr(method, name, watched(name))
        run.train()
    require(all(modes["forward"]), "a module trained in eval mode")
    require(not any(modes["predict"]), "a module predicted in train mode")


def deterministic(subject: Subject) -> None:
    """The same seed gives the same numbers, bit for bit."""
    histories = []
    for _ in range(2):
        with subject.run() as run:
            histories.append(run.train().history)
    require(len(histories[0]) == EPOCHS, f"{len(histories[0])} epochs were trained")
    require(histories[0] == histories[1], "two runs of one seed differ")


def independent_of_batch_order(subject: Subject) -> None:
    """The same images in another order give the same losses."""
    views, labels = subject.batch()
    order = torch.arange(BATCH).flip(0)
    first = subject.build()(views, labels)
    second = subject.build()(views[:, order], labels[order])
    for name in first:
        require(_close(first[name], second[name]), f"loss term '{name}' depends on the order")


def state_dict_round_trip(subject: Subject) -> None:
    """A trained state in a fresh method gives the same logits in every role."""
    images = subject.batch()[0][0]
    trained = subject.build()
    trained(*subject.batch())  # moves running statistics
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.01)
    fresh = subject.build()
    fresh.load_state_dict(trained.state_dict())
    with torch.no_grad():
        ours, theirs = trained.eval().predict(images), fresh.eval().predict(images)
    for role in ours:
        require(torch.equal(ours[role], theirs[role]), f"role '{role}' is not in the state")


def student_ships_alone(subject: Subject) -> None:
    """`student()` gives the logits that `predict()` calls the student's."""
    method = subject.build().eval()
    images = subject.batch()[0][0]
    with torch.no_grad():
        alone, among = method.student()(images).logits, method.predict(images)["student"]
    require(_close(alone, among), "student() is not the network that predict() calls 'student'")


def deploys_one_plain_network(subject: Subject) -> None:
    """What ships has the parameters of a plain backbone."""
    plain = count_parameters(build(subject.architecture, subject.suite.data.classes))
    deployed = count_parameters(subject.build().student())
    require(deployed == plain, f"{deployed:,} parameters ship; a plain network has {plain:,}")


def every_parameter_in_one_group(subject: Subject) -> None:
    """The optimizers hold every trainable parameter once."""
    build_optimizers(subject.build(), subject.suite.optimizer)


class _Waits(TorchDispatchMode):
    """Notices reads of a value on the device, which a GPU would have to be waited for."""

    seen = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.seen = True
        return func(*args, **(kwargs or {}))


def waits_for_nothing(subject: Subject) -> None:
    """No `.item()`, no condition on a tensor's value, in the step."""
    method = subject.build()
    views, labels = subject.batch()
    with _Waits() as waits:
        method(views, labels)
    require(not waits.seen, "forward() reads a value from the device, which stalls a GPU")


def compiles(subject: Subject) -> None:
    """The step traces as one graph, without a break, and gives the same losses."""
    views, labels = subject.batch()
    eager = subject.build()(views, labels)
    method = subject.build()
    method.compile(backend="aot_eager", fullgraph=True)
    compiled = method(views, labels)
    for name in eager:
        require(_close(eager[name], compiled[name]), f"'{name}' differs once compiled")


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-9 if a.dtype == torch.float64 else 1e-5
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


CHECKS: dict[str, Check] = {
    check.__name__.replace("_", " "): check
    for check in (
        roles_and_shapes,
        losses_named_and_finite,
        every_parameter_in_one_group,
        sum_is_optimised,
        targets_detached,
        train_and_eval_mode,
        deterministic,
        independent_of_batch_order,
        state_dict_round_trip,
        student_ships_alone,
        deploys_one_plain_network,
        waits_for_nothing,
        compiles,
    )
}
