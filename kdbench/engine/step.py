"""One training step: eager, compiled by inductor, recorded as a CUDA graph, or both."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from kdbench.backbones import Backbone
from kdbench.engine.parallel_streams import ParallelStreams
from kdbench.method import ContractError
from kdbench.suite.suite import Precision

Mode = Literal["eager", "inductor", "graph", "inductor+graph"]
"""How training steps run. `graph` replays forward, backward and update as one CUDA graph."""

WARMUP_STEPS = 3
"""Steps before a graph is recorded, in which libraries choose algorithms and optimizers
initialize their state."""

REPLAY_TOLERANCE = 1e-2
"""Largest relative difference between a replayed update and an eager one. A wrong graph gives
about 1."""


class TrainingStep:
    """A training step: forward pass, one backward pass of the summed terms, optimizer updates.

    If the method cannot be compiled or recorded, steps run eagerly from then on and `on_fallback`
    is called with the reason.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizers: Iterable[Optimizer],
        precision: Precision = "fp32",
        mode: Mode = "eager",
        on_fallback: Callable[[str], None] = lambda reason: None,
    ):
        self.module = module
        self.optimizers = list(optimizers)
        self.bf16 = precision == "bf16"
        self.mode = mode
        self.on_fallback = on_fallback
        self.names: tuple[str, ...] = ()
        """Names of the loss terms, in order; known after the first step."""
        self._forward: Callable[[Tensor, Tensor], dict[str, Tensor]] = module
        self._inner = module.module if isinstance(module, DistributedDataParallel) else None
        compiled = "inductor" in mode
        self._streams = self._make_streams(compiled)
        if compiled and self._inner is not None:
            # The gradient synchronization of DDP cannot be traced as one graph.
            self._inner.forward = torch.compile(self._inner.forward, fullgraph=True, dynamic=False)
        elif compiled:
            fullgraph = not self._streams  # networks on their own streams are compiled separately
            self._forward = torch.compile(module, fullgraph=fullgraph, dynamic=False)
        self._replay: Callable[[], object] | None = None
        self._inputs: tuple[Tensor, Tensor]
        self._output: Tensor
        self.steps = 0
        """Number of steps begun so far."""

    def __call__(self, views: Tensor, labels: Tensor) -> Tensor:
        """Train on one batch without waiting for the device.

        Args:
            views: (V, B, 3, H, W) normalized images.
            labels: (B,) class indices.

        Returns:
            The weighted loss terms, (N,). In graph mode the next step overwrites them.

        Raises:
            ContractError: The method did not return a dict of named scalar terms.
        """
        self.steps += 1
        if self.steps == 1:
            return self._first(views, labels)
        if "graph" in self.mode and self.steps > WARMUP_STEPS:
            return self._recorded(views, labels)
        return self._run(views, labels)

    def _run(self, views: Tensor, labels: Tensor) -> Tensor:
        with self.autocast():
            with self._streams.patched():
                terms = self._forward(views, labels)
            if not self.names:
                check_terms(terms)
                self.names = tuple(terms)
            values = torch.stack(list(terms.values()))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        values.sum().backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return values.detach()

    def _make_streams(self, compiled: bool) -> ParallelStreams:
        networks = [part for part in self.module.modules() if isinstance(part, Backbone)]
        several = "graph" in self.mode and len(networks) > 1
        return ParallelStreams(networks if several else [], compiled)

    def autocast(self) -> torch.autocast | nullcontext[None]:
        """Return the autocast context of the suite's precision, for training and evaluation."""
        if not self.bf16:
            return nullcontext()
        return torch.autocast(next(self.module.parameters()).device.type, torch.bfloat16)

    def _first(self, views: Tensor, labels: Tensor) -> Tensor:
        """Run the first step, which compiles. If that fails, restore the state and run eagerly."""
        if "inductor" not in self.mode:
            return self._run(views, labels)
        before = TrainingState(self.module, self.optimizers)
        try:
            return self._run(views, labels)
        except ContractError:
            raise
        except Exception as error:  # compilers raise anything; the method's own errors recur below
            why = _first_line(error)
        # Outside the except block, the error no longer keeps device memory alive in its frames.
        before.restore()
        self._forward = self.module
        self._streams = self._make_streams(compiled=False)
        if self._inner is not None:
            del self._inner.forward
        values = self._run(views, labels)
        self._fall_back("graph" if "graph" in self.mode else "eager", "compiled", why)
        return values

    def _recorded(self, views: Tensor, labels: Tensor) -> Tensor:
        if self._replay is None:
            return self._record(views, labels)
        for held, new in zip(self._inputs, (views, labels), strict=True):
            held.copy_(new)
        self._replay()
        return self._output

    def _record(self, views: Tensor, labels: Tensor) -> Tensor:
        """Run a step, record it, and keep the graph only if its replay gives the same update."""
        start = TrainingState(self.module, self.optimizers)
        expected = self._run(views, labels)
        end = TrainingState(self.module, self.optimizers)
        self._inputs = views.clone(), labels.clone()
        try:
            start.restore()
            replay, self._output = capture_cuda_graph(
                lambda: self._run(*self._inputs), self._streams.open(self._inputs[0])
            )
            replay()
            after = TrainingState(self.module, self.optimizers)
            difference = max(after.difference(end, start), _relative(self._output, expected))
            if not difference <= REPLAY_TOLERANCE:
                raise RuntimeError(
                    f"its replay differs by {difference:.1e} (relative) from the step itself"
                )
            self._replay = replay
        except RuntimeError as error:  # includes out of memory, because a graph has its own pool
            mode: Mode = "inductor" if "inductor" in self.mode else "eager"
            self._fall_back(mode, "recorded", _first_line(error))
        finally:
            end.restore()
        return expected

    def _fall_back(self, mode: Mode, action: str, why: str) -> None:
        self.mode = mode
        self.on_fallback(f"cannot be {action}: {why}")


class TrainingState:
    """A copy of everything that a step changes: parameters, buffers and optimizer state."""

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer]):
        optimizers = list(optimizers)
        self._tensors = state_tensors(module, optimizers)
        self._copies = [tensor.detach().clone() for tensor in self._tensors]
        self._optimizers = [(optimizer, set(optimizer.state)) for optimizer in optimizers]
        self._cpu = torch.get_rng_state()

    @torch.no_grad()
    def restore(self) -> None:
        """Restore all tensors in place, so that references to them stay valid."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(copy)
        for optimizer, known in self._optimizers:
            for parameter in set(optimizer.state) - known:
                del optimizer.state[parameter]
        torch.set_rng_state(self._cpu)

    def difference(self, other: "TrainingState", start: "TrainingState") -> float:
        """Return the distance to `other`, relative to the distance of `other` from `start`."""
        floats = [
            (mine, theirs, old)
            for mine, theirs, old in zip(self._copies, other._copies, start._copies, strict=True)
            if mine.is_floating_point()
        ]
        difference = sum((mine - theirs).double().square().sum() for mine, theirs, _ in floats)
        update = sum((theirs - old).double().square().sum() for _, theirs, old in floats)
        return float((torch.as_tensor(difference) / torch.as_tensor(update)).sqrt())


def state_tensors(module: nn.Module, optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return the parameters, the buffers and the tensors of the optimizers' state."""
    optimizer_state = [
        value
        for optimizer in optimizers
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    return [*module.parameters(), *module.buffers(), *optimizer_state]


def capture_cuda_graph(
    step: Callable[[], Tensor], parallel: AbstractContextManager[None]
) -> tuple[Callable[[], object], Tensor]:
    """Record a step as a CUDA graph.

    Args:
        step: runs the step and returns its output.
        parallel: context in which the networks run on separate streams.

    Returns:
        A function that replays the step, and the tensor that it writes its output to.
    """
    graph = torch.cuda.CUDAGraph()
    # Errors are thread-local because a data loader may pin memory in another thread meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), parallel:
        output = step()
    return graph.replay, output


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def _relative(values: Tensor, expected: Tensor) -> float:
    return float((values - expected).abs().max() / expected.abs().max())


def check_terms(terms: Any) -> None:
    """Check that the return value of forward() is a dict of named scalar tensors.

    Raises:
        ContractError: It is not; the message says what forward() returned instead.
    """
    if not isinstance(terms, dict) or not terms:
        raise ContractError("forward() must return a dict of named loss terms")
    for name, term in terms.items():
        if not isinstance(name, str) or not name:
            raise ContractError(f"forward() returned a loss term without a name ({name!r})")
        if not isinstance(term, Tensor) or term.dim() != 0:
            shape = tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__
            raise ContractError(f"forward() returned '{name}' as {shape}, not as a scalar tensor")
